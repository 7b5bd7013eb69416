"""Ranks that try out their links: real gloo processes, one of which is stopped, blocked or absent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from accelerate.collectives import pairs
from accelerate.launch import links
from accelerate.launch.preflight import Report
from tests.support.ranks import run_on_ranks

LIMIT_SECONDS = 3.0


def examine(machines_of: int | None = None) -> tuple[Report, float]:
    if machines_of is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(machines_of)
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % machines_of)
    place = links.here()
    store = links.meet(place, LIMIT_SECONDS)
    began = time.monotonic()
    return links.examine(place, store, LIMIT_SECONDS), time.monotonic() - began


def all_well() -> Report:
    return examine()[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_pair_is_measured_and_all_ranks_hear_of_it(world_size):
    reports = run_on_ranks(all_well, world_size)

    assert reports == [reports[0]] * world_size
    assert reports[0].ok
    expected = [(a, b) for a in range(world_size) for b in range(a + 1, world_size)]
    assert sorted((link.first, link.second) for link in reports[0].links) == expected
    assert all(link.latency_seconds > 0 and link.bytes_per_second > 0 for link in reports[0].links)


@pytest.fixture
def store_port():
    """Serve the store of a run, as a launcher does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def stopped_in_its_first_transfer(victim: int, port: int, folder: Path) -> tuple[Report, float] | None:
    """One rank is stopped by a signal while its partner waits for its data; the last of the others lets it go on."""
    links.GRACE_SECONDS = 2
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    rank = int(os.environ["RANK"])
    if rank == victim:
        pairs._sum = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    report, seconds = examine()
    if rank == victim:
        return None
    (folder / str(rank)).touch()
    if len(list(folder.iterdir())) == report.world_size - 1:
        os.kill(report.member(victim).pid, signal.SIGCONT)
    return report, seconds


@pytest.mark.parametrize(
    ("world_size", "victim"), [(2, 1), *(pytest.param(4, v, marks=pytest.mark.full) for v in (0, 3))]
)
def test_a_stopped_rank_is_named_within_the_limit(world_size, victim, store_port, tmp_path):
    results = run_on_ranks(stopped_in_its_first_transfer, world_size, victim, store_port, tmp_path)

    for report, seconds in (result for result in results if result is not None):
        (problem,) = report.problems
        assert problem.startswith(f"Rank {victim} (")
        assert "does not answer" in problem
        assert f"process {report.member(victim).pid} is stopped, stuck or gone" in problem
        # Its partner waits once for it, the others for what the partner says, and all for what the victim would say.
        assert seconds < 4 * LIMIT_SECONDS + 3 * 2
        broken = [link for link in report.links if link.problem]
        assert all(victim in (link.first, link.second) for link in broken)
        assert broken, "the pair is named too"


def blocked_between(first: int, second: int) -> Report:
    """Two ranks are well, but what they send each other does not arrive."""
    measure, rank = pairs.measure, int(os.environ["RANK"])

    def blocked(store, name, **options):
        if rank == first and name.endswith(f"/{first}-{second}"):
            # It makes the connection and sends nothing over it, which is what the other end of a blocked link sees.
            pairs._sum = lambda *_: time.sleep(2 * LIMIT_SECONDS)
            try:
                measure(store, name, **options)
            finally:
                pairs._sum = summed
            raise RuntimeError("nothing was sent")
        return measure(store, name, **options)

    summed = pairs._sum
    pairs.measure = blocked
    return examine(machines_of=2)[0]


@pytest.mark.full
def test_a_blocked_pair_is_named_and_the_others_go_on():
    reports = run_on_ranks(blocked_between, 4, 1, 2)

    for report in reports:
        (problem,) = report.problems
        assert "Rank 1 (" in problem
        assert "rank 2 (" in problem
        assert "cannot talk over gloo" in problem
        assert "GLOO_SOCKET_IFNAME" in problem
        assert sorted((link.first, link.second) for link in report.links if not link.problem) == [
            (0, 1), (0, 2), (0, 3), (1, 3), (2, 3),
        ]  # fmt: skip


def come_if_below(count: int) -> Report | None:
    return examine(machines_of=2)[0] if int(os.environ["RANK"]) < count else None


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "words"),
    [(2, "Missing: machine 1 (its ranks 2-3)."), (3, "Missing: rank 3 of machine 1.")],
)
def test_ranks_that_do_not_come_are_named(count, words):
    reports = run_on_ranks(come_if_below, 4, count)

    for report in reports[:count]:
        (problem,) = report.problems
        assert problem.startswith(f"Wrong number of processes: {count} of 4 came within 9 s. ")
        assert words in problem
