"""Join the process group, and leave it.

Owns the life of the group. The only code that calls `init_process_group`.
"""

from __future__ import annotations

import ctypes
import sys
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..core.errors import SettingError, explain
from ..settings import env
from .process import Process


def existing_group() -> tuple[int, int] | None:
    """Return (rank, world size) in the default group, if one exists."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.get_rank(), dist.get_world_size()


def group_backend() -> str:
    """Return the backend of the default group, as torch names it."""
    return dist.get_backend()


def choose_backend(requested: str | None, device_name: str, device_backend: str | None) -> str:
    """Return the backend string for torch.

    An accelerator's group carries gloo as well, so that objects and tensors on the CPU travel without a detour
    over device memory.

    Args:
        requested: What the user asked for; `None` for the device's own.
        device_name: Torch device type, such as `"cuda"`.
        device_backend: The backend of that family, such as `"nccl"`.

    Raises:
        SettingError: (a `ValueError`) if a CPU run is asked to use a backend that only moves device memory.
    """
    on_cpu = device_name == "cpu"
    if requested is None or (requested == device_backend and not on_cpu):
        device_backend = device_backend or _default_backend(device_name)
        if on_cpu or device_backend == "gloo":
            return "gloo"
        return f"cpu:gloo,{device_name}:{device_backend}"
    if on_cpu and requested.removeprefix("cpu:") not in ("gloo", "mpi"):
        raise SettingError(
            explain(
                f"backend={requested!r} cannot serve processes on the CPU.",
                accepted=("gloo", "mpi"),
                remedy="Leave the backend out, or run on its device.",
            )
        )
    return requested


def _default_backend(device_name: str) -> str:
    try:
        return dist.get_default_backend_for_device(device_name)
    except (ValueError, RuntimeError):
        raise SettingError(
            explain(
                f"Torch knows no backend for several processes on {device_name!r} devices.",
                accepted="a backend that its vendor names",
                remedy="Pass kwargs_handlers=[InitProcessGroupKwargs(backend=...)], or start one process.",
            )
        ) from None


def connect(
    process: Process,
    *,
    backend: str,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    **options: Any,
) -> None:
    """Join the other processes. Called on all ranks. Collective; blocks until every rank has come.

    Does nothing when the group exists already.
    """
    if process.source == "attached":
        return
    if timeout is not None:
        options["timeout"] = timeout
    if init_method is not None:
        options.update(init_method=init_method, rank=process.rank, world_size=process.world_size)
    else:
        _announce(process)
    dist.init_process_group(backend=backend, **options)
    _note_failures()


def _note_failures() -> None:
    # Torch's agent names the rank that failed first by the time in the file it gave each rank. Without a note there,
    # the ranks that fell because another one had gone are hard to tell from it.
    if env.get("TORCHELASTIC_ERROR_FILE") is None:
        return
    before = sys.excepthook

    def note(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise error  # what is recorded is the exception being handled, and none is by now
        except kind as handled:
            get_error_handler().record_exception(handled)
        before(kind, error, traceback)

    sys.excepthook = note


def disconnect(group: Any = None) -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group(group)


def abandon() -> None:
    """Let all groups live until the process ends, so that nothing waits for their unfinished work.

    The end of the interpreter would otherwise destroy them one by one, and each of them waits for its work.
    """
    if dist.is_available() and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            # A reference that nobody gives back; the end of the interpreter clears every other kind.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _announce(process: Process) -> None:
    # Torch's rendezvous reads these; MPI launchers do not set them.
    host, _, port = (process.address or "127.0.0.1:29500").rpartition(":")
    values = {
        "RANK": process.rank,
        "WORLD_SIZE": process.world_size,
        "LOCAL_RANK": process.local_rank,
        "LOCAL_WORLD_SIZE": process.local_world_size,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    for name, value in values.items():
        env.announce(name, str(value))
