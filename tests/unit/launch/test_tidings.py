"""What machines tell each other about a failure, and one that does not reply."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from accelerate.launch import tidings
from accelerate.launch.report import Failure
from accelerate.launch.tidings import Tidings


def test_the_first_machine_to_tell_is_believed_and_waits_until_it_is_heard(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node-b")
    store = HashStore()
    first, second = Tidings(store, 1), Tidings(store, 1)

    assert second.heard() is None
    first.tell(Failure(3, 7, 1, "Traceback", log="logs/rank_3/stderr.log"))
    second.tell(Failure(5, 8, 2))
    heard = second.heard()
    first.wait_until_heard(600)

    assert heard == Failure(3, 7, 1, "Traceback", host="node-b")


def test_a_machine_alone_asks_nobody():
    alone = Tidings(None, 0)

    alone.tell(Failure(0, 1, 1))
    alone.wait_until_heard(600)

    assert alone.heard() is None
    assert alone.is_over()


def test_machines_leave_when_all_have_ended_and_the_first_one_last():
    store = HashStore()
    first, second, third = Tidings(store, 2, is_first=True), Tidings(store, 2), Tidings(store, 2)

    assert not first.is_over()
    assert not second.is_over()
    assert not second.is_over(), "to ask twice is to end once"
    assert third.is_over()
    assert not first.is_over(), "the second does not know yet, and this machine may hold the store"
    assert second.is_over()
    assert first.is_over()


def test_a_machine_that_has_ended_waits_for_as_long_as_others_work(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    store = HashStore()
    first, second = Tidings(store, 1, is_first=True), Tidings(store, 1)

    for _ in range(5):
        clock[0] += tidings.SILENCE_SECONDS
        assert second.heard() is None
        assert not first.is_over()
    clock[0] += tidings.SILENCE_SECONDS + 1

    assert first.is_over(), "nobody has been heard for long"


def test_machines_that_have_ended_do_not_keep_each_other_waiting_for_one_that_is_silent(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    store = HashStore()
    first, second = Tidings(store, 2, is_first=True), Tidings(store, 2)

    assert not first.is_over()
    assert not second.is_over()
    assert not first.is_over()
    clock[0] += tidings.SILENCE_SECONDS + 1
    assert second.heard() is None

    assert first.is_over(), "to ask for news is no work when one's own ranks have ended"


def test_the_first_machine_does_not_wait_for_long_until_the_others_know(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    store = HashStore()
    store.add(tidings._ENDED, 1)  # by one that was killed right afterwards
    first = Tidings(store, 1, is_first=True)

    assert not first.is_over()
    clock[0] += tidings.LEAVE_SECONDS + 1

    assert first.is_over()


def test_a_machine_that_has_ended_does_not_wait_for_a_store_that_has_gone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(tidings, "answers", lambda store: False)
    machine = Tidings(HashStore(), 1)

    assert not machine.is_over(), "it may be a moment's trouble"
    clock[0] += tidings.GONE_SECONDS + 1

    assert machine.is_over()


class Silent:
    """A store whose server accepts connections and never replies."""

    def __init__(self, port: int) -> None:
        self.host, self.port, self.asked, self.over = "127.0.0.1", port, 0, threading.Event()

    def check(self, _keys) -> bool:
        self.asked += 1
        self.over.wait()
        return False

    def compare_set(self, *_words) -> None:
        self.check(_words)


def test_a_store_that_does_not_reply_is_given_up(monkeypatch):
    monkeypatch.setattr(tidings, "REPLY_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = Silent(server.getsockname()[1])
        machine = Tidings(silent, 1)

        machine.tell(Failure(0, 1, 1))
        machine.wait_until_heard(600)

        assert machine.heard() is None
        assert silent.asked == 1
        silent.over.set()


class Going:
    """A store that goes in the very moment of a question."""

    def add(self, *_words) -> int:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_goes_in_the_moment_of_a_question_has_no_news():
    assert Tidings(Going(), 1).heard() is None


@pytest.mark.parametrize("listens", [True, False])
def test_a_store_answers_while_its_server_listens(listens):
    with socket.create_server(("127.0.0.1", 0)) as server:
        store = Silent(server.getsockname()[1])
        if not listens:
            server.close()

        assert tidings.answers(store) == listens
        assert tidings.answers(SimpleNamespace(underlying_store=store)) == listens


def test_a_store_that_is_out_of_reach_for_a_moment_answers_in_the_end(monkeypatch):
    tries = []

    def connect(_address, _seconds):
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionRefusedError
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)

    assert tidings.answers(Silent(29500), 600)
    assert len(tries) == 3
