"""Join the process group, and leave it.

Owns the life of the group. The only code that calls `init_process_group`.

[Note: breaking off] A rank that gives up in the middle of its work leaves the others inside a collective, where they
wait for as long as the group's timeout. They come out at once when its connections close. Torch has no call for that
with gloo: `abort()` and `shutdown()` leave the connections open, and destroying the group closes them only once nobody
holds the group, which a DDP model that is still referred to does. But gloo closes all connections of a group in which
a wait ran out of time; so a rank breaks off by waiting a millisecond for a message that nobody sends. The ranks that
come out do the same, since a collective may join them to this rank only through others. The store in which the ranks
found each other is none of the group's, so they meet there and make the group anew.

NCCL is another matter: its collectives run on the device, a rank inside one is not stopped by closed connections, and
aborting communicators races with torch's watchdog. There a group is never broken off.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..core.errors import LaunchError, SettingError, explain
from ..core.last_words import LAUNCHER_VARIABLE, NOTE_FILE_VARIABLE
from ..settings import env
from . import network
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

    Raises:
        LaunchError: (a `RuntimeError`) if the address where they meet is unknown, unreachable or another program's.
    """
    if process.source == "attached":
        return
    if timeout is not None:
        options["timeout"] = timeout
    if init_method is not None:
        options.update(init_method=init_method, rank=process.rank, world_size=process.world_size)
    else:
        if backend != "mpi":  # which knows its ranks by itself
            _find_first(process, timeout or dist.distributed_c10d.default_pg_timeout)
        _announce(process)
        _choose_network(process)
    dist.init_process_group(backend=backend, **options)
    _note_failures()


def _note_failures() -> None:
    # Torch's agent names the rank that failed first by the time in the file it gave each rank. Without a note there,
    # the ranks that fell because another one had gone are hard to tell from it.
    # Our own launcher is told from the first import on, by `core.last_words`.
    if env.get(NOTE_FILE_VARIABLE) is None or env.get(LAUNCHER_VARIABLE) is not None:
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


def meeting_store() -> Any:
    """Return the store in which the ranks found each other. It outlives the groups made over it."""
    return dist.distributed_c10d._get_default_store()


def group_timeout() -> timedelta:
    """Return how long the ranks of the default group wait for each other."""
    for backend in _backends(dist.distributed_c10d._get_default_group()):
        limit = getattr(getattr(backend, "options", None), "_timeout", None)
        if limit is not None:
            return limit
    return dist.distributed_c10d.default_pg_timeout


def can_break_off() -> bool:
    """Tell whether all groups can be left in the middle of collectives. See [Note: breaking off]."""
    gloo = getattr(dist, "ProcessGroupGloo", None)  # absent where torch was built without it
    return all(type(backend) is gloo for backend in _all_backends())


def break_off() -> None:
    """Close the connections of all groups, so that ranks inside a collective with this one come out with an error.

    Blocks for a millisecond. See [Note: breaking off].
    """
    for backend in _all_backends():
        # Several network devices make several sets of connections, over which messages are spread by their tags.
        sets = len(getattr(backend.options, "_devices", None) or [None])
        others = [peer for peer in range(backend.size()) if peer != backend.rank()]
        for peer, tag in itertools.product(others, range(_NOBODY_SENDS, _NOBODY_SENDS + sets)):
            try:
                backend.recv([torch.empty(1)], peer, tag).wait(timedelta(milliseconds=1))
            except RuntimeError:  # it ran out of time, which closes the connections; or they were closed already
                continue


def join_again(store: Any, name: str) -> None:
    """Make the default group anew, with the same ranks and options; other groups are gone.

    Called on all ranks; collective. Blocks until every rank has come.

    Args:
        store: What `meeting_store` returned.
        name: The same on all ranks, and new each time.
    """
    backend, limit, rank, world_size = group_backend(), group_timeout(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = dist.distributed_c10d.PrefixStore(name, store)
    dist.init_process_group(backend, store=store, timeout=limit, rank=rank, world_size=world_size)


def collectives_begun() -> list[int] | None:
    """Return how many collectives this rank has begun, for each backend of each group; `None` if one does not count.

    Where all ranks have begun the same number, none of them waits for another one.
    """
    try:
        return [backend._get_sequence_number_for_group() for backend in _all_backends()]
    except RuntimeError:  # how torch says that a backend does not count
        return None


_NOBODY_SENDS = 2**30
"""A tag of messages that are never sent."""


def _all_backends() -> list[Any]:
    return [backend for group in dist.distributed_c10d._world.pg_map for backend in _backends(group)]


def _backends(group: Any) -> list[Any]:
    # One backend may serve several kinds of devices.
    found = {id(backend): backend for backend in map(group._get_backend, group._device_types)}
    return list(found.values())


def _find_first(process: Process, limit: timedelta) -> None:
    # Before torch looks for it, which prints pages meanwhile and gives up only after the group's time limit. A launcher
    # that serves the store has done so for its ranks.
    if process.address is None or process.world_size == 1 or serves_store():
        return
    host, _, port = process.address.rpartition(":")
    origin = "MASTER_ADDR in the environment" if env.get("MASTER_ADDR") else f"the variables of {process.source}"
    described = f"The address comes from {origin}"
    if process.rank == 0:
        network.wait_until_own(host, int(port), described, may_be_served=True)
    else:
        # One of each machine says it; on that of rank 0, rank 1.
        speaker = "" if process.local_rank and process.rank != 1 else f"accelerate, rank {process.rank}"
        network.wait_until_reachable(host, int(port), described, limit.total_seconds(), speaker=speaker)


def _choose_network(process: Process) -> None:
    # Our launcher has done so for its workers; others leave it to the name of the machine.
    host, _, port = (process.address or "").rpartition(":")
    if process.local_world_size < process.world_size and host:
        route = network.route_to(host, int(port))
        for name, value in (route.variables(env.read()) if route else {}).items():
            env.announce(name, value)


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


def join_store(process: Process, limit: timedelta) -> Any:
    """Join the store in which the ranks of a run meet, and no group. Called on all ranks; keys are this caller's own.

    Where nobody else serves it, rank 0 does, as long as it keeps it.

    Raises:
        LaunchError: (a `RuntimeError`) if nobody serves it within `limit`.
    """
    _find_first(process, limit)
    _announce(process)
    host, _, port = (process.address or "127.0.0.1:29500").rpartition(":")
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host,
            int(port),
            is_master=process.rank == 0 and not serves_store(),
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise LaunchError(
            explain(
                f"Rank {process.rank} cannot reach {host}:{port}, where the ranks are to meet: "
                f"{str(error).splitlines()[0]}",
                remedy="Check that rank 0 runs, that the name leads to its address, and that the port is open there.",
            )
        ) from error
    return dist.distributed_c10d.PrefixStore(f"accelerate/alone/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def serves_store() -> bool:
    """Tell whether a launcher serves the store of this run, and not rank 0."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def make_group(store: Any, name: str, *, rank: int, world_size: int, backend: str, limit: timedelta) -> None:
    """Make a default group of some ranks, over a store that they have joined. Collective among these."""
    store = dist.distributed_c10d.PrefixStore(name, store)
    dist.init_process_group(backend, store=store, timeout=limit, rank=rank, world_size=world_size)


def leave_group(*, stuck: bool = False) -> None:
    """Leave the default group; `stuck` gives up what is still on its way."""
    if stuck and not can_break_off():
        dist.distributed_c10d._abort_process_group()
    else:
        disconnect()
