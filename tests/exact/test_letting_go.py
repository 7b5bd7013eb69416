"""A prepared loader goes when its last name goes, and its worker processes with it."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
from torch.utils.data import DataLoader

from accelerate import Accelerator
from tests.exact.sources import Numbers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_is_in_no_cycle(num_workers):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(
        DataLoader(Numbers(10), batch_size=2, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0)
    )
    assert sum(len(indices) for indices, _ in loader) == 10
    accelerator.free_memory()
    gc.disable()  # torch's workers that only the collector finds are waited for, five seconds each
    try:
        gone, begin = weakref.ref(loader), time.monotonic()
        del loader
        assert gone() is None
        assert time.monotonic() - begin < 4
    finally:
        gc.enable()
