"""The processes of a run on this machine: the workers, and whatever they have started.

Owns how they are found and ended, and the guard: a small process that ends them when the launcher itself is killed.
This file is the guard's whole program too, so it imports nothing but the standard library.

[Note: who belongs to a run] Workers are told by their process ids. What they started is found in three ways: it
descends from one of them; or it is in the session of one, which torch makes for each worker and which outlives it; or
it inherited the run's mark, a variable with the name of the run's own folder. A process that left its parent, its
session and its environment behind wanted to go its own way, and is let go. Elsewhere than on Linux only process
groups are known.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GUARD_GRACE_SECONDS = 2.0
"""How long orphaned processes may take to end after SIGTERM."""
_LOOK_SECONDS = 0.5
_ROUNDS = 4
"""How often SIGKILL is sent: one that waits inside the kernel, or belongs to somebody else, cannot be waited for."""
_PROC = Path("/proc")


@dataclass(frozen=True)
class Kin:
    """One process, as the kernel shows it."""

    pid: int
    parent: int
    session: int
    since: str
    """When it began; with the id, this tells it from a later process of the same id."""


def look(pid: int) -> Kin | None:
    """Return what a process is now; `None` if it has ended, or the system does not say."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    if fields[0] in "ZX":
        return None
    return Kin(pid, int(fields[1]), int(fields[3]), fields[19])


class Family:
    """The processes of one run.

    Args:
        mark: `NAME=beginning of the value`: the variable by which whatever the workers start is known.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.workers: dict[int, str] = {}
        """Process id -> when it began; empty text where the system does not say."""

    def add(self, pids: Iterable[int]) -> None:
        """Count further processes as workers."""
        for pid in pids:
            known = look(pid)
            self.workers[pid] = known.since if known else ""

    def members(self) -> set[int]:
        """Return the ids of all processes of the run that live."""
        if not _PROC.joinpath("self").exists():
            return {pid for pid in self.workers if _exists(pid)}
        alive = {kin.pid: kin for name in os.listdir(_PROC) if name.isdecimal() and (kin := look(int(name)))}
        # The number of a worker that has ended is free again once its session is empty.
        ours = {pid for pid, since in self.workers.items() if pid not in alive or alive[pid].since == since}
        found = {kin.pid for kin in alive.values() if kin.pid in ours or kin.session in ours or self._marked(kin.pid)}
        children: dict[int, list[int]] = {}
        for kin in alive.values():
            children.setdefault(kin.parent, []).append(kin.pid)
        waiting = list(found)
        while waiting:
            further = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
            found.update(further)
            waiting += further
        return found - {os.getpid()}

    def _marked(self, pid: int) -> bool:
        try:
            variables = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:  # it has ended, or is not ours to read
            return False
        return b"\0" + os.fsencode(self.mark) in b"\0" + variables

    def end(self, seconds: float) -> set[int]:
        """Ask all that is left of the run to end, then end it. Blocks; return what was left."""
        left = found = self.members()
        if found:
            send(found, signal.SIGTERM)
            left = self.wait(seconds)
        for _ in range(_ROUNDS):  # what is forked meanwhile is found in the next one
            if not left:
                break
            send(left, signal.SIGKILL)
            left = self.wait(_LOOK_SECONDS)
        return found

    def wait(self, seconds: float) -> set[int]:
        """Wait until no process of the run lives, at most so long; return those that do."""
        deadline = time.monotonic() + seconds
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def send(pids: Iterable[int], number: int, *, groups: bool = True) -> None:
    """Send a signal to processes, and to the groups that they lead unless told not to; those that have ended are left out."""
    for pid in pids:
        try:
            if groups and hasattr(os, "killpg") and os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def lead() -> None:
    """Begin a session in a worker that runs a function, as scripts get one: what it starts is known by it."""
    with suppress(OSError, AttributeError):  # it leads one already; or there are none on this system
        os.setsid()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


# The guard -------------------------------------------------------------------------------------------------------------


def keep_guard(launcher: int, mark: str, folder: str) -> None:
    """Wait until the launcher has gone, then end what it started and remove its folder.

    Standard input carries the workers' ids, a line for each: `pid since`. The launcher kills the guard when it ends in
    an orderly way. An end of the input is not waited for alone: a forked worker holds the other end too.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    family, told, open_ = Family(mark), b"", True
    while os.getppid() == launcher:
        if not open_:
            time.sleep(_LOOK_SECONDS)
        elif select.select([0], [], [], _LOOK_SECONDS)[0]:
            news = os.read(0, 65536)
            told, open_ = told + news, bool(news)
    for line in told.decode().splitlines():
        pid, _, since = line.partition(" ")
        family.workers[int(pid)] = since
    ended = family.end(GUARD_GRACE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    if ended:
        with suppress(OSError):  # whoever read the launcher's messages may have gone with it
            print(f"accelerate: the launcher (pid {launcher}) is gone; its processes were ended", file=sys.stderr)


if __name__ == "__main__":
    keep_guard(int(sys.argv[1]), sys.argv[2], sys.argv[3])
