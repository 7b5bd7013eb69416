"""Run a script in one process.

Owns the hand-over: the interpreter takes the place of the launcher, so that arguments, tracebacks, signals and the
exit status are those of `python script.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..core.errors import LaunchError, explain
from ..core.last_words import LAUNCHER_VARIABLE
from ..core.leaving import NOTE_VARIABLE, PREEMPTED_STATUS
from ..settings import env
from ..settings.preemption import SIGNALS
from . import signals
from .plan import LaunchPlan
from .report import RunPreempted, WorkersFailed


def become(plan: LaunchPlan) -> NoReturn:
    """Replace this process by the script. Does not return."""
    try:
        os.execvpe(plan.command[0], plan.command, environment(plan))
    except OSError as error:
        raise not_started(plan, error) from error


def run(plan: LaunchPlan) -> None:
    """Run the script in a child process and wait; for callers that have work to do afterwards.

    Signals that ask this process to end are passed on, so that the script does not outlive it unnoticed.

    Raises:
        WorkersFailed: If the script ends with a status other than 0, or the launcher was asked to end.
        KeyboardInterrupt: If the launcher was interrupted; the script has ended then.
    """
    with _passing_on() as child:
        try:
            status = child.start(plan)
        except OSError as error:
            raise not_started(plan, error) from error
    if child.received == signal.SIGINT:
        raise KeyboardInterrupt
    if status == PREEMPTED_STATUS:
        raise RunPreempted("the script was asked to end, and saved itself; what it said stands above")
    if child.received is not None:
        name = signal.Signals(child.received).name
        raise WorkersFailed(
            f"accelerate: the launcher received {name} and passed it on to the script", 128 + child.received
        )
    if status:
        raise WorkersFailed.alone(plan.command, status)


HANDED_ON = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals that a script may wait for, and that end nothing."""
_PASSED_ON = [signal.SIGINT, *map(signal.Signals.__getitem__, SIGNALS)]


class _Child:
    """The script's process, and the first signal that asked it to end."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.received: int | None = None
        self._asked = signals.Asked()

    def start(self, plan: LaunchPlan) -> int:
        """Run the script; return its exit code."""
        self.process = subprocess.Popen(plan.command, env=environment(plan))
        if self.received is not None:  # it came while the process was being made
            self._send(self.received)
        return self.process.wait()

    def receive(self, number: int, _frame: Any) -> None:
        """Handle a signal to this process. A second one that ends it ends the script now."""
        if number in HANDED_ON:
            self._hand_on(number)
        elif not self._asked.counts(number):
            return
        elif self.received is None:
            self.received = number
            self._send(number)
        else:
            self._kill()

    def _hand_on(self, number: int) -> None:
        # It would end a script without a handler.
        if self.process is not None and signals.handles(self.process.pid, number):
            self.process.send_signal(number)

    def _send(self, number: int) -> None:
        # Control-C in a terminal reaches the script by itself; twice would break off its cleaning up.
        if self.process is not None and not (number == signal.SIGINT and _owns_terminal()):
            self.process.send_signal(number)

    def _kill(self) -> None:
        """End the script, or mpirun, and what it has started here."""
        import psutil

        if self.process is None:
            return
        started: list[psutil.Process] = []
        with suppress(psutil.Error):  # it has just ended
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for each in started:
            with suppress(psutil.Error):  # it has ended too, or is somebody else's, as with sudo
                each.kill()


@contextmanager
def _passing_on() -> Iterator[_Child]:
    """Let signals to this process reach the script too, and restore the handlers on exit."""
    child = _Child()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
        for number in _PASSED_ON:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's choice stays
                before[number] = signal.signal(number, child.receive)
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _owns_terminal() -> bool:
    """Tell whether a terminal sends its Control-C to this process and its children."""
    if os.name != "posix":
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def environment(plan: LaunchPlan) -> dict[str, str]:
    """Return the variables of the process that carries out a plan."""
    # The last two are those of a launcher further up, whose run this is not.
    without = {*plan.without, NOTE_VARIABLE, LAUNCHER_VARIABLE}
    inherited = {name: value for name, value in env.read().items() if name not in without}
    return {**inherited, **plan.env}


def not_started(plan: LaunchPlan, error: OSError) -> LaunchError:
    """Return the error for a program that could not be run."""
    return LaunchError(
        explain(
            f"{plan.command[0]!r} cannot be run: {error.strerror}.",
            accepted="a program on the PATH, or the path of one",
            remedy="Check the name after --no_python.",
        )
    )
