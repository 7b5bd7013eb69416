"""Random numbers of reading, apart from those of training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from accelerate.data.streams import (
    PrivateStream,
    Seeded,
    Snapshot,
    derive,
    numbered,
    private,
    seed_globals,
    seeded_reads,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_a_snapshot_brings_all_three_generators_back():
    taken = Snapshot()
    first = draw()
    assert draw() != first
    taken.restore()
    assert draw() == first


def test_the_seeds_of_a_snapshot_depend_each_on_its_generator_and_on_the_parts():
    seed_globals(1)
    first = Snapshot().seeds("a")
    assert not set(first) & set(Snapshot().seeds("b"))
    for number, move in enumerate((random.random, np.random.rand, lambda: torch.rand(()))):
        before = Snapshot().seeds("a")
        move()
        after = Snapshot().seeds("a")
        assert [place for place in range(3) if before[place] != after[place]] == [number]
    seed_globals(1)
    assert Snapshot().seeds("a") == first


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
        before = Snapshot().seeds()
        assert list(seeded_reads(reading([0, 1, 2, 3, 4], log), 9, first)) == [0, 1, 2, 3, 4]
        assert Snapshot().seeds() == before
        logs.append(log)
    assert logs[0][2:] == logs[1][:3]
    assert len(set(logs[0])) == 5


def test_reads_that_draw_now_and_then_are_private_too():
    before = Snapshot().seeds()
    log: list[Any] = []
    list(seeded_reads(reading([3], log), 9, 0))
    assert Snapshot().seeds() == before
    again: list[Any] = []
    list(seeded_reads(reading([3], again), 9, 0))
    assert log == again
    list(seeded_reads(reading([3], other := []), 8, 0))
    assert other != log


def test_reads_inside_reads_are_their_own():
    inside: list[Any] = []

    def outer() -> Iterator[int]:
        for number in range(3):
            first = draw()
            list(seeded_reads(reading([0], inside), 1, 0))
            inside.append((first, draw()))
            yield number

    list(seeded_reads(outer(), 9, 0))
    alone: list[Any] = []
    for number in range(3):
        with PrivateStream(numbered(9, number)):
            alone.append((draw(), draw()))
    assert [kept for kept in inside if kept is not None and type(kept[0]) is tuple] == alone


def test_a_stream_of_a_generator_that_was_seeded_does_not_depend_on_the_others():
    found = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(5)
        with PrivateStream(Snapshot().seeds("order")):
            found.append(draw())
    assert found[0][2] == found[1][2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_a_private_source_moves_nothing_outside():
    before = Snapshot().seeds()
    log: list[Any] = []
    assert list(private(reading([0, 1, 4], log), PrivateStream(1))) == [0, 1, 2, 3, 4]
    assert Snapshot().seeds() == before


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
    before = Snapshot().seeds()
    function, arguments = order[0].__reduce__()
    assert function(*arguments) == [0]
    assert Snapshot().seeds() == before, "in the main process nothing is seeded"
