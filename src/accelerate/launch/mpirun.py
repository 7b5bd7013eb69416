"""The command with which `mpirun` starts the processes of a run.

Owns what the families of `mpirun` call their options. Starts nothing but `mpirun --version`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import LaunchError, SettingError, explain

_VERSION_SECONDS = 20


@dataclass(frozen=True)
class Program:
    """The `mpirun` of this machine, and the hosts it is to use."""

    is_open_mpi: bool
    """Open MPI and those made from it; all others descend from MPICH."""
    first_host: str | None = None

    def command(self, hostfile: str, processes: int, per_node: int | None, env: Mapping[str, str]) -> tuple[str, ...]:
        """Return the words that run a command, which follows them, in all processes.

        Args:
            hostfile: The file that names the hosts.
            processes: How many processes there are on all hosts.
            per_node: How many each host gets; `None` leaves it to the file.
            env: Variables that the processes get on all hosts.
        """
        count = ("-np", str(processes))
        if self.is_open_mpi:
            spread = ("--map-by", f"ppr:{per_node}:node") if per_node else ()
            passed = [word for name, value in sorted(env.items()) for word in ("-x", f"{name}={value}")]
            return ("mpirun", *count, "--hostfile", hostfile, *spread, *passed)
        spread = ("-ppn", str(per_node)) if per_node else ()
        passed = [word for name, value in sorted(env.items()) for word in ("-genv", name, value)]
        return ("mpirun", *count, "-f", hostfile, *spread, *passed)


def find(hostfile: str, described: str) -> Program:
    """Ask this machine for its `mpirun`, and read the hosts.

    Args:
        hostfile: The file that names the hosts.
        described: The same with its origin, for errors.

    Raises:
        SettingError: (a `ValueError`) if there is no such file, or it names no host.
        LaunchError: If there is no `mpirun` that runs.
    """
    try:
        text = Path(hostfile).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            explain(f"{described} cannot be read: {error}.", accepted="a file that names one host on each line")
        ) from None
    words = [line.split("#")[0].split() for line in text.splitlines()]
    hosts = [line[0].partition(":")[0] for line in words if line]
    if not hosts:
        raise SettingError(explain(f"{described} names no host.", accepted="a file that names one host on each line"))
    try:
        asked = subprocess.run(
            ["mpirun", "--version"],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = getattr(error, "strerror", None) or f"no answer within {_VERSION_SECONDS} s"
        raise LaunchError(
            explain(
                f"{described} asks for mpirun, which cannot be run: {problem}.",
                remedy="Install Open MPI, MPICH or Intel MPI (on Debian: apt-get install openmpi-bin), or leave it out.",
            )
        ) from None
    told = asked.stdout + asked.stderr
    return Program("Open MPI" in told or "open-mpi" in told or "PRTE" in told, hosts[0])
