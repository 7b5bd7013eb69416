"""Signals to the launcher: which of them are one wish, and who hears of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from accelerate.launch import signals
from accelerate.launch.signals import ECHO_SECONDS, Asked

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as this system has them")
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", None)
LATER = ECHO_SECONDS * 1.01


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (TERM, INT, HUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arrivals", "counted"),
    [
        ([(0, TERM)], [TERM]),
        ([(0, TERM), (0.01, TERM)], [TERM]),
        ([(0, TERM), (0.01, HUP)], [TERM]),
        ([(0, INT), (LATER, INT)], [INT, INT]),
        ([(0, TERM), (0.01, TERM), (LATER, TERM)], [TERM, TERM]),
        ([(0, HUP), (LATER, HUP), (100, HUP)], [HUP]),
        ([(0, HUP), (LATER, TERM)], [HUP, TERM]),
        ([(0, TERM), (LATER, HUP)], [TERM, HUP]),
    ],
    ids=str,
)
def test_what_follows_at_once_is_the_same_wish(monkeypatch, arrivals, counted):
    asked = Asked()
    found = []
    for at, number in arrivals:
        monkeypatch.setattr(signals.time, "monotonic", lambda at=at: 1000.0 + at)
        if asked.counts(number):
            found.append(number)

    assert found == counted
    assert asked.first == counted[0]


def test_echoes_do_not_reach_the_handlers_there_are_however_often_they_are_kept_away(monkeypatch, handlers):
    now = 1000.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    heard = []
    for number in (TERM, INT, HUP):
        signal.signal(number, lambda number, frame: heard.append(number))
    asked = Asked()
    asked.keep_echoes_away()
    signal.signal(TERM, lambda number, frame: heard.append("anew"))  # as torch does when it starts workers again
    asked.keep_echoes_away()

    signal.raise_signal(TERM)
    signal.raise_signal(HUP)
    now += LATER
    signal.raise_signal(INT)

    assert heard == ["anew", INT]


def test_a_further_signal_stops_and_an_echo_does_not(monkeypatch, handlers):
    now = 1000.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stopped = []
    asked = Asked()
    assert asked.counts(TERM)
    with signals.second_one(lambda: stopped.append(True), asked):
        signal.raise_signal(TERM)
        assert stopped == []
        now += LATER
        signal.raise_signal(TERM)

    assert stopped == [True]


def test_elsewhere_than_in_the_main_thread_nothing_is_set():
    problems = []

    def work():
        try:
            Asked().keep_echoes_away()
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what a process handles")
@pytest.mark.parametrize(
    ("first", "handled"),
    [
        ("", False),
        ("signal.signal(signal.SIGUSR1, lambda *_: None)", True),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])", True),
    ],
    ids=["default", "handler", "waited for"],
)
def test_a_process_is_asked_for_its_handlers(first, handled):
    program = f"import signal, sys\n{first}\nprint(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert signals.handles(child.pid, signal.SIGUSR1) is handled
        child.stdin.close()
