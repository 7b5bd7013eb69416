"""What the user reads when a run failed: the first rank that failed, last on the screen.

Owns the words. Imports no torch; `launch.elastic` fills in the facts.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ..core.errors import LaunchError
from ..core.leaving import PREEMPTED_STATUS

TRACEBACK_LINES = 30
"""How much of a worker's traceback is repeated."""


@dataclass(frozen=True)
class Failure:
    """One worker that ended badly."""

    rank: int
    pid: int | None
    """`None` if nobody saw the process end."""
    exitcode: int
    """As Python gives it: below zero for a signal."""
    traceback: str = ""
    """What the worker wrote about its exception, if it did."""

    @property
    def ending(self) -> str:
        """How it ended, in words: `was ended by SIGKILL`, `exited with code 3`."""
        if self.exitcode >= 0:
            return f"exited with code {self.exitcode}"
        return f"was ended by {_signal_name(-self.exitcode)}"


class WorkersFailed(LaunchError):
    """One or more processes of a run ended badly. `status` is what the launcher exits with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def alone(cls, argv: Sequence[str], status: int) -> Self:
        """Describe a run of one process."""
        return cls(f"accelerate: {' '.join(argv)} {Failure(0, 0, status).ending}", exit_status(status))

    @classmethod
    def among(cls, failures: Sequence[Failure], world_size: int) -> Self:
        """Describe a run of several processes.

        Args:
            failures: Those that failed, the first one first.
            world_size: How many processes the run had.
        """
        return cls(describe(failures, world_size), exit_status(failures[0].exitcode))


class RunPreempted(WorkersFailed):
    """A run was asked to end, saved itself and is to be started again. Nothing has failed."""

    def __init__(self, told: str) -> None:
        super().__init__(f"accelerate: {told}", PREEMPTED_STATUS)


def exit_status(exitcode: int) -> int:
    """Return the status a shell would show for a child's exit code."""
    return exitcode if exitcode >= 0 else 128 - exitcode


def describe(failures: Sequence[Failure], world_size: int) -> str:
    """Say which rank failed, how, and what it wrote; the most telling line comes last.

    When several workers failed between two looks of the launcher and left no time, their order is not known: all of
    them are named. Those the launcher itself ended are not.
    """
    first = failures[0]
    lines = []
    if first.traceback:
        kept = first.traceback.rstrip().splitlines()[-TRACEBACK_LINES:]
        lines += [f"[rank {first.rank}] {line}" for line in kept]
    others = [other for other in failures[1:] if other.exitcode != -signal.SIGTERM]
    lines += [f"accelerate: also, rank {other.rank}{_pid(other)} {other.ending}" for other in reversed(others)]
    pid = "" if first.pid is None else f"pid {first.pid} "
    where = f"rank {first.rank} of {world_size} ({pid}on {socket.gethostname()})"
    lines.append(f"accelerate: {where} {first.ending}{_hint(first)}")
    return "\n".join(lines)


def _pid(failure: Failure) -> str:
    return "" if failure.pid is None else f" (pid {failure.pid})"


def _hint(failure: Failure) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return ": on Linux this is most often the system running out of memory (see `dmesg`)."
    if failure.traceback:
        return f": {failure.traceback.rstrip().splitlines()[-1]}"
    return "; what it printed stands above." if failure.exitcode > 0 else "."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
