"""Worker processes of a pass that is left in the middle."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

from accelerate.data import workers
from accelerate.data.prepare import prepare_data_loader
from accelerate.data.workers import ENDED_SECONDS, ENDING_SECONDS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


class Slow(Dataset[float]):
    """Has samples that take longer than any test, behind those that the loop reads."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> float:
        if index >= 8:
            time.sleep(600)
        return float(index)


class SlowStream(IterableDataset[float]):
    def __iter__(self) -> Any:
        yield from (1.0, 2.0, 3.0, 4.0)
        time.sleep(600)


@pytest.fixture
def waits(monkeypatch):
    """Note how long each worker is waited for, and do not wait: only the clock goes on."""
    seconds: list[float | None] = []
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: sum(passed or 0.0 for passed in seconds)))
    monkeypatch.setattr(BaseProcess, "join", lambda _, timeout=None: seconds.append(timeout))
    yield seconds
    monkeypatch.undo()
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def raises(loader: Any) -> None:
    for _ in loader:
        raise ValueError("in the body")


def calls_what_raises(loader: Any) -> None:
    for _ in loader:
        int("x")


def raises_behind_a_generator(loader: Any) -> None:
    for _ in (batch for batch in loader):
        raise ValueError("in the body")


def breaks(loader: Any) -> None:
    for _ in loader:
        break


def breaks_behind_a_generator(loader: Any) -> None:
    for _ in (batch for batch in loader):
        break


def breaks_after_an_exception(loader: Any) -> None:
    kept = []
    for _ in loader:
        try:
            int("x")
        except ValueError as error:
            kept.append(error)
        break


def gives_up_the_iterator(loader: Any) -> None:
    next(iter(loader))


@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}], ids=str)
@pytest.mark.parametrize("dataset", [Slow, SlowStream])
@pytest.mark.parametrize("loop", [raises, calls_what_raises, raises_behind_a_generator])
def test_those_in_the_middle_of_a_sample_hold_up_an_exception_for_a_second_all_together(waits, dataset, options, loop):
    base = DataLoader(dataset(), batch_size=4, num_workers=2)
    loader = prepare_data_loader(base, device=torch.device("cpu"), put_on_device=True, **options)

    with pytest.raises(ValueError):
        loop(loader)

    assert len(waits) >= 2, "torch has waited for both"
    assert min(waits) >= 0, waits
    assert sum(waits) <= ENDING_SECONDS + 2 * ENDED_SECONDS, waits


@pytest.mark.parametrize(
    "options",
    [{}, {"dispatch_batches": True}, {"use_stateful_dataloader": True}],
    ids=["plain", "dispatched", "stateful"],
)
@pytest.mark.parametrize(
    "loop", [breaks, breaks_behind_a_generator, breaks_after_an_exception, gives_up_the_iterator]
)  # fmt: skip
def test_without_an_exception_they_have_the_time_that_torch_gives_them(waits, options, loop):
    base = DataLoader(Slow(), batch_size=4, num_workers=2)
    loader = prepare_data_loader(base, device=torch.device("cpu"), put_on_device=True, **options)

    loop(loader)
    del loader, base  # torchdata's loader keeps its last iterator
    gc.collect()

    times = [2, 3, 4]  # for each once, and once more where it lives on after SIGTERM
    assert sum(waits) in [number * MP_STATUS_CHECK_INTERVAL for number in times], waits


class Writes(Dataset[float]):
    """Notes in files which samples were begun, and which were made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        (self.folder / f"{index}.begun").touch()
        time.sleep(ENDING_SECONDS * 0.7 if index > 1 else 0)
        (self.folder / f"{index}.made").touch()
        return float(index)


def test_a_loop_that_breaks_lets_its_workers_finish_their_batches_and_leaves_none_behind(tmp_path):
    base = DataLoader(Writes(tmp_path), batch_size=2, num_workers=2)

    breaks(prepare_data_loader(base, device=torch.device("cpu"), put_on_device=True))

    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    begun, made = ({file.stem for file in tmp_path.glob(f"*.{what}")} for what in ("begun", "made"))
    assert begun == made
    assert len(made) >= 4


def test_others_who_wait_for_them_wait_as_long_as_they_want(waits):
    loader = prepare_data_loader(DataLoader(Slow(), batch_size=4, num_workers=1), device=torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    del batches
    waits.clear()

    worker.join()
    worker.join(7)

    assert waits == [None, 7]


def test_those_that_stay_for_the_next_pass_are_torchs_affair(waits):
    base = DataLoader(Slow(), batch_size=4, num_workers=1, persistent_workers=True)
    loader = prepare_data_loader(base, device=torch.device("cpu"))
    next(iter(loader))

    (worker,) = multiprocessing.active_children()

    assert "join" not in vars(worker)
