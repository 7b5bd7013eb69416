"""Who runs what on several ranks, and every way in which ranks come to be."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    patch_environment,
    set_seed,
    synchronize_rng_states,
    tqdm,
    wait_for_everyone,
)

from ..support.ranks import free_port, run_on_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


# Who runs what --------------------------------------------------------------------------------------------------------


def roles() -> dict[str, Any]:
    accelerator = Accelerator()
    state = PartialState()

    @accelerator.on_main_process
    def on_main(value: int) -> int:
        """Text."""
        return value

    @state.on_process(process_index=1)
    def on_one() -> str:
        return "one"

    @accelerator.on_local_process(local_process_index=2)
    def on_two() -> str:
        return "two"

    @accelerator.on_last_process
    def on_last() -> str:
        return "last"

    @accelerator.on_local_main_process
    def on_local_main() -> str:
        return "local main"

    assert on_main.__name__ == "on_main"
    assert on_main.__doc__ == "Text."
    shown, bar = io.StringIO(), io.StringIO()
    with redirect_stdout(shown):
        accelerator.print("hello", end="!")
        state.print("again")
    with redirect_stderr(bar):
        assert list(tqdm(range(2), desc="all")) == [0, 1]
        assert list(tqdm(range(2), desc="each", main_process_only=False)) == [0, 1]
    return {
        "ran": [on_main(7), on_one(), on_two(), on_last(), on_local_main()],
        "is": [accelerator.is_main_process, accelerator.is_local_main_process, accelerator.is_last_process],
        "index": [accelerator.process_index, accelerator.local_process_index, accelerator.num_processes],
        "shown": shown.getvalue(),
        "bars": ["all: 100%" in bar.getvalue(), "each: 100%" in bar.getvalue()],
        "kind": [str(accelerator.device), accelerator.distributed_type.value, accelerator.use_distributed],
        "multi_device": accelerator.multi_device,
    }


def test_roles_of_three_ranks() -> None:
    first, second, third = run_on_ranks(roles, 3)
    assert [found["ran"] for found in (first, second, third)] == [
        [7, None, None, None, "local main"],
        [None, "one", None, None, None],
        [None, None, "two", "last", None],
    ]
    assert [found["is"] for found in (first, second, third)] == [
        [True, True, False],
        [False, False, False],
        [False, False, True],
    ]
    assert [found["index"] for found in (first, second, third)] == [[0, 0, 3], [1, 1, 3], [2, 2, 3]]
    assert [found["shown"] for found in (first, second, third)] == ["hello!again\n", "", ""]
    assert [found["bars"] for found in (first, second, third)] == [[True, True], [False, True], [False, True]]
    for found in (first, second, third):
        assert found["kind"] == ["cpu:0", "MULTI_CPU", True]
        assert not found["multi_device"]


def goes_first(folder: str, local: bool) -> bool:
    accelerator = Accelerator()
    region = accelerator.local_main_process_first if local else accelerator.main_process_first
    mark = Path(folder) / "mark"
    with region():
        if accelerator.is_main_process:
            time.sleep(0.3)  # for the others to come too early, if they are let
            mark.write_text("here")
        found = mark.exists()
    return found


@pytest.mark.parametrize("local", [False, True])
def test_main_process_goes_first(tmp_path: Path, local: bool) -> None:
    assert run_on_ranks(goes_first, 3, str(tmp_path), local) == [True, True, True]


def first_fails() -> str:
    accelerator = Accelerator()
    try:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                raise KeyError("no such data set")
        return "let go"
    except KeyError:
        return "raised"


def test_others_are_let_go_when_the_first_one_fails() -> None:
    assert run_on_ranks(first_fails, 2, timeout=20) == ["raised", "let go"]


def split() -> list[Any]:
    accelerator = Accelerator()
    inputs = {"a": [1, 2, 3], "b": torch.arange(3)}
    with accelerator.split_between_processes(inputs, apply_padding=True) as own:
        found: list[Any] = [own["a"], own["b"].tolist()]
    assert inputs["a"] == [1, 2, 3]
    assert inputs["b"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"values of different lengths: \{'a': 2, 'b': 1\}"):
        accelerator.split_between_processes({"a": [1, 2], "b": [1]}).__enter__()
    with pytest.raises(TypeError, match="got a tuple"):
        accelerator.split_between_processes((1, 2, 3), apply_padding=True).__enter__()
    tensor = torch.tensor([accelerator.process_index])
    assert accelerator.reduce(tensor).item() == 1
    assert tensor.item() == accelerator.process_index
    return found


def test_inputs_are_left_alone() -> None:
    assert run_on_ranks(split, 2) == [[[1, 2], [0, 1]], [[3, 3], [2, 2]]]


def triggers() -> list[bool]:
    accelerator = Accelerator()
    seen = []
    for setter in range(3):
        if accelerator.process_index == setter:
            accelerator.set_trigger()
        seen += [accelerator.check_trigger(), accelerator.check_trigger()]
    return seen


def test_trigger_of_any_rank_is_seen_by_all_once() -> None:
    assert run_on_ranks(triggers, 3) == [[True, False] * 3] * 3


def seeds() -> list[list[float]]:
    accelerator = Accelerator()
    set_seed(1)
    same = torch.rand(2).tolist()
    set_seed(1, device_specific=True)
    own = torch.rand(2).tolist()
    synchronize_rng_states(["torch"])
    after = torch.rand(2).tolist()
    generator = torch.Generator().manual_seed(accelerator.process_index)
    synchronize_rng_states(["generator"], generator)
    drawn = torch.rand(2, generator=generator).tolist()
    with pytest.raises(ValueError, match="contains 'zz'"):
        synchronize_rng_states(["zz"])
    with pytest.raises(ValueError, match="there is no generator to synchronise"):
        synchronize_rng_states(["generator"])
    return [same, own, after, drawn]


def test_seeds_and_their_synchronisation() -> None:
    first, second = run_on_ranks(seeds, 2)
    assert first[0] == second[0] == first[1]
    assert second[1] != first[1]
    assert first[2] == second[2]
    assert first[3] == second[3]


def logged() -> str:
    Accelerator()
    stream = io.StringIO()
    logger = get_logger("tests.ranks.logged", log_level="INFO")
    logger.logger.addHandler(logging.StreamHandler(stream))
    for _ in range(2):
        logger.warning_once("once")
    logger.info("each", main_process_only=False)
    logger.debug("not shown", main_process_only=False, in_order=True)
    return stream.getvalue()


def test_log_messages_carry_the_rank() -> None:
    assert run_on_ranks(logged, 2) == ["[RANK 0] once\n[RANK 0] each\n", "[RANK 1] each\n"]


# How ranks come to be -------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """Return what this process takes itself for, after having talked to the others."""
    accelerator = Accelerator()
    everyone = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
    wait_for_everyone()
    return {
        "everyone": everyone,
        "rank": accelerator.process_index,
        "local": accelerator.local_process_index,
        "size": accelerator.num_processes,
        "kind": accelerator.distributed_type.value,
        "device": str(accelerator.device),
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def check(found: dict[str, Any], rank: int, size: int = 2) -> None:
    assert found == {
        "everyone": list(range(size)),
        "rank": rank,
        "local": rank,
        "size": size,
        "kind": "MULTI_CPU",
        "device": "cpu:0",
        "backend": "gloo",
    }


def without_choice_of_cpu() -> list[dict[str, Any]]:
    del os.environ["ACCELERATE_USE_CPU"]
    state = PartialState()
    assert (state.num_processes, state.backend) == (int(os.environ["WORLD_SIZE"]), "gloo")
    return [describe()]


def join_slowly(folder: str) -> list[str]:
    join, rank = dist.init_process_group, os.environ["RANK"]

    def slowly(*args: Any, **kwargs: Any) -> None:
        join(*args, **kwargs)
        time.sleep(0.3 if rank == "1" else 0.0)
        (Path(folder) / rank).touch()

    dist.init_process_group = slowly
    PartialState()
    return sorted(os.listdir(folder))


def test_nobody_goes_on_before_all_have_joined(tmp_path: Path) -> None:
    # A rank that is done at once would close its connections while others still make theirs.
    assert run_on_ranks(join_slowly, 3, str(tmp_path)) == [["0", "1", "2"]] * 3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine is no CPU host")
def test_processes_on_a_cpu_host_join_a_group_unasked() -> None:
    for rank, (found,) in enumerate(run_on_ranks(without_choice_of_cpu, 2)):
        check(found, rank)


def alone_under_torchrun() -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 1
    assert not accelerator.use_distributed
    model = torch.nn.Linear(1, 1)
    assert accelerator.prepare(model) is model
    assert accelerator.gather(torch.tensor(1.0)).dim() == 0
    accelerator.wait_for_everyone()


def test_one_process_of_torchrun_is_one_process() -> None:
    run_on_ranks(alone_under_torchrun, 1)


def attached() -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    # What the launcher said does not count any more.
    os.environ["WORLD_SIZE"] = "17"
    found = describe()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert dist.is_initialized()
    return {**found, **describe()}


def test_group_that_exists_already_is_joined() -> None:
    for rank, found in enumerate(run_on_ranks(attached, 2)):
        check(found, rank)


def attached_without_variables() -> dict[str, Any]:
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    port = os.environ["MASTER_PORT"]
    for name in (*LAUNCHER, "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return describe()


def test_group_that_exists_already_needs_no_variables() -> None:
    for rank, found in enumerate(run_on_ranks(attached_without_variables, 2)):
        check(found, rank)


MPI = {
    "open mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", None),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", None),
    "intel mpi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def under_mpi(names: tuple[str | None, ...]) -> tuple[dict[str, Any], list[str]]:
    values = [os.environ.pop(name) for name in LAUNCHER]
    rank, size, local_rank, local_size = values
    for name, value in zip(names, (rank, size, local_rank, local_size), strict=True):
        if name is not None:
            os.environ[name] = value
    found = describe()
    # Torch, and what else reads them, finds the usual variables.
    return found, [os.environ[name] for name in LAUNCHER]


@pytest.mark.parametrize("launcher", MPI)
def test_ranks_of_an_mpi_launcher(launcher: str) -> None:
    for rank, (found, announced) in enumerate(run_on_ranks(under_mpi, 2, MPI[launcher])):
        check(found, rank)
        assert announced == [str(rank), "2", str(rank), "2"]


def group_options() -> list[Any]:
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=77))], cpu=True
    )
    timeout = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    accelerator.end_training()
    ended = dist.is_initialized()
    accelerator.end_training()
    return [timeout, ended]


def test_group_options_reach_the_group_and_end_training_leaves_it() -> None:
    assert run_on_ranks(group_options, 2) == [[timedelta(seconds=77), False]] * 2


def refused_backend() -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PartialState(cpu=True, backend="nccl")
    return str(caught.value)


def test_backend_of_a_device_that_is_not_used() -> None:
    for text in run_on_ranks(refused_backend, 2):
        assert text.startswith("backend='nccl' cannot serve processes on the CPU.\nAccepted: 'gloo', 'mpi'.")


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ("RANK is not set", "accelerate launch")),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "two", "RANK": "0"}, ("WORLD_SIZE='two'", "an integer >= 0")),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "2"}, ("rank 2 is not below the world size 2", "0 to 1")),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("MASTER_ADDR does not say", "mpirun -x MASTER_ADDR"),
        ),
    ],
    ids=("missing", "no number", "outside", "nodes"),
)
def test_variables_that_cannot_be_meant(variables: dict[str, str], parts: tuple[str, ...]) -> None:
    with patch_environment(**variables), pytest.raises(ValueError) as caught:  # noqa: PT011
        PartialState(cpu=True)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert not dist.is_initialized()


def test_leftover_local_rank_alone_is_one_process() -> None:
    with patch_environment(LOCAL_RANK="0"):
        assert PartialState(cpu=True).distributed_type is DistributedType.NO


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.ranks.test_accelerator import describe
found = describe()
Path({folder!r}, str(found["rank"])).write_text(json.dumps(found))
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine is no CPU host")
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run"], ["torch.distributed.launch", "--use_env"]], ids=lambda words: words[0]
)
def test_scripts_of_torchs_own_launchers(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    options = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *options, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        check(json.loads((tmp_path / str(rank)).read_text()), rank)
    assert "Traceback" not in done.stderr
