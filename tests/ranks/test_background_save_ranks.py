"""Saves in the background on several ranks, which train and talk meanwhile."""

from __future__ import annotations

import datetime as dt
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpoint import durable, layout
from accelerate.collectives import torch_dist
from accelerate.core.errors import CheckpointError
from accelerate.topology import connect
from tests.support.ranks import run_on_ranks


def begin() -> tuple[Accelerator, torch.nn.Module]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator, model


def hold_flushes(action: Callable[[Path], None] = lambda _: None) -> threading.Event:
    """Let no file reach the disk until the event is set; `action` is called before each does."""
    opened, real = threading.Event(), durable.flush_file

    def flush(file: Path) -> None:
        assert opened.wait(30)
        action(file)
        real(file)

    durable.flush_file = flush
    return opened


def weight(accelerator: Accelerator) -> torch.nn.Parameter:
    return accelerator._models[0].weight


def _train_meanwhile(folder: Path) -> Any:
    accelerator, model = begin()
    torch.nn.init.constant_(weight(accelerator), 1.0)
    opened = hold_flushes()
    handle = accelerator.save_state(folder, blocking=False)
    for _ in range(20):
        accelerator.backward(model(torch.ones(1, 4)).sum())
    total = accelerator.reduce(torch.tensor([float(accelerator.process_index)]))
    torch.nn.init.constant_(weight(accelerator), 2.0)
    was_done = handle.done()
    opened.set()
    handle.wait()
    accelerator.load_state(folder)
    return total.item(), was_done, weight(accelerator).unique().tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_goes_on_with_all_its_collectives(ranks: int, tmp_path: Path) -> None:
    total = float(sum(range(ranks)))
    assert run_on_ranks(_train_meanwhile, ranks, tmp_path / "c") == [(total, False, [1.0])] * ranks


def _fail_on_rank_one(folder: Path, surface: str) -> Any:
    accelerator, _ = begin()
    accelerator.save_state(folder)
    rank = accelerator.process_index

    def fail(file: Path) -> None:
        if rank == 1 and file.name.startswith(layout.RNG_STATE_NAME):
            raise OSError(28, "No space left on device")

    opened = hold_flushes(fail)
    torch.nn.init.constant_(weight(accelerator), 2.0)
    before = weight(accelerator).clone()
    handle = accelerator.save_state(folder, blocking=False)
    opened.set()
    heard = {
        "wait": handle.wait,
        "save": lambda: accelerator.save_state(folder),
        "load": lambda: accelerator.load_state(folder),
        "end": accelerator.end_training,
    }[surface]
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="rank 1: OSError: .* No space left on device"):
        heard()
    assert time.monotonic() - started < 10
    return torch.equal(weight(accelerator), before)


@pytest.mark.parametrize("surface", ["wait", "save", "load", "end"])
def test_a_failure_on_one_rank_reaches_all_of_them(surface: str, tmp_path: Path) -> None:
    assert run_on_ranks(_fail_on_rank_one, 2, tmp_path / "c", surface) == [True, True]
    assert run_on_ranks(_first_weight, 1, tmp_path / "c") != [2.0]


def _first_weight(folder: Path) -> float:
    accelerator, _ = begin()
    accelerator.load_state(folder)
    return weight(accelerator).flatten()[0].item()


def _cannot_be_copied_on_rank_one(folder: Path) -> Any:
    accelerator, _ = begin()
    if accelerator.process_index == 1:
        accelerator.register_save_state_pre_hook(_refuse)
    with pytest.raises(Exception) as caught:
        accelerator.save_state(folder, blocking=False)
    return type(caught.value).__name__, folder.exists()


def _refuse(*_: Any) -> None:
    raise KeyError("mine")


def test_what_one_rank_cannot_copy_is_an_error_of_the_call_on_all(tmp_path: Path) -> None:
    outcomes = run_on_ranks(_cannot_be_copied_on_rank_one, 2, tmp_path / "c")
    assert outcomes == [("CheckpointError", False), ("KeyError", False)]


def _die(folder: Path) -> Any:
    accelerator, _ = begin()
    accelerator.save_state(folder)
    opened = hold_flushes((lambda _: os._exit(17)) if accelerator.process_index == 1 else lambda _: None)
    handle = accelerator.save_state(folder, blocking=False)
    opened.set()
    with pytest.raises(CheckpointError, match="rank 0 cannot reach another rank any more"):
        handle.wait()
    return None


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 died with exit code 17"):
        run_on_ranks(_die, 2, tmp_path / "c", timeout=20)


def _hear_on_one_rank(folder: Path) -> Any:
    accelerator, _ = begin()
    fails = accelerator.process_index == 1

    def refuse(_: Path) -> None:
        if fails:
            raise OSError(28, "No space left on device")

    opened = hold_flushes(refuse)
    handle = accelerator.save_state(folder / "a", blocking=False)
    opened.set()
    if accelerator.process_index == 0:
        with pytest.raises(CheckpointError):
            handle.wait()
    told = ""
    try:
        accelerator.save_state(folder / "b")
    except CheckpointError as error:
        told = str(error)
    fails = False
    accelerator.save_state(folder / "b")
    return told


def test_what_one_rank_has_heard_all_hear_at_the_next_call(tmp_path: Path) -> None:
    first, second = run_on_ranks(_hear_on_one_rank, 2, tmp_path)
    assert first == second
    assert "No space left on device" in first


def _wait_longer_than_it_takes_to_connect() -> list[int]:
    torch_dist._CONNECTING = dt.timedelta(seconds=1)
    accelerator, _ = begin()
    line = accelerator.state._runtime.collectives.second_line()
    if accelerator.process_index == 1:
        time.sleep(2)
    return line.all_gather_object(accelerator.process_index)


def test_the_short_time_to_connect_is_not_the_time_that_writing_may_take() -> None:
    assert run_on_ranks(_wait_longer_than_it_takes_to_connect, 2) == [[0, 1], [0, 1]]


def _meet_again(folder: Path) -> None:
    accelerator, _ = begin()
    accelerator.save_state(folder, blocking=False).wait()
    store = connect.meeting_store()
    connect.break_off()
    accelerator.free_memory()
    connect.join_again(store, "again")
    accelerator.prepare(torch.nn.Linear(4, 4))
    accelerator.save_state(folder, blocking=False).wait()


def test_ranks_that_have_met_anew_save_in_the_background_too(tmp_path: Path) -> None:
    run_on_ranks(_meet_again, 2, tmp_path / "c")


def _connect_on_one_rank(folder: Path) -> list[str]:
    accelerator, _ = begin()
    told = []
    real = torch_dist.TorchCollectives.second_line

    def fails(collectives: Any) -> Any:
        line = real(collectives)
        if collectives.rank == 1:
            raise RuntimeError("connect timeout")
        return line

    for second_line in (fails, real):
        torch_dist.TorchCollectives.second_line = second_line
        try:
            accelerator.save_state(folder, blocking=False).wait()
        except (CheckpointError, RuntimeError) as error:
            told.append(str(error))
    return told


def test_after_a_line_that_one_rank_could_not_make_all_begin_alike(tmp_path: Path) -> None:
    first, second = run_on_ranks(_connect_on_one_rank, 2, tmp_path / "c")
    assert len(first) == len(second) == 1
    assert "rank 1: RuntimeError: connect timeout" in first[0]
