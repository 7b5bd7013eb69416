"""Two ranks that talk to nobody else: whether they can, and how fast.

Owns the measurement of a link. The two make a default group of their own, and leave it again, so no other group may
exist; any back-end will do.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..hardware import CPU, Hardware
from ..topology import connect

SMALL_REPEATS = 10
LARGE_REPEATS = 3
BYTES_ON_CPU = 8 * 2**20
BYTES_ON_DEVICE = 64 * 2**20
WATCHDOG_SECONDS = 60
"""How much later than we torch's watchdog gives up on a device's back-end: it ends the process."""


def measure(
    store: Any, name: str, *, rank: int, backend: str, device: torch.device, family: Hardware, limit_seconds: float
) -> tuple[float, float]:
    """Sum tensors between two ranks; return the latency in seconds, and the bytes that went each way in a second.

    Called on both; collective between the two.

    Args:
        store: Where they find each other.
        name: Of this pair; the same on both, and new each time.
        rank: 0 on one of them, 1 on the other.
        backend: For torch.
        device: Where this rank's tensors are.
        family: What kind of device that is.
        limit_seconds: How long one of the steps may take.

    Raises:
        RuntimeError: If the other one does not answer in time, or the sum is wrong.
    """
    patience = limit_seconds if family is CPU else limit_seconds + WATCHDOG_SECONDS
    deadline = time.monotonic() + limit_seconds
    connect.make_group(store, name, rank=rank, world_size=2, backend=backend, limit=timedelta(seconds=patience))
    stuck = True
    try:
        small = torch.ones(1, device=device)
        _sum(small, family, deadline)
        if small.item() != 2:
            raise RuntimeError(f"the sum of 1 and 1 came out as {small.item()}")
        began = time.perf_counter()
        for _ in range(SMALL_REPEATS):
            _sum(small, family, deadline)
        latency = (time.perf_counter() - began) / SMALL_REPEATS
        size = BYTES_ON_CPU if family is CPU else BYTES_ON_DEVICE
        large = torch.full((size // 4,), 1.0, device=device)
        _sum(large, family, deadline)  # the first one of a size prepares buffers
        began = time.perf_counter()
        for _ in range(LARGE_REPEATS):
            _sum(large, family, deadline)
        seconds = (time.perf_counter() - began) / LARGE_REPEATS
        if not bool((large == 2.0 ** (LARGE_REPEATS + 1)).all()):
            raise RuntimeError("the sum of two large tensors came out wrong: data is damaged on its way")
        stuck = False
    finally:
        connect.leave_group(stuck=stuck)
    return latency, size / seconds


def _sum(tensor: torch.Tensor, family: Hardware, deadline: float) -> None:
    work: Any = dist.all_reduce(tensor, async_op=True)
    if family is CPU:
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        return
    while not work.is_completed():  # a device's work is not waited for with a limit, so it is looked at
        if time.monotonic() > deadline:
            raise RuntimeError("no data came through in time")
        time.sleep(0)
    work.wait()
    family.synchronize(tensor.device)
