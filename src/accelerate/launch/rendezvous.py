"""How the launchers of several machines find each other, and those of one that restarts its workers.

Owns two ways to meet for torch's agent: machines with fixed numbers (`static`), and machines that come and go
(`c10d`), which is torch's own with changes. Imports torch; only when such a run starts.

[Note: a store for each round] Workers of one attempt find each other over keys in a store. Torch keeps one store for
all attempts, and the keys are the same in each: workers that are started again may read where those before them
listened, and fail in gloo's `connectFullMesh`. And a machine that comes back waits in vain for the address of that
store, since the others do not publish it a second time. (torch 2.13. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 mends both,
and leaves the new store's port to whoever takes it first.) So each round gets a store of its own here, on a port that
the system gives while it is bound.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

from ..core.errors import LaunchError, explain
from ..settings import env
from ..topology.network import wait_until_own, wait_until_reachable, wait_until_resolvable
from .tidings import answers

OWN_FORMS = {"static": "accelerate-static", "c10d": "accelerate-c10d"}
"""Torch's ways to meet -> our forms of them."""
JOIN_SECONDS = 600
"""How long machines wait for each other by default."""
_LOOK_SECONDS = 0.2
_LEAVE_SECONDS = 5.0
"""How long a machine whose process may hold the store waits at most until the others know why the meeting ends."""
_BEGUN, _ENDED, _TOLD = "accelerate/begun", "accelerate/ended", "accelerate/told"
SILENCE_SECONDS = 30
"""How long a machine goes on while nobody answers where the machines met."""
_ASK_SECONDS = 1.0
"""How often a machine asks whether others wait to join. Torch keeps the answer for as long."""


def register() -> None:
    """Make our forms known to torch. Nothing changes the second time."""
    for name, create in ((OWN_FORMS["static"], _create_fixed), (OWN_FORMS["c10d"], _create_changing)):
        rendezvous_handler_registry.register(name, create)


@dataclass(frozen=True)
class Member:
    """One machine of a run, as it introduces itself to the others."""

    rank: int | None
    """Its number; `None` where machines are not numbered."""
    host: str
    pid: int
    machines: str
    """How many it was told to expect."""
    processes: int | None = None
    """How many processes all of them together have, if it was told."""
    backend: str = "static"
    """How it meets the others: a key of `OWN_FORMS`."""

    @classmethod
    def here(cls, parameters: RendezvousParameters, backend: str) -> Member:
        """Describe this machine, as the parameters of its meeting do."""
        least, most = parameters.min_nodes, parameters.max_nodes
        return cls(
            parameters.get_as_int("machine"),
            socket.gethostname() or "unknown",
            os.getpid(),
            str(most) if least == most else f"{least}:{most}",
            parameters.get_as_int("processes"),
            backend,
        )

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.host} (pid {self.pid})" if self.rank is None else f"machine {self.rank} ({self.host})"

    def introduce(self, store: Store) -> None:
        """Tell the others that this machine has come."""
        number = store.add("accelerate/members", 1)
        store.set(f"accelerate/member/{number}", json.dumps(asdict(self)))

    @classmethod
    def all(cls, store: Store) -> list[Member]:
        """Return those that have come, in the order in which they did."""
        texts = [store.get(f"accelerate/member/{number + 1}") for number in range(store.add("accelerate/members", 0))]
        return [cls(**json.loads(text)) for text in texts]

    def meet(self, store: Store, limit_seconds: float) -> None:
        """Introduce this machine, and wait until there are enough of them. Collective over the launchers.

        Who comes later, to a run that has begun, may take the place of a machine that has fallen.

        Raises:
            LaunchError: If too few come in time, or two contradict each other.
        """
        self.introduce(store)
        deadline = time.monotonic() + limit_seconds
        least = int(self.machines.partition(":")[0])
        try:
            while not store.check([_BEGUN]):
                members = Member.all(store)
                check_told(self, members)
                check_numbers(members)
                come = {(member.host, member.pid) if member.rank is None else member.rank for member in members}
                if len(come) >= least:
                    return
                if time.monotonic() > deadline or store.check([_ENDED]):
                    raise too_few(self, members, limit_seconds)
                time.sleep(_LOOK_SECONDS)
        except LaunchError:
            self._leave(store)
            raise
        check_told(self, Member.all(store)[:1])  # others may have come late, and in vain

    def _leave(self, store: Store) -> None:
        deadline = time.monotonic() + _LEAVE_SECONDS
        with suppress(RuntimeError):  # the store has gone already
            told = store.add(_TOLD, 1)
            if self.rank == 0:  # which takes the store along
                store.set(_ENDED, "")
            while self.rank in (0, None) and told < store.add("accelerate/members", 0) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
                told = store.add(_TOLD, 0)


class FixedMeeting(RendezvousHandler):
    """Machines 0 to N-1, each of which must come; machine 0 listens. There is no second attempt."""

    def __init__(self, host: str, port: int, member: Member, run_id: str, limit_seconds: float) -> None:
        self._host, self._port, self._member = host, port, member
        self._run_id, self._limit_seconds = run_id, limit_seconds
        self._store: Store | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all machines. Collective over the launchers.

        Raises:
            LaunchError: If one does not come in time, or two contradict each other.
        """
        if self._store is None:
            server = TCPStore(
                self._host,
                self._port,
                is_master=self._member.rank == 0,
                timeout=timedelta(seconds=self._limit_seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
            self._store = PrefixStore(self._run_id, server)
            self._member.meet(self._store, self._limit_seconds)
        assert self._member.rank is not None
        where = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(self._store, self._member.rank, int(self._member.machines), where)

    def get_backend(self) -> str:
        return OWN_FORMS["static"]

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class ChangingMeeting(RendezvousHandler):
    """Machines that come and go: torch's dynamic rendezvous, with ranks in the order of the machines' numbers.

    See [Note: a store for each round].
    """

    def __init__(
        self, inner: RendezvousHandler, store: Store, member: Member, address: str, limit_seconds: float
    ) -> None:
        self._inner, self._store, self._member = inner, store, member
        self._address, self._limit_seconds = address, limit_seconds
        self._workers_store: TCPStore | None = None
        self._has_met = False
        self._waiting = 0
        self._next_look = 0.0
        self._silent_since: float | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for enough machines. Collective over the launchers.

        Raises:
            LaunchError: If too few come in time, or two contradict each other.
        """
        self._waiting, self._next_look = 0, 0.0  # the answer of the round before is none for this one
        if not self._has_met:
            self._member.meet(self._store, self._limit_seconds)
            self._has_met = True
        try:
            # Torch then makes no store of its own for the workers, which would be the same in all rounds.
            with env.applied({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}):
                met = self._inner.next_rendezvous()
        except RendezvousTimeoutError:
            raise too_few(self._member, Member.all(self._store), self._limit_seconds) from None
        rank = self._ordered(met)
        if rank == 0:
            self._store.set(_BEGUN, "")
            self._workers_store = TCPStore("localhost", 0, is_master=True, multi_tenant=True, wait_for_workers=False)
            met.store.set("accelerate/workers", f"{self._address} {self._workers_store.port}")
        host, _, port = met.store.get("accelerate/workers").decode().rpartition(" ")
        return RendezvousInfo(met.store, rank, met.world_size, RendezvousStoreInfo(host, int(port)))

    def _ordered(self, met: RendezvousInfo) -> int:
        """Return this machine's place by number among those that met; torch sorts them by host name."""
        own = -1 if self._member.rank is None else self._member.rank
        met.store.set(f"accelerate/number/{met.rank}", str(own))
        numbers = [int(met.store.get(f"accelerate/number/{rank}")) for rank in range(met.world_size)]
        return sorted((number, rank) for rank, number in enumerate(numbers)).index((own, met.rank))

    def get_backend(self) -> str:
        return OWN_FORMS["c10d"]

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Return how many machines wait to join; 0 for a while if the store does not answer.

        The workers then fail soon, and say why, or come to their end.

        Raises:
            RendezvousConnectionError: If it has not answered for long.
        """
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _ASK_SECONDS
            if answers(self._store):
                self._silent_since = None
                self._waiting = self._inner.num_nodes_waiting()
            else:
                self._silent_since = self._silent_since or now
                self._waiting = 0
                if now - self._silent_since > SILENCE_SECONDS:
                    raise RendezvousConnectionError(f"nobody has answered for {SILENCE_SECONDS} s")
        return self._waiting

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return answers(self._store) and self._inner.shutdown()


def check_told(own: Member, members: Sequence[Member]) -> None:
    """Refuse machines that were told different things about the run.

    Raises:
        LaunchError: If one contradicts this one.
    """
    for other in members:
        if other.backend != own.backend:
            raise _contradiction(
                f"{own.name} meets the others by {own.backend}, and {other.name} by {other.backend} (rdzv_backend).",
                "Pass the same --rdzv_backend, --max_restarts and --num_machines everywhere: runs that can begin again "
                "meet by c10d.",
            )
        if other.machines != own.machines:
            raise _contradiction(
                f"{own.name} was told that this run has {own.machines} machine(s) (num_machines), and {other.name} that "
                f"it has {other.machines}.",
                "Pass the same --num_machines everywhere, and end launches that are left over from another run.",
            )
        if None not in (own.processes, other.processes) and other.processes != own.processes:
            raise _contradiction(
                f"{own.name} was told that this run has {own.processes} process(es) (num_processes), and {other.name} that "
                f"it has {other.processes}.",
                "Pass the same --num_processes everywhere: it counts the processes of all machines.",
            )


def _contradiction(problem: str, remedy: str) -> LaunchError:
    return LaunchError(explain(problem, accepted="the same on all machines", remedy=remedy))


def check_numbers(members: Sequence[Member]) -> None:
    """Refuse two machines with one number.

    Raises:
        LaunchError: If there are two. On the same host it is a launcher that was started again.
    """
    by_rank: dict[int, Member] = {}
    for member in members:
        if member.rank is not None and by_rank.setdefault(member.rank, member).host != member.host:
            raise LaunchError(
                explain(
                    f"Two machines say that they are machine {member.rank}: {by_rank[member.rank].host} and {member.host}.",
                    remedy="Give every machine its own --machine_rank, from 0.",
                )
            )


def too_few(own: Member, members: Sequence[Member], seconds: float) -> LaunchError:
    """Say which machines have come, and which have not."""
    least, _, most = own.machines.rpartition(":")
    come = {member.name if member.rank is None else member.rank: member.name for member in members}
    named = ", ".join(sorted(come.values()))
    if len(come) >= int(least or most):
        return LaunchError(
            explain(
                f"The machines of this run did not all meet within {seconds:g} s, though each has come before: {named}.",
                remedy="Look which of them has ended or does not answer, and what it says.",
            )
        )
    missing = [f"machine {rank}" for rank in range(int(most)) if own.rank is not None and rank not in come]
    told = f"What has come: {named}" + (f"; missing: {', '.join(missing)}." if missing else ".")
    return LaunchError(
        explain(
            f"Not all of the {own.machines} machines of this run have come within {seconds:g} s. {told}",
            accepted="the same command on all machines, each with its own --machine_rank",
            remedy="Look whether the missing ones have started, and what they say; --rdzv_conf timeout=SECONDS waits longer.",
        )
    )


def _create_fixed(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=-1)
    limit_seconds = float(parameters.get("timeout", JOIN_SECONDS))
    rank = int(parameters.get("machine"))
    _find(parameters, host, port, limit_seconds, is_first=rank == 0)
    return FixedMeeting(host, port, Member.here(parameters, "static"), parameters.run_id, limit_seconds)


def _create_changing(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=-1)
    limit_seconds = float(parameters.get("join_timeout", JOIN_SECONDS))
    is_first = parameters.get_as_bool("is_host")
    if host != "localhost" or parameters.max_nodes > 1:
        _find(parameters, host, port, limit_seconds, is_first=is_first)
    backend, store = create_backend(parameters)
    inner = create_handler(store, backend, parameters)
    member = Member.here(parameters, "c10d")
    address = parameters.local_addr or socket.getfqdn()
    return ChangingMeeting(inner, PrefixStore(parameters.run_id, store), member, address, limit_seconds)


def _find(
    parameters: RendezvousParameters, host: str, port: int, limit_seconds: float, *, is_first: bool | None
) -> None:
    """Make sure that the first machine is where it is said to be.

    Args:
        parameters: Those of the meeting.
        host: Where the first machine listens.
        port: The same.
        limit_seconds: How long to wait for its launcher.
        is_first: Whether this machine is the first one; `None` if it is if the address is its own.
    """
    described = str(parameters.get("described", ""))
    if is_first is None:
        wait_until_resolvable(host, port, described)
    if is_first is None and _matches_machine_hostname(host):
        # Torch asks the same, and lets one of several launchers here be the first.
        wait_until_reachable(host, port, described, limit_seconds, may_be_free=True)
    elif is_first:
        wait_until_own(host, port, described)
    else:
        wait_until_reachable(host, port, described, limit_seconds)
