"""Indices from any place of a pass on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from accelerate.core.errors import CheckpointError
from accelerate.data.feed import Check, Feed, source_of
from accelerate.data.samplers import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from accelerate.data.shards import Padding, ShardPlan
from accelerate.data.streams import Snapshot, seed_globals


class Backwards(Sampler[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count - 1, -1, -1))


class Bag(Sampler[int]):
    """Draws while it is iterated, and remembers what it has drawn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.count))
        while left:
            yield left.pop(random.randrange(len(left)))


SAMPLERS = {
    "sequential": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n)),
    "seedable": lambda n: SeedableRandomSampler(range(n), data_seed=4),
    "weighted": lambda n: WeightedRandomSampler([1.0] * n, n),
    "replacing": lambda n: RandomSampler(range(n), replacement=True),
    "custom": Backwards,
    "lazy": Bag,
}


def feed_over(batches: Any) -> Feed:
    loader = DataLoader(range(99), batch_sampler=batches)
    feed = Feed(loader)
    feed.alive = loader  # pyright: ignore[reportAttributeAccessIssue] - a feed holds its loader weakly
    return feed


def indices_of(batches: Any, begin: int, check: Check | None = None, **options: Any) -> tuple[list[Any], Feed]:
    feed = feed_over(batches)
    feed.begin(source_of(batches), begin, check, None, **options)
    return list(feed), feed


@pytest.mark.parametrize("name", SAMPLERS)
@given(
    num_samples=st.integers(1, 40), batch_size=st.integers(1, 6), count=st.integers(1, 4), drop_last=st.booleans(),
    split=st.booleans(), even=st.booleans(), data=st.data(),
)  # fmt: skip
def test_entered_anywhere_the_rest_is_the_same(name, num_samples, batch_size, count, drop_last, split, even, data):
    index = data.draw(st.integers(0, count - 1))
    size = batch_size * count if split else batch_size

    def shard() -> BatchSamplerShard:
        batches = BatchSampler(SAMPLERS[name](num_samples), size, drop_last)
        return BatchSamplerShard(batches, count, index, split_batches=split, even_batches=even)

    seed_globals(num_samples)
    whole, _ = indices_of(shard(), 0)
    seed_globals(num_samples)
    assert whole == list(shard()) or name == "lazy"  # which draws from a stream of its own
    step = data.draw(st.integers(0, len(whole)))
    begin = step * source_of(shard()).units_per_step
    seed_globals(num_samples)
    assert indices_of(shard(), begin)[0] == (whole[step:] if begin < num_samples else [])


@given(num_samples=st.integers(0, 40), rows=st.integers(1, 5), count=st.integers(1, 4), data=st.data())
def test_another_number_of_shards_continues_the_same_order(num_samples, rows, count, data):
    """Samples read on, by any number of shards, are those that are left, in their order."""
    begin = data.draw(st.integers(0, num_samples))
    for spread in (False, True):
        plans = [
            ShardPlan(index=index, count=count, batch_size=rows, begin=begin, spread=spread, even=spread)
            for index in range(count)
        ]
        shards = []
        for plan in plans:
            batches = BatchSamplerShard(
                BatchSampler(SequentialSampler(range(num_samples)), rows, False), count, plan.index
            )
            batches.even_batches, batches.spread = spread, spread
            shards.append(indices_of(batches, begin)[0])
        padding = plans[0].padding(num_samples)
        real = []
        for step in range(max(map(len, shards), default=0)):
            for index, batches in enumerate(shards):
                batch = batches[step] if step < len(batches) else []
                kept = padding[1].real[index] if padding and padding[0] == step else len(batch)
                real += batch[:kept]
        assert real == list(range(begin, num_samples))


@pytest.mark.parametrize("name", ["sequential", "custom"])
@pytest.mark.parametrize("begin", [0, 2, 4])
def test_more_shards_than_were_read_for_top_up_with_the_first_samples(name, begin):
    """A last round goes on with the first samples of the pass, even where less than a round was read before."""
    order = list(SAMPLERS[name](5))
    rounds = []
    for index in range(4):
        rounds += indices_of(BatchSamplerShard(BatchSampler(SAMPLERS[name](5), 2, False), 4, index), begin)[0]
    assert sum(rounds, []) == [order[place % 5] for place in range(begin, begin + 8)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_no_multiple_of_the_global_batch_is_left_out_wherever_entered(name):
    for begin in (0, 4):
        shards = []
        for index in range(2):
            batches = BatchSamplerShard(BatchSampler(SAMPLERS[name](15), 2, True), 2, index)
            batches.spread, batches.multiple = True, 8  # two batches are accumulated on each of two shards
            seed_globals(3)
            shards.append(indices_of(batches, begin)[0])
        assert sum(map(len, sum(shards, []))) == 8 - begin


def test_a_batch_size_that_was_changed_after_sharing_is_respected():
    batches = BatchSampler(range(12), 2, False)
    shard = BatchSamplerShard(batches, 2, 1)
    batches.batch_size = 3
    assert indices_of(shard, 0)[0] == list(shard) == [[3, 4, 5], [9, 10, 11]]


def test_the_last_batch_and_its_padding_are_known_one_ahead():
    feed = feed_over([])
    batches = BatchSamplerShard(BatchSampler(SequentialSampler(range(7)), 2, False), 2, 1)
    feed.begin(source_of(batches), 0, None, None)
    indices = iter(feed)
    assert (next(indices), feed.last, feed.paddings) == ([2, 3], None, {2: Padding((2, 2), (2, 1))})
    assert (next(indices), feed.last, feed.paddings) == ([6, 0], 2, {2: Padding((2, 2), (2, 1))})


def test_recent_indices_are_kept():
    _, feed = indices_of(BatchSampler(range(20), 2, False), 0)
    assert feed.recently(10) == [18, 19]
    assert feed.recently(9) == [16, 17]
    assert feed.recently(1) is None


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_order_that_cannot_be_drawn_again_is_refused(name):
    def batches(shift: int) -> BatchSampler:
        sampler = SAMPLERS[name](30)
        if name in ("sequential", "custom"):  # these have one order only
            sampler = [(index + shift) % 30 for index in range(30)]
        if name == "seedable":
            sampler.initial_seed += shift
        return BatchSampler(sampler, 4, False)

    seed_globals(1)
    whole, _ = indices_of(batches(0), 0)
    check = Check.of(8, whole[2])
    seed_globals(1)
    assert indices_of(batches(0), 12, check)[0] == whole[3:]
    seed_globals(2)
    with pytest.raises(CheckpointError, match="does not give the order again"):
        indices_of(batches(1), 12, check)


def test_lazy_samplers_leave_the_global_generators_alone_after_their_first_item():
    seed_globals(1)
    feed = feed_over([])
    feed.begin(source_of(BatchSampler(Bag(20), 3, False)), 0, None, None)
    indices = iter(feed)
    first = next(indices)
    before = Snapshot().seeds()
    rest = list(indices)
    assert Snapshot().seeds() == before
    seed_globals(1)
    feed.begin(source_of(BatchSampler(Bag(20), 3, False)), 0, None, None)
    again = []
    for batch in feed:
        again.append(batch)
        torch.rand(3), random.random()  # training draws in between
    assert again == [first, *rest]


class Dice(Bag):
    """Draws with replacement, from very many."""

    def __iter__(self) -> Iterator[int]:
        return iter(lambda: random.randrange(2**40), None)


def test_what_lazy_samplers_draw_is_new_in_each_pass():
    passes = []
    for _ in range(2):
        feed = feed_over([])
        feed.begin(source_of(BatchSampler(Dice(20), 3, False)), 0, None, None)
        passes.append(sum(islice(feed, 4), []))
    assert not set(passes[0]) & set(passes[1])


def test_the_first_batches_are_kept_for_topping_up():
    for name in SAMPLERS:
        seed_globals(5)
        whole, _ = indices_of(BatchSampler(SAMPLERS[name](20), 3, False), 0)
        seed_globals(5)
        rest, feed = indices_of(BatchSampler(SAMPLERS[name](20), 3, False), 12, kept=2)
        assert (rest, feed.kept) == (whole[4:], whole[:2])


def test_skips_and_shards_are_found():
    inner = BatchSampler(range(20), 2, False)
    source = source_of(SkipBatchSampler(SkipBatchSampler(BatchSamplerShard(inner, 4, 1), 2), 1))
    assert (source.skip, source.units_per_step, source.in_samples, source.size) == (3, 8, True, 20)
    assert source.num_batches(16) == 1
    own = source_of([[0], [1, 2], [3]])
    assert (own.units_per_step, own.unit, own.size, own.num_batches(1)) == (1, "batches", 3, 2)
