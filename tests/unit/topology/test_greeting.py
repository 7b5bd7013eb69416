"""Torch's store and other programs, told apart at one address."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import TCPStore

from accelerate.topology import greeting


@contextmanager
def serving(answer) -> Iterator[int]:
    """Let a program of one's own listen, which does `answer` with each connection; yields its port."""
    held = []

    def serve(server):
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            held.append(client)
            answer(client)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    for client in held:
        client.close()


def greet(port: int, seconds: float = 0.5) -> greeting.Reply:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        return greeting.greet(connection, seconds)


@pytest.mark.parametrize("libuv", [True, False])
def test_torchs_own_stores_understand(libuv):
    """Also where a later torch is installed: then this is where to look first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, use_libuv=libuv, wait_for_workers=False)

    assert greet(store.port, 10) == greeting.Reply(is_store=True)

    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize(
    ("answer", "problem", "may_change"),
    [
        (lambda client: None, "another program answers there, and says nothing", False),
        (lambda client: client.sendall(b"SSH-2.0-x\r\n"), r"says b'SSH-2.0-x\r\n'", False),
        (lambda client: client.sendall(b"220"), "says b'220'", False),
        (lambda client: client.close(), "whoever listens there hangs up at once", True),
        (lambda client: client.recv(100) and client.sendall(bytes(4)), r"says b'\x00\x00\x00\x00'", False),
    ],
    ids=["silent", "banner", "short", "closing", "wrong number"],
)
def test_other_programs_are_told(answer, problem, may_change):
    with serving(answer) as port:
        reply = greet(port)

    assert not reply.is_store
    assert reply.problem.endswith(problem)
    assert reply.may_change is may_change


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *words):
        pass


def test_a_web_server_is_told():
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        reply = greet(server.server_port)

    assert re.fullmatch("another program answers there, and says .*", reply.problem)


def test_who_says_nothing_more_is_not_waited_for_longer_than_wanted():
    with serving(lambda client: client.sendall(b"x")) as port:
        began = time.monotonic()
        reply = greet(port, 0.2)

    assert reply.problem == "another program answers there, and says b'x'"
    assert time.monotonic() - began < 0.2 + 5


def test_where_a_later_torch_speaks_otherwise_everybody_counts_as_its_store(monkeypatch):
    monkeypatch.setattr(greeting, "_UNTRIED", "2.0")
    greeting._is_understood.cache_clear()
    try:
        with serving(lambda client: None) as port:
            assert not greet(port).is_store, "its own store was asked, and understands"

            greeting._is_understood.cache_clear()
            monkeypatch.setattr(greeting, "_MAGIC", 1)
            monkeypatch.setattr(greeting, "_OWN_SECONDS", 0.2)
            assert greet(port).is_store
    finally:
        greeting._is_understood.cache_clear()
