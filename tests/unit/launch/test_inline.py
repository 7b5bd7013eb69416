"""A script in a child process of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from accelerate.launch import inline, signals
from accelerate.launch.plan import LaunchPlan
from accelerate.launch.report import WorkersFailed
from accelerate.settings.preemption import SIGNALS


@pytest.mark.parametrize("name", SIGNALS)
def test_each_signal_on_which_a_run_may_save_itself_reaches_the_script(name):
    received = []
    before = signal.signal(signal.Signals[name], signal.SIG_DFL)  # nohup, say, lets it be ignored
    try:
        with inline._passing_on() as child:
            child._hand_on = child._send = received.append
            child.process = object()  # it runs
            signal.raise_signal(signal.Signals[name])
    finally:
        signal.signal(signal.Signals[name], before)
    assert received == [signal.Signals[name]]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
def test_a_signal_that_ends_nothing_does_not_make_the_next_one_the_second(monkeypatch):
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0)
    sent, killed = [], []
    child = inline._Child()
    child._hand_on = child._send = sent.append
    child._kill = lambda: killed.append(True)

    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        child.receive(number, None)
    assert (sent, killed) == ([signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2], [])

    child.receive(signal.SIGINT, None)
    assert killed == [True]
    assert child.received == signal.SIGTERM, "the first one is told"


SIGNALLED = """
import pathlib, signal, subprocess, sys, time
{first}
pathlib.Path("up").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.02)
"""


@contextmanager
def signalled(folder, *numbers) -> Iterator[None]:
    """Send signals to this process, one after the other, when the script in `folder` is up; then let it go on."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while not (folder / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        (folder / "go").touch()

    # What comes after the script, because something is wrong, does not end the tests.
    before = {number: signal.signal(number, lambda *_: None) for number in set(numbers)}
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
@pytest.mark.parametrize("first", ["", "signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))"])
def test_a_run_goes_on_after_a_signal_that_ends_nothing(tmp_path, monkeypatch, capfd, first):
    if not first and not Path("/proc/self/status").exists():
        pytest.skip("this system does not say which signals a process handles")
    monkeypatch.chdir(tmp_path)
    with signalled(tmp_path, signal.SIGUSR1):
        inline.run(LaunchPlan(kind="inline", argv=(sys.executable, "-c", SIGNALLED.format(first=first)), env={}))

    assert capfd.readouterr().out == ("heard\n" if first else "")


@pytest.mark.skipif(os.name != "posix", reason="sends signals as people do there")
def test_a_second_signal_ends_a_script_that_does_not_hear_the_first_and_what_it_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    first = (
        "signal.signal(15, signal.SIG_IGN)\n"
        f"child = subprocess.Popen({sleeper}, start_new_session=True)\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "pathlib.Path('up').touch()\n"
        "child.wait()"
    )
    began = time.monotonic()
    with signalled(tmp_path, signal.SIGTERM, signal.SIGTERM), pytest.raises(WorkersFailed, match="received SIGTERM"):
        inline.run(LaunchPlan(kind="inline", argv=(sys.executable, "-c", SIGNALLED.format(first=first)), env={}))

    assert time.monotonic() - began < 100
    pid = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
