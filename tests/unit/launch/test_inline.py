"""A script in a child process of the launcher."""

from __future__ import annotations

import signal

import pytest

from accelerate.launch import inline
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
