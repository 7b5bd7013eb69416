"""Random numbers of reading, apart from those of training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from accelerate.data.streams import (
    PrivateStream,
    Seeded,
    SeededReads,
    Snapshot,
    derive,
    numbered,
    private,
    seed_globals,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_a_snapshot_brings_all_three_generators_back():
    taken = Snapshot()
    first = draw()
    assert draw() != first
    taken.restore()
    assert draw() == first


def test_the_seed_of_a_snapshot_depends_on_each_generator_and_on_the_parts():
    seed_globals(1)
    seeds = {Snapshot().seed("a"), Snapshot().seed("b")}
    for move in (random.random, np.random.rand, lambda: torch.rand(())):
        move()
        seeds.add(Snapshot().seed("a"))
    assert len(seeds) == 5
    seed_globals(1)
    assert Snapshot().seed("a") in seeds


def test_a_private_stream_takes_nothing_from_outside_and_goes_on_where_it_was():
    seed_globals(2)
    expected = [draw(), draw()]
    seed_globals(2)
    stream, alone = PrivateStream(5), PrivateStream(5)
    with alone:
        whole = [draw() for _ in range(3)]
    with stream:
        inside = [draw()]
    outside = [draw()]
    with stream:
        inside.append(draw())
        state = None
    state = stream.state()
    outside.append(draw())
    with stream:
        inside.append(draw())
    assert inside == whole
    assert outside == expected
    again = PrivateStream(77)
    again.load_state(state)
    with again:
        assert draw() == whole[2]


def test_a_private_stream_is_left_when_its_body_raises():
    seed_globals(2)
    expected = draw()
    seed_globals(2)
    try:
        with PrivateStream(5):
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected


def test_a_private_stream_begins_as_seeded_generators_do():
    with PrivateStream(2**40 + 3):
        inside = draw()
    with PrivateStream(0):
        seed_globals(2**40 + 3)
        assert draw() == inside


@pytest.mark.parametrize(
    "move",
    [random.random, np.random.rand, lambda: np.random.rand(312), lambda: torch.rand(())],
    ids=["python", "numpy", "numpy, as often as it has words", "torch"],
)
def test_a_draw_from_any_one_generator_is_noticed(move):
    stream = PrivateStream(1)
    before = stream.state()
    with stream:
        pass
    assert not stream.has_moved_from(before)
    with stream:
        move()
    assert stream.has_moved_from(before)


def test_seeds_of_batches_differ():
    assert len({numbered(base, number) for base in range(50) for number in range(50)}) == 2500
    assert derive(1, "a", b"x") == derive(1, "a", b"x") != derive(1, "ax", b"")


def reading(draws: list[int], log: list[Any]) -> Iterator[int]:
    """Draw a random number in the batches listed."""
    for number in range(5):
        log.append(draw() if number in draws else None)
        yield number


def test_reads_are_private_and_each_follows_from_its_number_only():
    logs: list[list[Any]] = []
    for first in (0, 2):
        log: list[Any] = []
        seed_globals(first)  # the global generators do not matter
        before = Snapshot().seed()
        told: list[bool] = []
        source = reading([0, 1, 2, 3, 4], log)
        assert list(SeededReads(source, 9, first, None, told.append)) == [0, 1, 2, 3, 4]
        assert told == [True]
        assert Snapshot().seed() == before
        logs.append(log)
    assert logs[0][2:] == logs[1][:3]
    assert len(set(logs[0])) == 5


def test_reads_that_draw_nothing_at_first_are_left_to_the_global_generators():
    told: list[bool] = []
    log: list[Any] = []
    before = Snapshot().seed()
    list(SeededReads(reading([3], log), 9, 0, None, told.append))
    assert told == [False]
    assert Snapshot().seed() != before
    known: list[Any] = []
    seed_globals(1)
    list(SeededReads(reading([3], known), 9, 0, True, told.append))
    seed_globals(2)
    again: list[Any] = []
    list(SeededReads(reading([3], again), 9, 0, True, told.append))
    assert known == again
    assert told == [False]


def test_a_private_source_moves_nothing_outside():
    before = Snapshot().seed()
    log: list[Any] = []
    assert list(private(reading([0, 1, 4], log), PrivateStream(1))) == [0, 1, 2, 3, 4]
    assert Snapshot().seed() == before


class Drawing(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, tuple[float, float, float]]:
        assert type(index) is int
        return index, draw()


def test_an_index_seeds_the_worker_it_arrives_in():
    order = [Seeded([index], index // 2) for index in range(4)]
    loader = DataLoader(Drawing(), batch_sampler=order, num_workers=2, collate_fn=lambda batch: batch[0])
    found = [numbers for _, numbers in loader]
    assert found[0] == found[1] != found[2] == found[3]
    before = Snapshot().seed()
    function, arguments = order[0].__reduce__()
    assert function(*arguments) == [0]
    assert Snapshot().seed() == before, "in the main process nothing is seeded"
