"""Ranks, here threads of one process, that look for a place which all of them reach."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

import pytest
import torch.distributed as dist

from accelerate.collectives.crossing import Crossing, Outcome, Report


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def crossings(store: dist.Store, world_size: int) -> list[Crossing]:
    return [Crossing(store.clone(), "test", rank, world_size) for rank in range(world_size)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as executor:
        yield executor


def stand(pool: ThreadPoolExecutor, crossing: Crossing, *place: int, patience: float = 20) -> Future[Outcome]:
    return pool.submit(crossing.stand, place, patience)


def test_all_at_one_place_have_met(store, pool):
    standing = [stand(pool, crossing, 0, 3) for crossing in crossings(store, 3)]
    assert [outcome.result() for outcome in standing] == [Outcome.MET] * 3


def test_a_rank_goes_on_from_behind_another_one_and_meets_it(store, pool):
    first, second = crossings(store, 2)
    behind = stand(pool, first, 0, 3)
    second.move((0, 4))
    assert behind.result() is Outcome.GO_ON
    standing = [stand(pool, first, 0, 4), stand(pool, second, 0, 4)]
    assert [outcome.result() for outcome in standing] == [Outcome.MET] * 2


def test_a_rank_goes_on_when_another_ones_loop_ends_before_it_comes_there(store, pool):
    first, second = crossings(store, 2)
    second.move((0, 3))
    standing = stand(pool, first, 0, 3)
    assert not standing.done()
    second.move((1, 1))
    assert standing.result() is Outcome.GO_ON


def test_a_rank_goes_on_when_another_one_has_ended(store, pool):
    first, second = crossings(store, 2)
    standing = stand(pool, first, 0, 3)
    closing = pool.submit(second.close)
    assert standing.result() is Outcome.GO_ON
    first.close()
    closing.result()


def test_nobody_waits_for_longer_than_it_may_and_all_hear_of_it(store, pool):
    first, second = crossings(store, 2)
    second.move((0, 1))
    assert stand(pool, first, 0, 3, patience=0.05).result() is Outcome.GIVEN_UP
    assert stand(pool, second, 0, 3).result() is Outcome.GIVEN_UP
    assert second.who_gave_up() == "rank 0 waited for 0 s"
    assert second.reports() == [Report((0, 3), True), Report((0, 3), True)]


def test_a_call_wakes_all_and_the_first_reason_counts(store, pool):
    ranks = crossings(store, 3)
    listening = [pool.submit(crossing.listen) for crossing in ranks]
    ranks[1].call("rank 1 received SIGTERM")
    ranks[2].call("rank 2 received SIGUSR1")
    assert [heard.result() for heard in listening] == [True] * 3
    assert ranks[0].reason == "rank 1 received SIGTERM"


def test_closing_ends_listening(store, pool):
    ranks = crossings(store, 2)
    listening = [pool.submit(crossing.listen) for crossing in ranks]
    for closed in [pool.submit(crossing.close) for crossing in ranks]:
        closed.result()
    assert [heard.result() for heard in listening] == [False] * 2


@pytest.mark.parametrize("seed", range(20))
def test_ranks_that_run_at_any_speed_and_take_different_numbers_of_steps_meet_at_one_place(store, pool, seed):
    draw = Random(seed)
    world_size, stretches = draw.choice([2, 3, 4]), 6
    # Where each rank's loops end; from the last one all come to the same places.
    lengths = [[draw.randint(1, 4) for _ in range(stretches)] + [50] for _ in range(world_size)]
    start = threading.Barrier(world_size)

    def run(rank: int, crossing: Crossing, first: tuple[int, int]) -> tuple[int, int] | None:
        start.wait(20)
        crossing.speak_for(first)
        for stretch, length in enumerate(lengths[rank]):
            crossing.move(max(first, (stretch, 1)))
            for step in range(1, length + 1):
                if (stretch, step) >= first and crossing.stand((stretch, step), 20) is Outcome.MET:
                    return stretch, step
        return None

    ranks = crossings(store, world_size)
    running = [pool.submit(run, rank, crossing, (draw.randint(0, 3), 1)) for rank, crossing in enumerate(ranks)]
    assert len({place.result() for place in running}) == 1
    assert running[0].result() is not None
