"""What several processes wrote with torch's own sharded checkpoints is read by one, and merged by all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from accelerate import PartialState
from accelerate.checkpoint import dcp
from accelerate.checkpoint.weights import load_weights
from accelerate.core.errors import CheckpointError
from accelerate.utils import merge_fsdp_weights

from ..support.ranks import run_on_ranks
from ..unit.checkpoint.support import same_bits

WHOLE = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(24, dtype=torch.int64).reshape(2, 12),
    "few": torch.ones(1, 3, dtype=torch.bfloat16),
    "same": torch.arange(4.0),
    "plain": torch.arange(6.0),
    "old": torch.arange(12.0).reshape(6, 2),
}


def write_dtensors(folder: str) -> None:
    state = PartialState()
    mesh = dist.init_device_mesh("cpu", (state.num_processes,))
    spread: dict[str, Any] = {
        name: distribute_tensor(WHOLE[name], mesh, [place])
        for name, place in (("rows", Shard(0)), ("columns", Shard(1)), ("few", Shard(0)), ("same", Replicate()))
    }
    spread |= {"plain": WHOLE["plain"], "old": sharded_tensor(WHOLE["old"], state)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save({"model": spread}, checkpoint_id=folder)


def sharded_tensor(whole: torch.Tensor, state: PartialState) -> Any:
    """Spread rows over ranks, as the first version of FSDP does."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor
    from torch.distributed._shard.sharded_tensor.shard import Shard as Piece

    each = whole.shape[0] // state.num_processes
    begin = state.process_index * each
    piece = Piece.from_tensor_and_offsets(whole[begin : begin + each].clone(), [begin, 0], state.process_index)
    return ShardedTensor._init_from_local_shards([piece], *whole.shape)


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_process_reads_what_several_have_written(tmp_path: Path, ranks: int) -> None:
    run_on_ranks(write_dtensors, ranks, str(tmp_path / "c"))
    found = dcp.read_folder(tmp_path / "c")
    assert len(found.files) == ranks
    assert len(found.weights["rows"].pieces) == ranks
    assert same_bits({name: dcp.read_tensor(found, name) for name in WHOLE}, WHOLE)
    assert same_bits(as_torch_reads(tmp_path / "c"), WHOLE)


def as_torch_reads(folder: Path) -> dict[str, torch.Tensor]:
    state = {"model": {name: torch.full_like(tensor, 99) for name, tensor in WHOLE.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.load(state, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    return state["model"]


def merge(folder: str, output: str, remove: bool) -> str:
    PartialState()
    try:
        merge_fsdp_weights(folder, output, remove_checkpoint_dir=remove)
    except (ValueError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{os.path.isdir(folder)} {sorted(os.listdir(output))}"


def test_all_ranks_merge_together(tmp_path: Path) -> None:
    run_on_ranks(write_dtensors, 2, str(tmp_path / "c"))
    assert (
        run_on_ranks(merge, 2, str(tmp_path / "c"), str(tmp_path / "out"), True) == ["False ['model.safetensors']"] * 2
    )
    loaded = load_weights(tmp_path / "out")
    assert same_bits({name: loaded[name] for name in WHOLE}, WHOLE)


def test_all_ranks_hear_that_merging_failed_and_nothing_is_removed(tmp_path: Path) -> None:
    run_on_ranks(write_dtensors, 2, str(tmp_path / "c"))
    os.truncate(tmp_path / "c" / "__1_0.distcp", 30)
    told = run_on_ranks(merge, 2, str(tmp_path / "c"), str(tmp_path / "out"), True)
    assert all("CheckpointError" in message and "__1_0.distcp" in message for message in told), told
    assert (tmp_path / "c" / ".metadata").is_file()
    assert not (tmp_path / "out").exists()
    told = run_on_ranks(merge, 2, str(tmp_path), str(tmp_path / "out"), False)
    assert all(message.startswith("SettingError") and "is no sharded checkpoint" in message for message in told), told
