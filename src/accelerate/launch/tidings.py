"""What the launchers of several machines tell each other about failures and ends, over the store where they met.

Owns the keys for it, and the patience. Imports no torch: stores are given.

[Note: the end of a run] A machine whose ranks have ended well waits for the others: it may hold the store that their
ranks still need, and one of them may yet fail. Torch waits inside the store, where no signal gets through, for 300 s
at most. Here it is asked again and again. Machines that still have work to do say so, by a number that grows; so the
wait lasts as long as there is somebody to wait for.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from .report import Failure

ANSWER_SECONDS = 0.5
"""How long the store's machine may take to accept a connection."""
REPLY_SECONDS = 2.0
"""How long the store may take to reply."""
SILENCE_SECONDS = 30.0
"""How long a machine that has ended well waits for others from which nothing is heard."""
GONE_SECONDS = 3.0
"""How long it asks a store that does not reply."""
LEAVE_SECONDS = 2.0
"""How long the first machine, which may hold the store, waits until the others know that all have ended."""
_LOOK_SECONDS = 0.05


_FAILED, _HEARD = "accelerate/failed", "accelerate/failed/heard"
_ENDED, _KNOWS, _WORKS = "accelerate/ended/well", "accelerate/ended/known", "accelerate/works"


class Tidings:
    """What passes between this machine and the others in one attempt.

    The store may be on a machine that has gone silent. Its methods then wait for minutes and cannot be broken off: so
    they are called in a thread, and nothing more is asked until it has come back.

    Args:
        store: Where the machines met for this attempt; a later one has another.
        others: How many other machines there are.
        is_first: Whether this is the first machine, which may hold the store.
    """

    def __init__(self, store: Any, others: int, *, is_first: bool = False) -> None:
        self._store, self._others, self._is_first = store, others, is_first
        self._asking: threading.Thread | None = None
        self._elsewhere: Failure | None = None
        self._said: set[str] = set()
        self._counts: tuple[int, ...] | None = ()
        self._counts_since = 0.0

    def tell(self, failure: Failure) -> None:
        """Tell the others who failed first here; the first machine to tell is believed."""
        if self._others:
            text = json.dumps(asdict(replace(failure, host=socket.gethostname(), log=None)))
            self._ask(lambda: self._store.compare_set(_FAILED, "", text))

    def wait_until_heard(self, seconds: float) -> None:
        """Give the others a moment to hear of it: the store may live in this process, which is about to end."""
        deadline = time.monotonic() + seconds
        while self._others and time.monotonic() < deadline:
            heard = self._ask(lambda: self._store.add(_HEARD, 0))
            if heard is None or heard >= self._others:
                return
            time.sleep(_LOOK_SECONDS)

    def heard(self) -> Failure | None:
        """Return who failed first on another machine, if one has told. Says to the others that this machine works."""
        if self._others and self._elsewhere is None:
            text = self._ask(self._read)
            self._elsewhere = Failure(**json.loads(text)) if text else None
        return self._elsewhere

    def is_over(self) -> bool:
        """Say that the ranks here have ended well; tell whether there is nobody to wait for any more.

        See [Note: the end of a run].
        """
        if not self._others:
            return True
        counts = self._ask(self._count)
        now = time.monotonic()
        if counts != self._counts:
            self._counts, self._counts_since = counts, now
        waited = now - self._counts_since
        if counts is None:
            return waited > GONE_SECONDS
        ended, know, _works = counts
        if ended <= self._others:
            return waited > SILENCE_SECONDS
        return not self._is_first or know >= self._others or waited > LEAVE_SECONDS

    def _read(self) -> bytes | None:
        if _ENDED not in self._said:
            self._store.add(_WORKS, 1)
        if not self._store.check([_FAILED]):
            return None
        self._say(_HEARD)
        return self._store.get(_FAILED)

    def _count(self) -> tuple[int, ...]:
        self._say(_ENDED)
        ended, works = self._store.add(_ENDED, 0), self._store.add(_WORKS, 0)
        if ended <= self._others:
            return ended, 0, works
        if self._is_first:
            return ended, self._store.add(_KNOWS, 0), works
        self._say(_KNOWS)  # nothing is asked afterwards: the first machine may leave now, and take the store along
        return ended, 0, works

    def _say(self, key: str) -> None:
        if key not in self._said:
            self._store.add(key, 1)
            self._said.add(key)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return what the store replies; `None` if it does not."""
        replies: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):  # it has gone in this very moment
                replies.append(question())

        if (self._asking is not None and self._asking.is_alive()) or not answers(self._store):
            return None
        self._asking = threading.Thread(target=ask, name="accelerate-tidings", daemon=True)
        self._asking.start()
        self._asking.join(REPLY_SECONDS)
        return replies[0] if replies else None


def server_of(store: Any) -> tuple[str, int] | None:
    """Return where a store's server listens; `None` for a store of another kind, which has none."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return (store.host, store.port) if hasattr(store, "port") else None


def answers(store: Any, seconds: float = 0) -> bool:
    """Tell whether a store's server still listens. Torch prints pages when it finds out by itself.

    Args:
        store: It, or one inside of it.
        seconds: How long it is tried again.
    """
    address = server_of(store)
    if address is None:
        return True
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, ANSWER_SECONDS).close()
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        else:
            return True
