"""The facts about this machine that a launch plan needs.

Owns the questions; asks only those that the request leaves open, so that a plain launch starts at once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from . import devices
from .devices import Devices
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
    port_is_taken: bool = False
    """Whether somebody listens on the port that was asked for."""
    rank_variables: tuple[str, ...] = ()
    """The variables in the environment that tell a process which rank of which run it is."""

    @property
    def is_worker(self) -> bool:
        """Whether torch's agent started this process, as one of another run."""
        return "TORCHELASTIC_RUN_ID" in self.rank_variables


def survey(request: LaunchRequest, environ: Mapping[str, str]) -> Machine:
    """Find out what the plan for `request` needs to know."""
    wants_devices = not request.cpu and (request.num_processes != 1 or request.gpu_ids is not None)
    many = request.num_processes not in (None, 1)
    return Machine(
        python=sys.executable,
        devices=devices.find(environ) if wants_devices else None,
        cores=physical_cores() if many or request.num_machines > 1 else 1,
        port_is_taken=_asks_for_port(request) and not is_port_free(request.main_process_port or 0),
        rank_variables=_rank_variables(environ),
    )


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
    return bool(request.main_process_port) and request.machine_rank == 0


def physical_cores() -> int:
    """Count the physical cores that this process may run on; at least one."""
    import psutil

    present = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return max(1, min(present, allowed))


def is_port_free(port: int) -> bool:
    """Tell whether a server could listen on `port` of all addresses of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store does it: a port that only waits for its last packets counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
