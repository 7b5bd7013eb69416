"""The process-wide runtime: who this process is, on what it computes and how it talks.

The only place where process-wide state is created and reset. Decided once, at the first `PartialState` or
`Accelerator`; nothing afterwards asks what kind of machine this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch

from .. import hardware, topology
from ..collectives import (
    CheckedCollectives,
    Collectives,
    SingleProcess,
    TorchCollectives,
)
from ..core.enums import DistributedType
from ..core.errors import NotStarted, SettingError, explain
from ..hardware import Hardware, affinity
from ..settings import env
from ..topology import Process, connect
from .departure import leave_cleanly_at_exit


@dataclass(frozen=True)
class Runtime:
    """What was found when this process started. Immutable."""

    process: Process
    hardware: Hardware
    collectives: Collectives
    device: torch.device
    distributed_type: DistributedType
    backend: str | None
    debug: bool
    fork_launched: bool
    on_cpu_by_choice: bool


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """What the user said about devices and groups."""

    cpu: bool = False
    backend: str | None = None
    timeout: timedelta | None = None
    init_method: str | None = None
    group_options: Mapping[str, Any] = field(default_factory=dict)


SHARED: dict[str, Any] = {}
"""The state that all `PartialState` instances share; empty exactly when nothing has been started."""


def is_started() -> bool:
    """Tell whether the runtime exists."""
    return "_runtime" in SHARED


def current() -> Runtime:
    """Return the runtime.

    Raises:
        NotStarted: (an `AttributeError`) if there is none.
    """
    found = SHARED.get("_runtime")
    if found is None:
        raise NotStarted(
            explain(
                "The process state does not exist: it was not created yet, or was reset.",
                remedy="Create an Accelerator() or a PartialState() first.",
            )
        )
    return found


def current_or_single() -> Runtime:
    """Return the runtime; if there is none, start it where a launcher started this process beside others.

    A process that is alone gets a runtime that is not kept, so that an `Accelerator` can still choose another one.
    """
    if "_runtime" in SHARED:
        return SHARED["_runtime"]
    environ = env.read()
    if topology.detect(environ).is_distributed:
        return start(ProcessSettings())
    family, device = _choose_hardware(env.flag(environ, "ACCELERATE_USE_CPU"), environ)
    return _single(family, _device(family, device), environ)


def detected_process() -> Process:
    """Return who this process is, also before it joins the others."""
    return current().process if is_started() else topology.detect(env.read())


def start(settings: ProcessSettings) -> Runtime:
    """Create the runtime, or return it if it exists. Called on all ranks; collective when there are several."""
    if is_started():
        return current()
    environ = env.read()
    cpu = settings.cpu or env.flag(environ, "ACCELERATE_USE_CPU")
    family, device_named = _choose_hardware(cpu, environ)
    process = topology.detect(environ)
    if not process.is_distributed:
        device = _device(family, device_named)
        family.select(device)
        runtime = _single(family, device, environ, cpu)
    else:
        runtime = _join(process, family, device_named, settings, environ, cpu)
    SHARED.update(
        _runtime=runtime,
        _cpu=cpu,
        backend=runtime.backend,
        debug=runtime.debug,
        device=runtime.device,
        distributed_type=runtime.distributed_type,
        fork_launched=runtime.fork_launched,
        local_process_index=process.local_rank,
        num_processes=process.world_size,
        process_index=process.rank,
    )
    return runtime


def reset() -> None:
    """Forget the runtime. The process group, if any, stays."""
    SHARED.clear()


def _choose_hardware(cpu: bool, environ: Mapping[str, str]) -> tuple[Hardware, torch.device | None]:
    named_device = environ.get("ACCELERATE_TORCH_DEVICE")
    if cpu:
        return hardware.CPU, None
    if named_device:
        return hardware.of(named_device, "from ACCELERATE_TORCH_DEVICE"), torch.device(named_device)
    return hardware.detect(), None


def _device(family: Hardware, named: torch.device | None, index: int | None = None) -> torch.device:
    return family.device(index) if named is None or (named.index is None and family.module is not None) else named


def _own_index(process: Process, family: Hardware, named: torch.device | None, environ: Mapping[str, str]) -> int:
    """Return the index of this process's device among those it sees."""
    several = process.local_world_size > 1 and process.source != "attached"  # Ray names each process's own
    if named is not None and named.index is not None and family.needs_placement and several:
        raise SettingError(
            explain(
                f"ACCELERATE_TORCH_DEVICE={named} would put all {process.local_world_size} processes of this machine on "
                "one device.",
                accepted=f"{named.type!r}, from which each process takes its own",
                remedy="Leave the index out, or start one process.",
            )
        )
    # Schedulers such as Slurm, and Ray, let each process see its own device only.
    sees_its_own = family.visible_devices in environ and family.count() == 1
    return 0 if sees_its_own else process.local_rank


def _single(
    family: Hardware,
    device: torch.device,
    environ: Mapping[str, str],
    cpu: bool = False,
) -> Runtime:
    return Runtime(
        process=Process(),
        hardware=family,
        collectives=SingleProcess(),
        device=device,
        distributed_type=DistributedType.NO,
        backend=None,
        debug=env.flag(environ, "ACCELERATE_DEBUG_MODE"),
        fork_launched=env.flag(environ, "FORK_LAUNCHED"),
        on_cpu_by_choice=cpu,
    )


def _join(
    process: Process,
    family: Hardware,
    device_named: torch.device | None,
    settings: ProcessSettings,
    environ: Mapping[str, str],
    cpu: bool,
) -> Runtime:
    device = _device(family, device_named, _own_index(process, family, device_named, environ))
    family.select(device)
    if env.flag(environ, "ACCELERATE_CPU_AFFINITY"):
        affinity.set_numa_affinity(process.local_rank)
    else:
        _share_cores(process, environ)
    connect.connect(
        process,
        backend=connect.choose_backend(settings.backend, family.name, family.backend),
        timeout=settings.timeout,
        init_method=settings.init_method,
        **settings.group_options,
    )
    leave_cleanly_at_exit(process)
    collectives: Collectives = TorchCollectives(device)
    if process.source != "attached":
        # A rank that is done at once would leave while others still join, and these would fail.
        collectives.barrier()
    debug = env.flag(environ, "ACCELERATE_DEBUG_MODE")
    if debug:
        collectives = CheckedCollectives(collectives)
    return Runtime(
        process=process,
        hardware=family,
        collectives=collectives,
        device=device,
        distributed_type=family.label,
        backend=connect.group_backend() if process.source == "attached" else settings.backend or family.backend,
        debug=debug,
        fork_launched=env.flag(environ, "FORK_LAUNCHED"),
        on_cpu_by_choice=cpu,
    )


def _share_cores(process: Process, environ: Mapping[str, str]) -> None:
    # Left alone, each process would start one thread per core, and they would fight over the cores.
    if "OMP_NUM_THREADS" in environ or process.source == "attached" or process.local_world_size == 1:
        return
    cores = psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(max(1, cores // process.local_world_size))
