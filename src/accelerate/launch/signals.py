"""Signals to the launcher, and what they mean for its workers.

Owns those that torch's agent leaves to their usual effect, which is to end the launcher and nobody else; the second
one, which stops at once; and which of torch's are left alone, because somebody had them ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_TORCHS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Those for which torch's agent sets a handler."""
_PASSED_ON = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
_SET = [*_PASSED_ON, *(getattr(signal, name) for name in _TORCHS if hasattr(signal, name))]


@contextmanager
def passing_on_to_children() -> Iterator[None]:
    """Let SIGUSR1 and SIGUSR2 to this process reach the workers that have a handler for it.

    A worker without one would be ended, and so would torch's helpers; before the workers have set theirs, nobody gets it.
    Afterwards all handlers are what they were: torch leaves its own behind, which raises.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
        before = {number: handler for number in _SET if (handler := signal.getsignal(number)) is not None}
        for number in _PASSED_ON:
            if before.get(number) == signal.SIG_DFL:
                signal.signal(number, _pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard() -> str:
    """Return the names of the signals that end the run, as torch wants them; not those that `nohup` and the like set off."""
    return ",".join(
        name for name in _TORCHS if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    )


@contextmanager
def second_one(stop: Callable[[], object]) -> Iterator[None]:
    """While workers are asked to end, let a further signal to this process call `stop`."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in heard().split(",") if name}
    try:
        for number in before:
            signal.signal(number, lambda _number, _frame: stop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int, _frame: Any) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if handles(child.pid, number):
                child.send_signal(number)


def handles(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal, as far as the system says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, or the process is gone
        return not Path("/proc/self/status").exists()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (number - 1) & 1)
