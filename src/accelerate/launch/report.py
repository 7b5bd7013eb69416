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

HEAD_LINES, TAIL_LINES = 40, 160
"""How much of a long traceback is shown: where it began, and where it ended."""
NAMED_LINES = 4
"""How many lines are spent on the other ranks."""


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
    summary: str = ""
    """The gist of that; the last line of the traceback, unless the exception said more."""
    host: str = ""
    """The machine it ran on; empty for this one."""
    log: str | None = None
    """The file that has its output."""
    kind: str = ""
    """`lost` if it fell because another rank had, `ended` if the launcher ended it; empty for a failure of its own."""

    @property
    def ending(self) -> str:
        """How it ended, in words: `was ended by SIGKILL`, `exited with code 3`."""
        if self.exitcode >= 0:
            return f"exited with code {self.exitcode}"
        return f"was ended by {_signal_name(-self.exitcode)}"


class WorkersFailed(LaunchError):
    """One or more processes of a run ended badly.

    Args:
        message: The report.
        status: What the launcher exits with.
        traceback: What a worker said itself, as it stands in the report.
    """

    def __init__(self, message: str, status: int, traceback: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.traceback = traceback

    def shown(self, *, quiet: bool) -> str:
        """Return what is printed of it: with `quiet`, what the worker said alone."""
        return self.traceback if quiet else str(self)

    def _render_traceback_(self) -> list[str]:
        """Say what a notebook shows: the worker's traceback, and none of the launcher's own lines around it."""
        return str(self).splitlines()

    @classmethod
    def alone(cls, argv: Sequence[str], status: int) -> Self:
        """Describe a run of one process."""
        return cls(f"accelerate: {' '.join(argv)} {Failure(0, 0, status).ending}", exit_status(status))

    @classmethod
    def among(cls, failures: Sequence[Failure], world_size: int, gone: Sequence[int] = (), *, silent: str = "") -> Self:
        """Describe a run of several processes. The arguments are those of `describe`."""
        said = describe(failures, world_size, gone, silent=silent)
        return cls(said, exit_status(failures[0].exitcode), "\n".join(_traceback(failures[0])))


class RunPreempted(WorkersFailed):
    """A run was asked to end, saved itself and is to be started again. Nothing has failed."""

    def __init__(self, told: str) -> None:
        super().__init__(f"accelerate: {told}", PREEMPTED_STATUS)


def exit_status(exitcode: int) -> int:
    """Return the status a shell would show for a child's exit code."""
    return exitcode if exitcode >= 0 else 128 - exitcode


def describe(failures: Sequence[Failure], world_size: int, gone: Sequence[int] = (), *, silent: str = "") -> str:
    """Say which rank failed, how, and what it wrote; the most telling line comes last.

    When several workers failed between two looks of the launcher and left no time, their order is not known: all of
    them are named. Those the launcher itself ended are not.

    Args:
        failures: All that failed, the first one first.
        world_size: How many processes the run had.
        gone: Ranks that had ended well before; the others may have waited for them.
        silent: The address where the machines met, if nobody answers there any more.
    """
    first = failures[0]
    lines = _others(failures[1:])
    if first.kind == "lost" and gone:
        lines.append(f"accelerate: {_ranks(gone)} had ended before, with code 0: did a loop end early there?")
    if silent:
        lines.append(f"accelerate: {silent}, where the machines meet, does not answer: has that machine gone?")
    lines += _traceback(first)
    facts = [*([] if first.pid is None else [f"pid {first.pid}"]), f"on {first.host or socket.gethostname()}"]
    log = f", log {first.log}" if first.log else ""
    lines.append(f"accelerate: rank {first.rank} of {world_size} ({' '.join(facts)}{log}) {first.ending}{_hint(first)}")
    return "\n".join(lines)


def _traceback(failure: Failure) -> list[str]:
    return [f"[rank {failure.rank}] {line}" for line in _shortened(failure.traceback.rstrip().splitlines())]


def _others(others: Sequence[Failure]) -> list[str]:
    """Fold the failures beside the first one: what is alike is one line."""
    groups: dict[str, list[Failure]] = {}
    for other in others:
        if other.kind != "ended" and other.exitcode != -signal.SIGTERM:
            groups.setdefault("lost" if other.kind == "lost" else f"{other.ending}{_gist(other)}", []).append(other)
    lines = []
    for what, alike in sorted(groups.items(), key=lambda item: item[0] != "lost"):
        pid = _pid(alike[0]) if len(alike) == 1 else ""
        ranks = _ranks([other.rank for other in alike])
        said = "fell because another rank had gone" if what == "lost" else what
        lines.append(f"accelerate: also, {ranks}{pid} {said}")
    if len(lines) > NAMED_LINES:
        left = len(lines) - NAMED_LINES
        lines = [f"accelerate: also, {left} further kinds of failure on other ranks", *lines[left:]]
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    """Name ranks: `rank 3`, `ranks 1, 2 and 5`, `ranks 1-7`, or how many there are."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    if len(ranks) == 1:
        return f"rank {parts[0]}"
    if len(parts) > _MANY:
        return f"{len(ranks)} ranks ({', '.join(parts[:_MANY])}, ...)"
    return f"ranks {', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else f"ranks {parts[0]}"


_MANY = 8


def _shortened(lines: list[str]) -> list[str]:
    left = len(lines) - HEAD_LINES - TAIL_LINES
    if left <= 1:
        return lines
    return [*lines[:HEAD_LINES], f"... {left} lines ...", *lines[-TAIL_LINES:]]


def _pid(failure: Failure) -> str:
    return "" if failure.pid is None else f" (pid {failure.pid})"


def _gist(failure: Failure) -> str:
    last = failure.traceback.rstrip().splitlines()[-1:]
    gist = failure.summary or (last[0].strip() if last else "")
    return f": {gist}" if gist else ""


def _hint(failure: Failure) -> str:
    if failure.exitcode == -getattr(signal, "SIGKILL", 9):
        return ": on Linux this is most often the system running out of memory (see `dmesg`)."
    if failure.exitcode < 0:
        return "; where it was stands above." if failure.traceback else "."
    if failure.traceback:
        return _gist(failure)
    return "; what it printed stands above."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
