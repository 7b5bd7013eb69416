"""Ranks that try out whether each can talk to every other one, with a time limit. See `launch.preflight`.

Owns the talking: the roll call, the rounds, the measurements. Called on all ranks; none waits for another one longer
than the limits say. What was found is agreed on over the store, in which rank 0 has the last word.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from .. import hardware, topology
from ..collectives import pairs
from ..settings import env
from ..topology import connect
from ..topology.process import Process
from . import preflight
from .preflight import Link, Member, Pair, Report

GRACE_SECONDS = 5
"""How much longer one waits for what another rank says about its own waiting."""


@dataclass(frozen=True)
class Place:
    """Who this rank is, and over what it talks."""

    process: Process
    device: torch.device
    family: hardware.Hardware
    backend: str


def here() -> Place:
    """Find out who this rank is. Talks to nobody."""
    environ = env.read()
    process = topology.detect(environ)
    family = hardware.CPU if env.flag(environ, "ACCELERATE_USE_CPU") else hardware.detect()
    device = torch.device("cpu") if family is hardware.CPU else family.device(process.local_rank)
    family.select(device)
    return Place(process, device, family, connect.choose_backend(None, device.type, family.backend))


def examine(place: Place, store: Any, limit_seconds: float, tell: Callable[[str], object] = str) -> Report:
    """Call the roll, and try every pair. Called on all ranks; returns the same report on all that still answer.

    Args:
        place: Who this rank is.
        store: Where the ranks meet, from `connect.join_store`.
        limit_seconds: How long the ranks of a pair may take to answer.
        tell: Called with a line for people after each step.
    """
    return _Examination(place, store, limit_seconds, tell).run()


class _Examination:
    def __init__(self, place: Place, store: Any, limit: float, tell: Callable[[str], object]) -> None:
        self.place = place
        self.rank, self.world_size = place.process.rank, place.process.world_size
        self.store = store
        self.limit = limit
        self.tell = tell
        per_machine = place.process.local_world_size
        machines = -(-self.world_size // per_machine)
        self.report = Report(
            self.world_size,
            per_machine,
            place.backend,
            limit_seconds=limit,
            expected=preflight.too_small(self.world_size, machines, env.read()),
        )

    def run(self) -> Report:
        """Do everything, and say goodbye: rank 0 may serve the store, and the others need it to the end."""
        try:
            self._call_roll()
            if self.report.ok:
                self.tell(f"all {self.world_size} processes are there")
                self._play_all(preflight.rounds(range(self.world_size)))
            return self.report
        finally:
            self._post(f"bye/{self.rank}", None)
            if self.rank == 0 and not connect.serves_store():
                there = {member.rank for member in self.report.members} - set(self.report.silent)
                self._await({rank: f"bye/{rank}" for rank in there}, GRACE_SECONDS)

    def _play_all(self, dealt: Sequence[Sequence[Pair]]) -> None:
        failing = 0
        for number, pairs_of_round in enumerate(dealt):
            usable = [pair for pair in pairs_of_round if not set(pair) & set(self.report.silent)]
            before = len(self.report.problems)
            self._play(number, usable)
            failing += len(self.report.problems) > before
            self.tell(f"pairs: round {number + 1} of {len(dealt)}")
            if failing == preflight.FAILING_ROUNDS or 0 in self.report.silent:
                left = sum(len(later) for later in dealt[number + 1 :])
                self.report = replace(self.report, untried=left)
                break
        self.report = preflight.with_slow_marked(self.report)

    def _call_roll(self) -> None:
        process = self.place.process
        machine = self.rank // process.local_world_size
        mine = Member(self.rank, machine, socket.gethostname(), os.getpid(), str(self.place.device))
        self._post(f"here/{self.rank}", asdict(mine))
        keys = {rank: f"here/{rank}" for rank in range(self.world_size)}
        wait = preflight.ROLL_CALL_FACTOR * self.limit
        came = self._decided("roll", lambda: sorted(self._await(keys, wait)), wait + GRACE_SECONDS)
        if came is None:  # rank 0 is not there
            came = [rank for rank, key in keys.items() if rank and self.store.check([key])]
        self.report = replace(self.report, members=tuple(Member(**self._read(keys[rank])) for rank in came))

    def _play(self, number: int, pairs_of_round: Sequence[Pair]) -> None:
        players = sorted(rank for pair in pairs_of_round for rank in pair)
        mine = next((pair for pair in pairs_of_round if self.rank in pair), None)
        if mine is not None:
            self._post(f"{number}/done/{self.rank}", asdict(self._try(number, mine)))
        # A pair takes twice the limit at most: until both are there, and until they have answered each other.
        wait = 2 * self.limit + GRACE_SECONDS
        keys = {rank: f"{number}/done/{rank}" for rank in players}
        done = self._decided(
            f"{number}/verdict", lambda: sorted(self._await_pairs(pairs_of_round, keys, wait)), wait + GRACE_SECONDS
        )
        if done is None:
            links = [Link(0, self.rank, "no answer")]
            self.report = replace(self.report, silent=(*self.report.silent, 0), links=(*self.report.links, *links))
            return
        links = [_joined(pair, [self._read(keys[rank]) for rank in pair if rank in done]) for pair in pairs_of_round]
        silent = set(players) - set(done)
        self.report = replace(
            self.report,
            silent=tuple(sorted({*self.report.silent, *silent})),
            links=(*self.report.links, *links),
        )

    def _try(self, number: int, pair: Pair) -> Link:
        """Try one pair, as one of the two."""
        other = pair[1] if self.rank == pair[0] else pair[0]
        self._post(f"{number}/at/{self.rank}", None)
        if not self._await({other: f"{number}/at/{other}"}, self.limit):
            return Link(*pair, f"rank {other} did not come")
        try:
            latency, speed = pairs.measure(
                self.store,
                f"{number}/{pair[0]}-{pair[1]}",
                rank=pair.index(self.rank),
                backend=self.place.backend,
                device=self.place.device,
                family=self.place.family,
                limit_seconds=self.limit,
            )
        except RuntimeError as error:
            return Link(*pair, str(error) or type(error).__name__)
        return Link(*pair, "", latency, speed)

    def _decided(self, key: str, decide: Callable[[], Any], wait: float) -> Any:
        """Return what rank 0 decides; `None` if it says nothing."""
        if self.rank == 0:
            self._post(key, decided := decide())
            return decided
        return self._read(key) if self._await({0: key}, wait) else None

    def _await(self, keys: dict[int, str], seconds: float) -> set[int]:
        """Wait until all keys are there; return those ranks whose are."""
        deadline = time.monotonic() + seconds
        there: set[int] = set()
        while True:
            there |= {rank for rank, key in keys.items() if rank not in there and self.store.check([key])}
            if len(there) == len(keys) or time.monotonic() > deadline:
                return there
            time.sleep(0.01)

    def _await_pairs(self, pairs_of_round: Sequence[Pair], keys: dict[int, str], seconds: float) -> set[int]:
        """Wait until all have told of their pair, but not long for those whose partner has."""
        deadline = time.monotonic() + seconds
        there: set[int] = set()
        half: dict[Pair, float] = {}
        while True:
            there |= {rank for rank, key in keys.items() if rank not in there and self.store.check([key])}
            now = time.monotonic()
            for pair in pairs_of_round:
                if there & set(pair):
                    half.setdefault(pair, now)
            awaited = [
                pair for pair in pairs_of_round if set(pair) - there and now < half.get(pair, now) + GRACE_SECONDS
            ]
            if not awaited or now > deadline:
                return there
            time.sleep(0.01)

    def _post(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key))


def _joined(pair: Pair, told: Sequence[dict[str, Any]]) -> Link:
    """Make one of what the two of a pair say: the worse of it."""
    links = [Link(**item) for item in told]
    if len(links) < 2:
        return Link(*pair, links[0].problem if links and links[0].problem else "no answer")
    broken = next((link for link in links if link.problem), None)
    if broken is not None:
        return broken
    return Link(
        *pair,
        "",
        max(link.latency_seconds for link in links),
        min(link.bytes_per_second for link in links),
    )


def meet(place: Place, limit_seconds: float) -> Any:
    """Join the store of the run. Blocks until it answers.

    Raises:
        LaunchError: (a `RuntimeError`) if it does not, with the address.
    """
    return connect.join_store(place.process, timedelta(seconds=preflight.ROLL_CALL_FACTOR * limit_seconds))
