"""Run a function on several real gloo processes, as if it were one call."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """Return a port that nobody listens on, and that no system gives to a connection by itself."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


def _work(rank: int, world_size: int, port: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    trace = (Path(folder) / f"{rank}.trace").open("w")
    faulthandler.register(signal.SIGUSR1, trace, all_threads=True)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # destructors of what the test process holds, such as stores and loaders, are not for its copies
    gc.enable()
    status, value = "ok", None
    try:
        value = fn(*args)
    except BaseException as error:  # reported in the parent, whatever it is
        status, value = "error", (repr(error), traceback.format_exc())
    (Path(folder) / f"{rank}.tmp").write_bytes(pickle.dumps((status, value)))
    os.rename(f"{folder}/{rank}.tmp", f"{folder}/{rank}")
    if rank == 0:  # it holds the store, which others may still be joining
        _wait_for_all(folder, world_size)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a forked copy of the test process must not run its exit handlers


def _wait_for_all(folder: str, world_size: int) -> None:
    deadline = time.monotonic() + 4
    missing = set(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = {rank for rank in missing if not (Path(folder) / str(rank)).exists()}
        if missing:
            time.sleep(0.005)


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Return what `fn(*args)` gave on each of `world_size` ranks.

    Each rank is a forked process with a launcher's variables set; nothing is started for it, so `fn` builds its own
    `PartialState` or `Accelerator`.

    Raises:
        AssertionError: With the traceback of the first rank that raised, or the ranks that did not come back.
    """
    context = mp.get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, world_size, port, folder, fn, args)) for rank in range(world_size)
        ]
        gc.disable()  # until they have frozen it, they must not collect the garbage of this process either
        try:
            for worker in workers:
                worker.start()
        finally:
            gc.enable()
        # A rank that died leaves the others waiting for it, so no rank is waited for alone.
        deadline, dead = time.monotonic() + timeout, []
        while (running := [worker.sentinel for worker in workers if worker.is_alive()]) and time.monotonic() < deadline:
            wait(running, 0.02)
            if any(_failed(folder, rank) for rank in range(world_size)):
                for worker in workers:
                    worker.join(5)
                break
        for rank, worker in enumerate(workers):
            if worker.is_alive():
                dead.append(
                    f"rank {rank} did not come back in {timeout} s, and was here:\n{_where(worker.pid, folder, rank)}"
                )
                worker.kill()
            worker.join()
            if worker.exitcode and not (Path(folder) / str(rank)).exists() and worker.exitcode != -9:
                dead.append(f"rank {rank} died with exit code {worker.exitcode}")
        results = [_read(folder, rank) for rank in range(world_size)]
    for rank, (status, value) in enumerate(results):
        if status == "error":
            raise AssertionError(f"rank {rank} raised {value[0]}\n{value[1]}")
    if dead:
        raise AssertionError("; ".join(dead))
    return [value for _, value in results]


def _where(pid: int | None, folder: str, rank: int) -> str:
    """Ask a rank that does not come back what it is doing; the kernel's view helps where Python is not running."""
    if pid is None:
        return "it was not started"
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)
    trace = Path(folder) / f"{rank}.trace"
    kernel = [
        f"{task.name} {(task / 'comm').read_text().strip()} {(task / 'wchan').read_text()}"
        for task in Path(f"/proc/{pid}/task").glob("*")
    ]
    return "\n".join([trace.read_text() if trace.exists() else "it did not begin", *kernel])


def _failed(folder: str, rank: int) -> bool:
    return (Path(folder) / str(rank)).exists() and _read(folder, rank)[0] == "error"


def _read(folder: str, rank: int) -> tuple[str, Any]:
    file = Path(folder) / str(rank)
    return pickle.loads(file.read_bytes()) if file.exists() else ("missing", None)
