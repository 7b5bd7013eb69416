"""Carry out a plan through DeepSpeed's runner.

Owns its file of variables, which signals reach whom, and that nothing it has started here is left afterwards.

[Note: signals to the runner] The runner waits for one child: DeepSpeed's launcher of this machine, mpirun or srun. It
hands on no signal, but for pdsh, where it ends what it started on other hosts. So a signal is sent to that child, and
with pdsh to the runner. It has a session of its own: control-C in a terminal would reach all of them at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..core.leaving import NOTE_VARIABLE, PREEMPTED_STATUS
from ..settings import env
from ..settings.preemption import SIGNALS
from . import deepspeed, inline, signals
from .deepspeed import Start
from .family import Family, send
from .guard import guarded
from .plan import LaunchPlan
from .report import RunPreempted, WorkersFailed

GRACE_SECONDS = 35.0
"""How long the run may take to end when the launcher is asked to: DeepSpeed gives its processes 30 seconds."""
_LEFT_GRACE_SECONDS = 1.0


def run(plan: LaunchPlan) -> None:
    """Run `plan` to its end. Blocks. Nothing that it started on this machine is running afterwards.

    Raises:
        RunPreempted: If the run saved itself on a signal.
        WorkersFailed: If it ends with a status other than 0, or the launcher was asked to end.
        KeyboardInterrupt: If the launcher was interrupted.
        LaunchError: If the runner cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="accelerate-launch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        note = folder / "preempted"
        variables = {**inline.environment(plan), NOTE_VARIABLE: str(note)}
        if plan.start is not None and plan.start.by_shell:
            variables["DS_ENV_FILE"] = str(_write_variables(plan, plan.start, folder / "deepspeed_env"))
        runner = _Runner(plan, Family(f"{NOTE_VARIABLE}={folder}"))
        status = _watched(runner, folder, variables)
        if note.exists():
            raise RunPreempted(note.read_text(encoding="utf-8"))
    _tell(plan, runner.received, status)


def _write_variables(plan: LaunchPlan, start: Start, file: Path) -> Path:
    """Write the variables for other hosts. The user's own come first: those of the plan win."""
    lines = [*start.env_lines, *(deepspeed.env_line(name, value) for name, value in plan.env.items())]
    file.touch(0o600)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def _watched(runner: _Runner, folder: Path, variables: dict[str, str]) -> int:
    environ = env.read()
    environ.pop(NOTE_VARIABLE, None)
    with guarded(runner.family, folder, environ) as guard:
        well = False
        try:
            with runner.hearing_signals():
                try:
                    runner.start(variables)
                except OSError as error:
                    raise inline.not_started(runner.plan, error) from error
                guard.tell(runner.family)
                status = runner.wait()
            well = status == 0
        finally:
            # Nothing stops this any more; it takes seconds at most.
            with signals.second_one(lambda: None, runner.asked):
                if not well:  # what a script that ended well left running goes on
                    runner.family.end(_LEFT_GRACE_SECONDS)
    return status


class _Runner:
    """The runner's process, and the signal that ended it. See [Note: signals to the runner]."""

    def __init__(self, plan: LaunchPlan, family: Family) -> None:
        self.plan, self.family = plan, family
        self.asked = signals.Asked()
        self.received: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = threading.Timer(GRACE_SECONDS, self._stop)
        self._patience.daemon = True

    def start(self, variables: dict[str, str]) -> None:
        self._process = subprocess.Popen(self.plan.command, env=variables, start_new_session=True)
        self.family.add([self._process.pid])
        if self.received is not None:  # it came while the process was being made
            self._end()

    def wait(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait()
        finally:
            self._patience.cancel()

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Handle the signals that end a run, and those that scripts wait for; restore the handlers on exit."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in {signal.SIGINT, *map(signal.Signals.__getitem__, SIGNALS)}:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's choice stays
                    before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if number in inline.HANDED_ON:
            send([pid for pid in self.family.members() if signals.handles(pid, number)], number, groups=False)
        elif not self.asked.counts(number):
            return
        elif self.received is not None:
            self._stop()
        else:
            self.received = number
            self._patience.start()
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        pids = [self._process.pid]
        if not (self.plan.start and self.plan.start.by_shell):
            with suppress(psutil.NoSuchProcess):
                pids = [child.pid for child in psutil.Process(pids[0]).children()] or pids
        # srun and mpirun take SIGINT for a question.
        send(pids, signal.SIGTERM, groups=False)

    def _stop(self) -> None:
        send(self.family.members(), signal.SIGKILL)


def _tell(plan: LaunchPlan, received: int | None, status: int) -> None:
    """Raise what the end of the runner means; return if all is well."""
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    if status == PREEMPTED_STATUS:
        raise RunPreempted("the script was asked to end, and saved itself; what it said stands above")
    if received is not None:
        name = signal.Signals(received).name
        said = f"accelerate: the launcher received {name} and ended DeepSpeed's launcher with its processes"
        raise WorkersFailed(said, 128 + received)
    if status:
        failed = WorkersFailed.alone((f"DeepSpeed's launcher with {plan.world_size} processes",), exit_code(status))
        raise WorkersFailed(f"{failed}; which rank failed, and why, stands above", failed.status)


_DEADLY = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTERM")


def exit_code(status: int) -> int:
    """Return the exit code that a status of the runner stands for.

    DeepSpeed passes on that of a process which a signal has ended as a negative one, of which the system keeps 8 bits.
    """
    number = 256 - status
    return -number if number in {getattr(signal, name, None) for name in _DEADLY} and os.name == "posix" else status
