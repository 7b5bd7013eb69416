"""Worker processes of a pass that is left in the middle."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accelerate.data import workers
from accelerate.data.prepare import prepare_data_loader
from accelerate.data.workers import LEAVING_SECONDS

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


@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}, {"use_stateful_dataloader": True}], ids=str)
@pytest.mark.parametrize("dataset", [Slow, SlowStream])
@pytest.mark.parametrize("how", ["break", "exception"])
def test_those_in_the_middle_of_a_sample_hold_up_the_loop_for_a_second_all_together(waits, dataset, options, how):
    base = DataLoader(dataset(), batch_size=4, num_workers=2)
    loader = prepare_data_loader(base, device=torch.device("cpu"), put_on_device=True, **options)

    try:
        for _ in loader:
            if how == "break":
                break
            raise ValueError("in the body")
    except ValueError:
        pass
    del loader, base  # torchdata's loader keeps its last iterator
    gc.collect()

    assert len(waits) >= 2, "torch has waited for both"
    assert min(waits) >= 0, waits
    assert sum(waits) <= LEAVING_SECONDS, waits


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
