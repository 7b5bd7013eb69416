"""Votes of all ranks, taken in the store where they found each other.

Owns what ranks tell each other where no collective can be trusted, because one of them may have left in the middle of
one. The store outlives the groups made over it. What a vote says is text to this file.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from ..core.errors import AccelerateError, explain


class Ballot:
    """One question to all ranks. This one serves a process that is alone."""

    flagged = False
    """Whether a rank has raised the flag."""

    def flag(self) -> None:
        """Let the others know, before they vote, that something happened here."""
        self.flagged = True

    def give_up(self, reason: str) -> None:
        """Tell the others that this rank will not vote, and why."""

    def vote(self, text: str, patience_seconds: float) -> list[str]:
        """Return the votes of all ranks, in order of rank. Called on all ranks; collective, and works over the store.

        Args:
            text: This rank's vote.
            patience_seconds: How long to wait for the others.

        Raises:
            RankFailed: (a `RuntimeError`) if a rank gave up.
            TimeoutError: With the ranks that did not vote; this rank has given up then.
        """
        return [text]


class RankFailed(AccelerateError, RuntimeError):
    """Another rank has failed, so nothing can be agreed on."""


KEEPER_PATIENCE_SECONDS = 10.0
"""How long rank 0, in whose process the store may live, waits for the others to read a result."""


class StoreBallot(Ballot):
    """One question to several ranks.

    Args:
        store: Where they vote.
        name: The same on all ranks, and new for each question.
        rank: Who votes here.
        world_size: How many vote.
    """

    def __init__(self, store: Any, name: str, rank: int, world_size: int) -> None:
        self._store, self._name, self._rank, self._world_size = store, name, rank, world_size

    @property
    def flagged(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        with suppress(dist.DistNetworkError):  # the store is gone, and whoever raised the flag is too
            return self._store.check([f"{self._name}/flag"])
        return False

    def flag(self) -> None:
        with suppress(dist.DistNetworkError):  # the vote will tell
            self._store.set(f"{self._name}/flag", "")

    def give_up(self, reason: str) -> None:
        with suppress(dist.DistNetworkError):  # nobody is there to be told
            self._store.set(f"{self._name}/failed", f"process {self._rank} failed with {reason}")
            self._store.set(f"{self._name}/closed", "")

    def vote(self, text: str, patience_seconds: float) -> list[str]:
        try:
            return self._vote(text, patience_seconds)
        except dist.DistNetworkError as error:
            raise RankFailed(
                explain(
                    f"The processes cannot agree: the one that keeps their store has ended ({error}).",
                    remedy="See its error; it is process 0, or that of the launcher.",
                )
            ) from None

    def _vote(self, text: str, patience_seconds: float) -> list[str]:
        votes = [f"{self._name}/vote/{rank}" for rank in range(self._world_size)]
        self._store.set(votes[self._rank], text)
        self._count_in("closed")
        if not self._wait("closed", patience_seconds):
            absent = [str(rank) for rank, vote in enumerate(votes) if not self._store.check([vote])]
            self.give_up(reason := f"no word from process {', '.join(absent)} within {patience_seconds:.0f} s")
            raise TimeoutError(reason)
        failed = f"{self._name}/failed"
        if self._store.check([failed]):
            reason = self._store.get(failed).decode()
            raise RankFailed(explain(f"The processes cannot agree: {reason}.", remedy="See the error of that process."))
        result = [vote.decode() for vote in self._store.multi_get(votes)]
        self._count_in("read")
        if self._rank == 0:
            self._wait("read", KEEPER_PATIENCE_SECONDS)
        return result

    def _count_in(self, event: str) -> None:
        """Count this rank; with the last one the event has come."""
        if self._store.add(f"{self._name}/{event}/count", 1) == self._world_size:
            self._store.set(f"{self._name}/{event}", "")

    def _wait(self, event: str, patience_seconds: float) -> bool:
        """Return whether the event came in time."""
        # The store's own wait would print a warning each time it runs out of time, and hold back signals.
        deadline, pause = time.monotonic() + patience_seconds, 0.001
        while not self._store.check([f"{self._name}/{event}"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return True
