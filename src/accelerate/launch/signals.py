"""Signals to the launcher, and what they mean for its workers.

Owns those that torch's agent leaves to their usual effect, which is to end the launcher and nobody else; the second
one, which stops at once; and which of torch's are left alone, because somebody had them ignored.

[Note: echoes] One wish to end may arrive as two signals. When a connection breaks, the shell sends SIGHUP and then the
system does; whoever ends a session sends SIGTERM and SIGHUP; a program that started the launcher passes on the SIGINT
that the terminal sends to both. The second of these must not end ranks that are saving. So what comes within
`ECHO_SECONDS` of the first is the same wish, and a SIGHUP after a SIGHUP always is: nobody is there any more.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ECHO_SECONDS = 0.05
"""More than what programs need, and less than what people do."""
_TORCHS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Those for which torch's agent sets a handler."""
_PASSED_ON = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
_SET = [*_PASSED_ON, *(getattr(signal, name) for name in _TORCHS if hasattr(signal, name))]


class Asked:
    """What a run has been asked by signals that end it. See [Note: echoes]."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._at = 0.0
        self._filters: list[Any] = []

    def counts(self, number: int) -> bool:
        """Note a signal; tell whether it is the first one or a further one, and no echo of the first."""
        if self.first is None:
            self.first, self._at = number, time.monotonic()
            return True
        hung_up = getattr(signal, "SIGHUP", None)
        is_echo = time.monotonic() - self._at < ECHO_SECONDS or number == self.first == hung_up
        return not is_echo

    def keep_echoes_away(self) -> None:
        """Keep echoes from the handlers that there are now for the signals that end a run. May be called again."""
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses handlers
            return
        for number in _heard():
            handler = signal.getsignal(number)
            if callable(handler) and handler not in self._filters:
                self._filters.append(self._filtered(handler))
                signal.signal(number, self._filters[-1])

    def _filtered(self, handler: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        return lambda number, frame: handler(number, frame) if self.counts(number) else None


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
    return ",".join(signal.Signals(number).name for number in _heard())


def _heard() -> list[int]:
    numbers = [getattr(signal, name) for name in _TORCHS if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def second_one(stop: Callable[[], object], asked: Asked) -> Iterator[None]:
    """While workers are asked to end, let a further signal to this process, other than an echo, call `stop`."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _heard()}
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: stop() if asked.counts(number) else None)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int, _frame: Any) -> None:
    import psutil  # costs time that a single process does not need

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if handles(child.pid, number):
                child.send_signal(number)


def handles(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal, or waits for it with it blocked, as far as the system says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, or the process is gone
        return not Path("/proc/self/status").exists()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt:", "SigBlk:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
