"""Weights from files and folders into a model that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.core.errors import CheckpointError, SettingError, UnsupportedCombination
from accelerate.utils import load_state_dict


class Tied(torch.nn.Module):
    """Two names for one parameter, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(8)


def parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "256B"])
def test_what_save_model_has_written_comes_back(tmp_path: Path, safe: bool, size: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Tied())
    accelerator.save_model(model, tmp_path, max_shard_size=size, safe_serialization=safe)
    for place in (tmp_path, *tmp_path.glob("*.index.json" if size == "256B" else "*model*")):
        other = Tied()
        load_checkpoint_in_model(other, place, strict=True)
        assert_same(other, parts(model))
        assert other.a.weight is other.b.weight


def test_weights_of_a_whole_state_come_back(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.save_state(tmp_path / "c")
    other = torch.nn.Linear(2, 2)
    load_checkpoint_in_model(other, tmp_path / "c")
    assert_same(other, parts(model))


def test_a_prepared_model_takes_the_weights_of_the_inner_one(tmp_path: Path) -> None:
    inner = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    safetensors.torch.save_file(inner.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint_in_model(compiled, tmp_path, strict=True)
    assert_same(compiled._orig_mod, parts(inner))


def test_the_only_file_or_the_only_index_of_a_folder_is_taken(tmp_path: Path) -> None:
    inner = torch.nn.Linear(2, 2)
    safetensors.torch.save_file(inner.state_dict(), tmp_path / "adapter.safetensors")
    other = torch.nn.Linear(2, 2)
    load_checkpoint_in_model(other, tmp_path)
    assert_same(other, parts(inner))
    torch.save(inner.state_dict(), tmp_path / "second.bin")
    with pytest.raises(SettingError, match="2 files that may be the weights: 'adapter.safetensors', 'second.bin'"):
        load_checkpoint_in_model(other, tmp_path)


def test_missing_and_unexpected_names_are_told_or_refused(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 2), "more": torch.ones(1)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"1 names of the model are not in it \('bias'\), and 1 are .*\('more'\)"):
        load_checkpoint_in_model(model, tmp_path / "m.safetensors")
    assert model.weight.eq(1).all()
    with pytest.raises(CheckpointError, match="do not fit"):
        load_checkpoint_in_model(model, tmp_path / "m.safetensors", strict=True)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no name in common: 'x' there, 'weight', 'bias' here"):
        load_checkpoint_in_model(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_parameters_take_the_type_that_is_asked_for(tmp_path: Path, dtype: Any) -> None:
    model = Tied()
    safetensors.torch.save_file(parts(torch.nn.BatchNorm1d(8)), tmp_path / "norm.safetensors")
    load_checkpoint_in_model(model.norm, tmp_path, dtype=dtype)
    types = {name: tensor.dtype for name, tensor in model.norm.state_dict().items()}
    assert types.pop("num_batches_tracked") == torch.int64
    assert set(types.values()) == {torch.bfloat16}
    with pytest.raises(SettingError, match="dtype='half a byte'"):
        load_checkpoint_in_model(model.norm, tmp_path, dtype="half a byte")


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"offload_folder": "x"}, {"full_state_dict": False}, {"offload_8bit_bnb": True}]
)
def test_what_is_not_built_is_refused_and_nothing_is_loaded(tmp_path: Path, options: Any) -> None:
    with pytest.raises(UnsupportedCombination, match=next(iter(options))):
        load_checkpoint_in_model(torch.nn.Linear(2, 2), tmp_path, **options)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedCombination, match="meta device, 'weight' among them"):
        load_checkpoint_in_model(model, tmp_path)


def test_one_file_is_read_as_a_dictionary(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.bin")
    for name in ("m.safetensors", "m.bin"):
        assert torch.equal(load_state_dict(tmp_path / name)["a"], state["a"])
    with pytest.raises(SettingError, match="is no file of weights"):
        load_state_dict(tmp_path / "absent")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Canary()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint_in_model(torch.nn.Linear(2, 2), tmp_path)
    assert not (tmp_path / "ran").exists()
