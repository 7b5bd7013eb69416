"""A script in a child process of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from accelerate.launch import inline
from accelerate.launch.plan import LaunchPlan
from accelerate.launch.report import WorkersFailed
from accelerate.settings.preemption import SIGNALS


@pytest.mark.parametrize("name", SIGNALS)
def test_each_signal_on_which_a_run_may_save_itself_reaches_the_script(name):
    received = []
    before = signal.signal(signal.Signals[name], signal.SIG_DFL)  # nohup, say, lets it be ignored
    try:
        with inline._passing_on() as child:
            child._send = received.append
            child.process = object()  # it runs
            signal.raise_signal(signal.Signals[name])
    finally:
        signal.signal(signal.Signals[name], before)
    assert received == [signal.Signals[name]]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
def test_a_signal_that_ends_nothing_does_not_make_the_next_one_the_second():
    sent, killed = [], []
    child = inline._Child()
    child._send = sent.append
    child.process = SimpleNamespace(kill=lambda: killed.append(True))

    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        child.receive(number, None)
    assert (sent, killed) == ([signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2], [])

    child.receive(signal.SIGTERM, None)
    assert killed == [True]


@pytest.mark.skipif(os.name != "posix", reason="sends signals as people do there")
def test_a_second_signal_ends_a_script_that_does_not_hear_the_first(tmp_path):
    deaf = f"import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(tmp_path / 'up')!r}).touch(); "
    plan = LaunchPlan(kind="inline", argv=(sys.executable, "-c", f"{deaf}time.sleep(600)"), env={})

    def signals() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    sender = threading.Thread(target=signals)
    sender.start()
    began = time.monotonic()
    with pytest.raises(WorkersFailed, match="received SIGTERM"):
        inline.run(plan)
    sender.join()
    assert time.monotonic() - began < 100
