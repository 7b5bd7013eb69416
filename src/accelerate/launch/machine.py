"""The facts about this machine that a launch plan needs.

Owns the questions; asks only those that the request leaves open, so that a plain launch starts at once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import SettingError, explain
from ..topology import network
from . import deepspeed, devices, mpirun
from .devices import Devices
from .mpirun import Program
from .request import LaunchRequest


@dataclass(frozen=True)
class Machine:
    """This machine, as far as the request made it matter."""

    python: str
    """The interpreter that runs the script."""
    devices: Devices | None = None
    """The accelerators; `None` when nobody had to know."""
    cores: int = 1
    """Physical cores this process may use."""
    logical_cores: int = 1
    """What `--nproc_per_node cpu` counts."""
    port_is_taken: bool = False
    """Whether somebody listens on the port that was asked for."""
    mpirun: Program | None = None
    """The `mpirun` that was asked for."""
    deepspeed: deepspeed.Found | None = None
    """What DeepSpeed's launcher needs, if it was asked for."""
    address: str | None = None
    """The address under which the other machines of the run see this one, if it can be told."""
    network: Mapping[str, str] = field(default_factory=dict)
    """Variables that lead gloo and NCCL to the network of the run, where they would take another one."""
    visible: str | None = None
    """The devices that the environment shows, where they were looked for; `None` if it does not say."""
    loopback: str | None = None
    """The interface that reaches this machine alone; `None` where the system has another way, or gloo's is chosen."""
    names_interface: bool = False
    """Whether the environment chooses the interface of nccl."""
    rank_variables: tuple[str, ...] = ()
    """The variables in the environment that tell a process which rank of which run it is."""

    @property
    def is_worker(self) -> bool:
        """Whether torch's agent started this process, as one of another run."""
        return "TORCHELASTIC_RUN_ID" in self.rank_variables


def survey(request: LaunchRequest, environ: Mapping[str, str]) -> Machine:
    """Find out what the plan for `request` needs to know.

    Raises:
        SettingError: (a `ValueError`) for a file or folder that cannot be what was asked for.
        LaunchError: If a program that was asked for does not run.
    """
    if request.log_dir is not None:
        _check_folder(request.log_dir, request.describe("log_dir"))
    hosts = request.mpirun_hostfile
    asked, by_other = request.deepspeed, bool(hosts or request.deepspeed)
    needs_one = request.gpu_ids is not None or request.numa_binding is not None
    wants_devices = not request.cpu and (needs_one or (not by_other and request.num_processes != 1))
    far = request.num_machines > 1 and not by_other and request.main_process_ip
    route = network.route_to(request.main_process_ip or "", request.main_process_port or 0) if far else None
    many = request.num_processes not in (None, 1) or request.processes_per_machine is not None or asked
    # Devices that this run names need not be among those that the environment shows.
    names_devices = request.gpu_ids is not None and request.is_for_this_run("gpu_ids")
    around = {name: text for name, text in environ.items() if not (names_devices and name == devices.CUDA_VARIABLE)}
    found = devices.find(around) if wants_devices else None
    return Machine(
        python=sys.executable,
        devices=found,
        visible=environ.get(found.visible) if found and found.visible and not names_devices else None,
        cores=physical_cores() if many or request.num_machines > 1 else 1,
        logical_cores=os.cpu_count() or 1,
        port_is_taken=_asks_for_port(request) and _port_is_taken(request),
        mpirun=mpirun.find(hosts, request.describe("mpirun_hostfile")) if hosts else None,
        deepspeed=deepspeed.find(
            request.deepspeed_multinode_launcher, request.deepspeed_hostfile, request.describe(asked), environ
        )
        if asked
        else None,
        address=route and route.address,
        network=route.variables(environ) if route else {},
        loopback=_loopback() if request.num_processes != 1 and "GLOO_SOCKET_IFNAME" not in environ else None,
        names_interface="NCCL_SOCKET_IFNAME" in environ,
        rank_variables=_rank_variables(environ),
    )


def _check_folder(name: str, described: str) -> None:
    """Refuse a folder that cannot be made, without making it."""
    folder = Path(name).absolute()
    there = next(part for part in (folder, *folder.parents) if os.path.lexists(part))
    if not there.is_dir():
        problem = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} is not writable"
    else:
        return
    raise unusable_folder(described, problem)


def unusable_folder(described: str, problem: str) -> SettingError:
    """Return the error for a folder of logs that cannot be used."""
    return SettingError(
        explain(
            f"{described} cannot be used: {problem}.",
            accepted="a folder, which is made if it does not exist",
            remedy="Pass another --log_dir.",
        )
    )


def _loopback() -> str | None:
    return "lo" if Path("/sys/class/net/lo").exists() else None


_TORCHRUN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
"""What torchrun sets for a worker. Variables of MPI launchers are none of these: `mpirun accelerate launch` works."""


def _rank_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    # Without a rank beside it the address is for MPI, which has none of its own.
    meeting = ("MASTER_ADDR", "MASTER_PORT") if "RANK" in environ else ()
    return tuple(name for name in (*_TORCHRUN, *meeting) if name in environ)


def _asks_for_port(request: LaunchRequest) -> bool:
    by_other = request.mpirun_hostfile is not None or request.deepspeed is not None
    return bool(request.main_process_port) and request.machine_rank == 0 and not by_other


def physical_cores() -> int:
    """Count the physical cores that this process may run on; at least one."""
    import psutil

    present = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return max(1, min(present, allowed))


def _port_is_taken(request: LaunchRequest) -> bool:
    try:
        return not is_port_free(request.main_process_port or 0)
    except PermissionError:
        raise SettingError(
            explain(
                f"{request.describe('main_process_port')} is a port on which this user may not listen.",
                accepted="a port from 1024 on; those below are the system's on most machines",
                remedy="Pass another --main_process_port.",
            )
        ) from None


def is_port_free(port: int) -> bool:
    """Tell whether a server could listen on `port` of all addresses of this machine now.

    Raises:
        PermissionError: If this user may not use the port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store does it: a port that only waits for its last packets counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise
        except OSError:
            return False
    return True
