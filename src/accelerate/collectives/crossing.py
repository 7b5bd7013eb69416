"""Where ranks that run a loop meet, when one of them asks the others to stop.

Owns what ranks tell each other in the store, and how they find the first place that all of them reach. Knows no loops:
a place is a tuple of numbers that grows while a rank runs.

[Note: the first place that all reach]
Ranks that train together wait for each other inside a step, so a rank that stopped where it happens to be could keep the
others from ever coming there. Each rank therefore writes the place it comes to next, or stands at, and goes on from where
it stands if it reads a place behind its own: that of another rank which has gone further, or will end. All have met
where all stand at the same place, and nobody leaves it then: nobody reads a greater one. A rank whose main thread is
busy is spoken for by a thread of its own (`listen`), which sleeps in the store until it is called, so a run that nobody
stops exchanges nothing.

A rank that waits too long gives up for all. Whether they met or gave up is decided once, in the store: the first one to
write it is right.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, cast

import torch.distributed as dist

Place = tuple[int, ...]
"""Where a rank is in its run; later places are greater."""

StoreGone = dist.DistNetworkError
"""What the methods of `Crossing` raise where the store does not answer any more, if they do not say otherwise."""

LONGEST_WAIT = timedelta(days=20)
"""Torch waits by `poll`, whose milliseconds overflow after 24 days."""

KEEPER_PATIENCE_SECONDS = 2.0
"""How long rank 0, in whose process the store may live, waits for the others to close."""

_ENDED = "ended"
_MET = "met"


class Outcome(Enum):
    """What came of standing at a place."""

    MET = "all ranks stand here"
    GO_ON = "another rank is further"
    GIVEN_UP = "a rank did not come"


@dataclass(frozen=True)
class Report:
    """What one rank has written."""

    place: Place | None
    """`None` if it has ended."""
    stands: bool

    @classmethod
    def read(cls, text: str) -> Report:
        """Return what `write` made a text of."""
        if text == _ENDED:
            return cls(None, False)
        stands, *numbers = map(int, text.split())
        return cls(tuple(numbers), bool(stands))

    def write(self) -> str:
        """Return it as text."""
        return _ENDED if self.place is None else " ".join(map(str, (int(self.stands), *self.place)))

    def is_beyond(self, place: Place) -> bool:
        """Tell whether this rank will not come to `place` any more, or need not stay there."""
        return self.place is None or self.place > place


class Crossing:
    """The meeting of several ranks.

    Args:
        store: Where they found each other.
        name: The same on all ranks, and new for each crossing.
        rank: Who meets here.
        world_size: How many meet.
    """

    def __init__(self, store: Any, name: str, rank: int, world_size: int) -> None:
        self._store = dist.distributed_c10d.PrefixStore(name, store)
        # A connection that waits serves nobody else meanwhile.
        self._listening: Any = cast("Any", self._store).clone()  # torch's own description lacks it
        self._rank, self._world_size = rank, world_size

    def listen(self) -> bool:
        """Wait until some rank calls, and return whether one did; called in a thread of its own.

        Returns `False` after `close`, or when the store is gone.
        """
        own = f"call/{self._rank}"
        while True:
            try:
                self._listening.wait([own], LONGEST_WAIT)
                return self._listening.get(own) == b"stop"
            except dist.DistNetworkError:
                return False
            except dist.DistStoreError:  # it waited for as long as it can
                continue

    def speak_for(self, place: Place) -> None:
        """Write, in the thread of `listen`, which place this rank comes to next."""
        with suppress(dist.DistNetworkError):
            self._listening.set(self._state(self._rank), Report(place, False).write())

    def call(self, reason: str) -> None:
        """Ask all ranks to stop."""
        self._store.compare_set("reason", "", reason)
        for rank in range(self._world_size):
            self._store.set(f"call/{rank}", "stop")

    @property
    def reason(self) -> str:
        """Why a rank has called; the first one counts."""
        return self._store.get("reason").decode()

    def move(self, place: Place) -> None:
        """Write which place this rank comes to next."""
        with suppress(dist.DistNetworkError):  # the next place to stand at finds out
            self._store.set(self._state(self._rank), Report(place, False).write())

    def close(self) -> None:
        """Say that this rank comes to no further place, and end `listen`."""
        with suppress(dist.DistNetworkError):  # nobody is there to be told
            self._store.set(self._state(self._rank), _ENDED)
            self._store.set(f"call/{self._rank}", "end")
            # Where the store lives in the process of rank 0, threads that still wait in it would be torn off.
            closed, deadline = self._store.add("closed", 1), time.monotonic() + KEEPER_PATIENCE_SECONDS
            while self._rank == 0 and closed < self._world_size and time.monotonic() < deadline:
                time.sleep(0.005)
                closed = self._store.add("closed", 0)

    def stand(self, place: Place, patience_seconds: float) -> Outcome:
        """Wait at `place` until all ranks stand there, or one is beyond it. See [Note: the first place that all reach].

        Args:
            place: Where this rank is; never less than what was written for it before.
            patience_seconds: How long to wait for the others.
        """
        self._store.set(self._state(self._rank), Report(place, True).write())
        deadline, pause = time.monotonic() + patience_seconds, 0.001
        while True:
            if (outcome := self._outcome()) is not None:
                return outcome
            reports = self.reports()
            if any(report is not None and report.is_beyond(place) for report in reports):
                return Outcome.GO_ON
            if all(report == Report(place, True) for report in reports):
                return self._conclude(_MET)
            if time.monotonic() > deadline:
                return self._conclude(f"rank {self._rank} waited for {patience_seconds:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def reports(self) -> list[Report | None]:
        """Return what each rank has written; `None` for one that has written nothing."""
        return [
            Report.read(self._store.get(key).decode()) if self._store.check([key]) else None
            for key in map(self._state, range(self._world_size))
        ]

    def who_gave_up(self) -> str:
        """Return which rank gave up, after how long."""
        return self._store.get("outcome").decode()

    def _outcome(self) -> Outcome | None:
        if not self._store.check(["outcome"]):
            return None
        return Outcome.MET if self.who_gave_up() == _MET else Outcome.GIVEN_UP

    def _conclude(self, text: str) -> Outcome:
        first = self._store.compare_set("outcome", "", text).decode()
        return Outcome.MET if first == _MET else Outcome.GIVEN_UP

    @staticmethod
    def _state(rank: int) -> str:
        return f"state/{rank}"
