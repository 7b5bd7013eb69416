"""Let the threads of gloo come to rest before the interpreter ends, and leave the process group.

[Note: the abort at exit] A collective wakes its caller as soon as the result is there; the gloo thread that ran it
(`pt_gloo_runloop`) lets go of the work a moment later. That work holds Python objects: the tensors it moved and, if
`backward()` started it, the context that torch keeps for the backward pass. To release them the thread asks for the
GIL. If the interpreter has begun to finalise meanwhile, CPython (before 3.14) answers by ending the thread; the
unwinding meets a destructor that must not throw, and the process aborts (SIGABRT) after all its work is done.

Destroying the group does not help: a DDP model, a group in a user's variable or a work handle keeps the threads
alive. What does help is to begin finalising only when each of these threads has released its work and waits for the
next one. A thread that does so sleeps in the kernel without a deadline; one that runs, wants the GIL (asks again
every 5 ms) or is inside a collective (has the group's timeout) does not. Linux shows which of them it is, so nothing
is guessed and the usual wait is a millisecond. The exit status is not touched.

A collective that will never end, because this rank failed while another one is still awaited, would keep the exit
waiting for as long as the group's timeout: destroying a group waits for its work. After `PATIENCE_SECONDS` the groups
are therefore left as they are until the process is gone, which tells the other ranks at once.

Numbers and the proof: `tests/fault/test_clean_exit.py`.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path

from ..topology import Process, connect

PATIENCE_SECONDS = 2.0
_TASKS = Path("/proc/self/task")
_WORKER = "pt_gloo_runloop"  # as torch names them, cut by Linux to 15 characters
_DEADLINE_FIELD = 4  # of /proc/<pid>/syscall, when it shows futex(address, operation, value, deadline, ...)
_registered = False


def leave_cleanly_at_exit(process: Process) -> None:
    """Register the departure, once. A group that somebody else made is only waited for, and left to its owner."""
    global _registered
    if _registered:
        return
    _registered = True
    atexit.register(leave, os.getpid(), ours=process.source != "attached")


def leave(pid: int, *, ours: bool) -> None:
    """Wait for the threads to come to rest, then leave the group if it is ours.

    Args:
        pid: The process that joined the group. A forked copy of it has no such threads and leaves nothing.
        ours: Whether this library made the group.
    """
    if os.getpid() != pid:
        return
    at_rest = settle(PATIENCE_SECONDS)
    failed = hasattr(sys, "last_value")  # an exception ended the script; its partners may be gone
    if not at_rest or failed:
        connect.abandon()
    elif ours:
        connect.disconnect()


def settle(patience: float) -> bool:
    """Wait until no gloo thread holds work, and tell whether that came true within `patience` seconds."""
    if not (_TASKS.parent / "syscall").exists():  # not Linux, or a kernel that does not tell
        time.sleep(0.1)
        return True
    deadline = time.monotonic() + patience
    before = None
    while True:
        try:
            now = _workers()
        except OSError:  # the kernel has the file and does not let us read it
            time.sleep(0.1)
            return True
        # Seen twice: once could be a moment in which the thread waits for a lock of the C library.
        if now == before and all(_waits_for_work(state) for state in now.values()):
            return True
        if time.monotonic() > deadline:
            return False
        before = now
        time.sleep(0.0005)  # without the GIL, so that a thread which wants it gets it


def _workers() -> dict[str, str]:
    """Return what each gloo thread of this process does in the kernel."""
    found = {}
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text().strip() == _WORKER:
                found[task.name] = (task / "syscall").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def _waits_for_work(state: str) -> bool:
    fields = state.split()  # the one word "running", or three fields outside a system call, or nine
    return len(fields) > _DEADLINE_FIELD and int(fields[_DEADLINE_FIELD], 16) == 0
