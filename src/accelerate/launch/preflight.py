"""What a preflight looks at, and what it says: which ranks are there, which pairs can talk, and what to do if not.

Owns the plan, the words and the remedies. Pure, and without torch; `launch.links` does the talking.

[Note: pairs before everything else] A group of all ranks connects every rank to every other one, and when that does not
succeed, torch says that some rank was lost after half an hour. So the ranks meet in a store first, then every pair makes
a group of its own with a time limit; only when all of them work, a group of all ranks is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import LaunchError
from .plan import LaunchPlan

PAIR_SECONDS = 20
"""How long the two ranks of a pair may take to answer each other."""
ROLL_CALL_FACTOR = 3
"""How many times as long ranks may take to come: their interpreters load torch first."""
FAILING_ROUNDS = 3
"""After as many rounds with failures the rest is not tried: each costs the time limit."""
SLOW = 0.25
"""A pair is called slow if it moves less than this share of what is usual between such ranks."""
SHOWN_PAIRS = 64
SCRIPT = Path(__file__).parents[1] / "test_utils" / "scripts" / "preflight.py"

Pair = tuple[int, int]


class PreflightFailed(LaunchError):
    """The ranks of a run cannot work together; says which ones, and what to do."""


def rounds(ranks: Sequence[int]) -> tuple[tuple[Pair, ...], ...]:
    """Deal every pair of ranks into rounds in which no rank has two partners, as in a tournament.

    All ranks are busy in every round, but for one in turn where their number is odd.
    """
    seats: list[int | None] = [*ranks] if len(ranks) % 2 == 0 else [*ranks, None]
    dealt = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        dealt.append(tuple(sorted((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None)))
        seats = [seats[0], seats[-1], *seats[1:-1]]  # all but the first move on by one seat
    return tuple(dealt)


@dataclass(frozen=True)
class Member:
    """One rank that is there."""

    rank: int
    machine: int
    """Which machine of the run, from 0."""
    host: str
    pid: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Rank and host, as people look for them."""
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True)
class Link:
    """What came of one pair."""

    first: int
    second: int
    problem: str = ""
    """Empty if the two can talk."""
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    slow: bool = False


@dataclass(frozen=True)
class Report:
    """What a preflight found."""

    world_size: int
    per_machine: int
    backend: str
    members: tuple[Member, ...] = ()
    links: tuple[Link, ...] = ()
    silent: tuple[int, ...] = ()
    """Ranks that were there at first and did not answer any more."""
    untried: int = 0
    """How many pairs were left out after others had failed."""
    limit_seconds: float = PAIR_SECONDS
    expected: str = ""
    """Who says that the run should be larger than it is; empty if nobody does."""

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that never came."""
        return tuple(sorted(set(range(self.world_size)) - {member.rank for member in self.members}))

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words, the remedies included; empty if all is well."""
        if self.expected:
            return [self.expected]
        if self.missing:
            return [missing(self)]
        found = [silence(self, rank) for rank in self.silent]
        failed = [link for link in self.links if link.problem and not {link.first, link.second} & set(self.silent)]
        return found + [break_between(self, link) for link in failed]

    @property
    def ok(self) -> bool:
        """Whether the ranks can work together."""
        return not self.problems

    def member(self, rank: int) -> Member:
        """Return who a rank is."""
        return next(member for member in self.members if member.rank == rank)

    def as_json(self) -> dict[str, Any]:
        """Return everything as values that JSON knows."""
        return {
            "ok": self.ok,
            "problems": self.problems,
            "world_size": self.world_size,
            "backend": self.backend,
            "missing": list(self.missing),
            "silent": list(self.silent),
            "members": [asdict(member) for member in self.members],
            "links": [asdict(link) for link in self.links],
            "untried": self.untried,
        }


def with_slow_marked(report: Report) -> Report:
    """Mark the pairs that move much less than is usual between ranks of one machine, or of two."""
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for link in report.links:
        if not link.problem:
            kinds[_share_machine(report, link)].append(link.bytes_per_second)
    import statistics  # costs 5 ms that only the report of a check needs

    usual = {kind: statistics.median(values) if values else 0.0 for kind, values in kinds.items()}
    marked = tuple(
        replace(
            link,
            slow=not link.problem and link.bytes_per_second < SLOW * usual[_share_machine(report, link)],
        )
        for link in report.links
    )
    return replace(report, links=marked)


def too_small(world_size: int, machines: int, environ: Mapping[str, str]) -> str:
    """Say that a job controller started more machines than this run has; empty if that is not so.

    Each machine forms a run of its own then, and trains alone.
    """
    for name, where in (("SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"), ("PET_NNODES", "")):
        value = environ.get(name, "")
        if value.isdecimal() and int(value) > machines:
            of = f" ({environ[where]})" if environ.get(where) else ""
            return (
                f"Wrong number of processes: this run has {world_size} on {machines} machine(s), but {name}={value} says "
                f"that {value} machines{of} take part; each would train alone.\n"
                f"Pass --num_machines {value} with --machine_rank, --main_process_ip and --main_process_port on each."
            )
    return ""


def missing(report: Report) -> str:
    """Say which ranks never came, by machine."""
    by_machine: dict[int, list[int]] = {}
    for rank in report.missing:
        by_machine.setdefault(rank // report.per_machine, []).append(rank)
    whole = [
        f"machine {machine} (its ranks {_listed(ranks)})"
        if len(ranks) > 1
        else f"machine {machine} (its rank {ranks[0]})"
        for machine, ranks in by_machine.items()
        if len(ranks) == report.per_machine
    ]
    parts = [
        f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)} of machine {machine}"
        for machine, ranks in by_machine.items()
        if len(ranks) < report.per_machine
    ]
    here = ", ".join(member.name for member in report.members[:8]) + (", ..." if len(report.members) > 8 else "")
    return (
        f"Wrong number of processes: {len(report.members)} of {report.world_size} came within "
        f"{ROLL_CALL_FACTOR * report.limit_seconds:g} s. Missing: {'; '.join(whole + parts)}. Here: {here}.\n"
        "Look at the output of the machines that are missing; check that the same command runs on each, with its own "
        "--machine_rank, and that the main address and port can be reached from there."
    )


def silence(report: Report, rank: int) -> str:
    """Say that a rank came, and does not answer any more."""
    member = report.member(rank)
    partners = [link for link in report.links if rank in (link.first, link.second) and link.problem]
    pairs = ", ".join(f"{link.first} - {link.second}" for link in partners)
    seen = f" Pair{'s' if len(partners) > 1 else ''} {pairs} failed." if pairs else ""
    return (
        f"{member.name.capitalize()} does not answer, for {report.limit_seconds:g} s: process {member.pid} is stopped, "
        f"stuck or gone.{seen}\n"
        f"On {member.host}, look at `ps -o stat,wchan:20,cmd -p {member.pid}` (T: somebody stopped it; D: it waits for "
        f"the system or a driver), and at `dmesg`{'' if _on_cpu(report) else f' for errors of {member.device}'}."
    )


def break_between(report: Report, link: Link) -> str:
    """Say that two ranks cannot talk, and what to do."""
    first, second = report.member(link.first), report.member(link.second)
    said = link.problem.splitlines()[0]
    return f"{first.name.capitalize()} and {second.name} cannot talk over {report.backend}: {said}\n" + remedy(
        report.backend, same_host=first.host == second.host, hosts=(first.host, second.host)
    )


def remedy(backend: str, *, same_host: bool, hosts: tuple[str, str] = ("", "")) -> str:
    """Return what to try when two ranks cannot talk: the variables, in the order in which to try them."""
    nccl = "nccl" in backend
    if nccl and same_host:
        return (
            "Set NCCL_P2P_DISABLE=1 and try again. If that helps, the direct way between these two devices is broken: "
            "see `nvidia-smi topo -m`, and turn off IOMMU and PCIe access control (ACS) in the firmware. If it does "
            "not, set NCCL_SHM_DISABLE=1 (a small /dev/shm, as in containers), then NCCL_DEBUG=INFO."
        )
    if nccl:
        return (
            f"Set NCCL_SOCKET_IFNAME to the interface by which {hosts[0]} reaches {hosts[1]} (`ip -br addr`), on all "
            "machines; open all TCP ports between them in the firewall, not only the main one. With InfiniBand, try "
            "NCCL_IB_DISABLE=1. NCCL_DEBUG=INFO shows what was chosen."
        )
    if same_host:
        return (
            "Set GLOO_SOCKET_IFNAME=lo and try again: the name of this machine leads to an address that it cannot reach "
            "itself (see `getent hosts $(hostname)`)."
        )
    return (
        f"Set GLOO_SOCKET_IFNAME to the interface by which {hosts[0]} reaches {hosts[1]} (`ip -br addr`), on all machines; "
        "open all TCP ports between them in the firewall, not only the main one."
    )


def table(report: Report) -> str:
    """Return what every pair reached, for people."""
    hosts = dict.fromkeys(member.host for member in report.members)
    if len(report.members) == 1:
        return f"1 process on {report.members[0].device}"
    head = f"{len(report.members)} processes on {len(hosts)} machine(s), {report.backend}"
    shown = sorted(report.links, key=lambda link: (not link.problem, not link.slow, link.first, link.second))
    rows = [("pair", "machines", "latency", "bandwidth"), *(_row(report, link) for link in shown[:SHOWN_PAIRS])]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip()
        for row in rows
    ]
    if len(shown) > SHOWN_PAIRS:
        lines.append(f"and {len(shown) - SHOWN_PAIRS} pairs more, all well; --json shows them")
    if report.untried:
        lines.append(f"{report.untried} pairs were not tried after these failures")
    return "\n".join([head, *lines])


def _row(report: Report, link: Link) -> tuple[str, str, str, str]:
    first, second = report.member(link.first).host, report.member(link.second).host
    where = first if first == second else f"{first} - {second}"
    if link.problem:
        return (f"{link.first} - {link.second}", where, "FAILED", "")
    speed = f"{link.bytes_per_second / 1e9:.2f} GB/s{'  slow' if link.slow else ''}"
    return (f"{link.first} - {link.second}", where, f"{link.latency_seconds * 1e6:.0f} us", speed)


def before(plan: LaunchPlan, python: str) -> LaunchPlan:
    """Return a plan whose processes do a preflight first, and become what they were to be if all is well."""
    quiet = ("--quiet",) if plan.quiet else ()
    return replace(plan, argv=(python, "-u", str(SCRIPT), *quiet, "--then", *plan.argv))


def _share_machine(report: Report, link: Link) -> bool:
    return report.member(link.first).host == report.member(link.second).host


def _on_cpu(report: Report) -> bool:
    return report.backend == "gloo"


def _listed(ranks: Iterable[int]) -> str:
    """Write ranks as people do: 1, 3-5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
