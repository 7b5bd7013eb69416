"""Tell torch's store from any other program that listens where a run is to meet.

Torch's client finds out late. Before a program that says nothing it waits for ever, where no signal and no time limit
gets through; of one that says something else it prints pages, and tries on for as long as the group's time limit. So
the words with which that client begins are spoken here first, over a socket of our own.

They are no public interface of torch: a number that says whose words these are, and another one that is sent back, the
same from 2.9 to 2.13. So a later torch's own store is asked for them before anything is called another program.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from dataclasses import dataclass

from ..core.versions import is_torch_version

_VALIDATE, _PING = 0, 13
_MAGIC = 0x3C85F7CE
_UNTRIED = "2.14"
"""The first torch whose stores were not seen to understand."""
_SHOWN_BYTES = 40
_OWN_SECONDS = 2.0


@dataclass(frozen=True)
class Reply:
    """How whoever listens took the greeting."""

    is_store: bool
    problem: str = ""
    """What it did instead, as the end of a sentence about it."""
    may_change: bool = False
    """Whether a store may yet be there: a proxy accepts connections before the program behind it does."""


def greet(connection: socket.socket, seconds: float) -> Reply:
    """Say torch's first words to whoever accepted a connection. Blocks for `seconds` at most, and leaves it open.

    Where this torch's own store does not understand them either, everybody counts as a store.
    """
    reply = _reply(connection, seconds)
    return reply if reply.is_store or _is_understood() else Reply(is_store=True)


def _reply(connection: socket.socket, seconds: float) -> Reply:
    number = os.urandom(4)
    deadline = time.monotonic() + seconds
    connection.settimeout(seconds)
    said = b""
    try:
        connection.sendall(struct.pack("=BIB", _VALIDATE, _MAGIC, _PING) + number)
        while len(said) < len(number) and time.monotonic() < deadline:
            received = connection.recv(_SHOWN_BYTES)
            if not received:
                break
            said += received
    except TimeoutError:
        if not said:
            return Reply(is_store=False, problem="another program answers there, and says nothing")
    except ConnectionError:
        pass  # it has hung up, which an end without words says too
    if said == number:
        return Reply(is_store=True)
    if said:
        return Reply(is_store=False, problem=f"another program answers there, and says {said[:_SHOWN_BYTES]!r}")
    return Reply(is_store=False, problem="whoever listens there hangs up at once", may_change=True)


@functools.cache
def _is_understood() -> bool:
    # Not asked where the answer is known: its client looks up the name of its own address, which may take long.
    if is_torch_version("<", _UNTRIED):
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with socket.create_connection(("127.0.0.1", store.port), _OWN_SECONDS) as connection:
            return _reply(connection, _OWN_SECONDS).is_store
    except (RuntimeError, OSError):
        return False
