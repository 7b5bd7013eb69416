"""Samplers: observed tables, and equality of drawing an order at once with walking it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler

from accelerate.core.errors import SettingError
from accelerate.data import samplers
from accelerate.data.iterables import IterableDatasetShard
from accelerate.data.samplers import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from accelerate.data.shards import ShardPlan
from tests.support.data_tables import TABLES, Counting, SizedCounting, expected_cell


@pytest.mark.parametrize("source", [range, lambda n: SequentialSampler(range(n))], ids=["walked", "computed"])
def test_batch_sampler_shards_are_those_of_the_table(source):
    table = TABLES["BatchSamplerShard"]
    assert len(table) == 288
    for key in table:
        cell, expected = expected_cell("BatchSamplerShard", key)
        batches = BatchSampler(source(cell["n"]), cell["bs"], bool(cell["drop_last"]))
        shards = [
            BatchSamplerShard(batches, cell["P"], rank, bool(cell["split"]), bool(cell["even"]))
            for rank in range(cell["P"])
        ]
        got = {"batches": [list(shard) for shard in shards], "len": [len(shard) for shard in shards]}
        if source is range and not (cell["even"] or cell["drop_last"]):
            got["len"] = [len(batches) for batches in got["batches"]]  # the table's numbers are for known sizes
        assert got == expected, key


def test_iterable_shards_are_those_of_the_table():
    table = TABLES["IterableDatasetShard_items_seen"]
    assert len(table) == 96
    for key, expected in table.items():
        cell, _ = expected_cell("IterableDatasetShard_items_seen", key)
        shards = [
            IterableDatasetShard(
                SizedCounting(cell["n"]), cell["bs"], bool(cell["drop_last"]), cell["P"], rank, bool(cell["split"])
            )
            for rank in range(cell["P"])
        ]
        assert [list(shard) for shard in shards] == expected, key
        assert [len(shard) for shard in shards] == [len(samples) for samples in expected], key


def test_split_that_does_not_divide_is_refused():
    for rank, error in TABLES["split_not_divisible"].items():
        assert error == "ValueError"
        with pytest.raises(ValueError, match="(?s)batch_size=3.*split_batches=False"):
            BatchSamplerShard(BatchSampler(range(6), 3, False), 2, int(rank), split_batches=True)
    with pytest.raises(ValueError, match="batch_size=1"):
        IterableDatasetShard(Counting(4), batch_size=1, num_processes=2, split_batches=True)


class Walked(BatchSampler):
    """torch's batch sampler under another type, which is therefore walked."""


@settings(max_examples=150, deadline=None)
@given(
    num_samples=st.integers(1, 70),
    count=st.integers(1, 5),
    rows=st.integers(1, 4),
    split=st.booleans(),
    even=st.booleans(),
    drop_last=st.booleans(),
    kind=st.sampled_from(["sequential", "own generator", "global generator", "seedable"]),
)
def test_drawing_an_order_at_once_equals_walking_it(num_samples, count, rows, split, even, drop_last, kind):
    def passes(batch_sampler_class, rank):
        torch.manual_seed(3)
        dataset, generator = range(num_samples), torch.Generator().manual_seed(5)
        sampler = {
            "sequential": lambda: SequentialSampler(dataset),
            "own generator": lambda: RandomSampler(dataset, generator=generator),
            "global generator": lambda: RandomSampler(dataset),
            "seedable": lambda: SeedableRandomSampler(dataset, generator=generator, data_seed=2),
        }[kind]()
        source = batch_sampler_class(sampler, rows * count if split else rows, drop_last)
        shard = BatchSamplerShard(source, count, rank, split, even)
        seen = [list(shard), list(shard)]  # a second pass shows what the first took from the generators
        return seen, generator.get_state().tolist(), torch.get_rng_state().tolist(), getattr(sampler, "epoch", None)

    for rank in range(count):
        assert passes(BatchSampler, rank) == passes(Walked, rank)


@pytest.mark.parametrize("num_samples", [1, 2, 1000, 70_001])
def test_shortcuts_draw_what_torch_draws(num_samples):
    assert samplers._shortcuts_hold()
    mine, torchs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.equal(samplers._permutation(num_samples, mine).long(), torch.randperm(num_samples, generator=torchs))
    samplers._skip_permutation(num_samples, mine)
    torch.randperm(num_samples, generator=torchs)
    assert torch.equal(mine.get_state(), torchs.get_state())


def test_without_shortcuts_the_order_is_the_same(monkeypatch):
    source = BatchSampler(RandomSampler(range(50), generator=torch.Generator().manual_seed(4)), 3, False)
    expected = list(BatchSamplerShard(source, 2, 1)), list(BatchSamplerShard(source, 2, 1))
    monkeypatch.setattr(samplers, "_shortcuts_hold", lambda: False)
    source = BatchSampler(RandomSampler(range(50), generator=torch.Generator().manual_seed(4)), 3, False)
    assert (list(BatchSamplerShard(source, 2, 1)), list(BatchSamplerShard(source, 2, 1))) == expected


def test_only_own_rows_become_numbers(monkeypatch):
    walked = []
    monkeypatch.setattr(ShardPlan, "walk", lambda self, source: walked.append(source) or iter(()))
    for sampler in (SequentialSampler(range(9)), RandomSampler(range(9)), SeedableRandomSampler(range(9))):
        assert list(BatchSamplerShard(BatchSampler(sampler, 2, False), 3, 1))
    assert not walked
    for sampler in (RandomSampler(range(9), replacement=True), RandomSampler(range(9), num_samples=5)):
        list(BatchSamplerShard(BatchSampler(sampler, 2, False), 3, 1))
    list(BatchSamplerShard(BatchSampler(SubsetRandomSampler([3, 4]), 2, False), 3, 1))
    assert len(walked) == 3


def test_clients_assign_rank_and_count_one_after_the_other():
    shard = BatchSamplerShard(BatchSampler(range(8), 2, False), num_processes=4, process_index=3)
    shard.num_processes = 1
    shard.process_index = 0
    assert list(shard) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(shard) == shard.total_length == 4
    shard.num_processes, shard.process_index = 3, 2
    assert list(shard) == [[4, 5], [2, 3]]
    shard.even_batches = False
    assert list(shard) == [[4, 5]]


def test_batch_sampler_without_a_size_is_shared_out_whole():
    class Bare:
        def __iter__(self):
            return iter([[0, 1], [2], [3, 4, 5]])

        def __len__(self):
            return 3

    assert [list(BatchSamplerShard(Bare(), 2, rank, even_batches=False)) for rank in range(2)] == [
        [[0, 1], [3, 4, 5]],
        [[2]],
    ]
    assert [list(BatchSamplerShard(Bare(), 2, rank)) for rank in range(2)] == [[[0, 1], [3, 4, 5]], [[2], [0, 1]]]
    assert [len(BatchSamplerShard(Bare(), 2, rank)) for rank in range(2)] == [2, 2]


def test_seedable_sampler_depends_on_seed_and_epoch_only():
    reference = TABLES["shuffle_skip_misc_2proc"]["ref_perm"]
    sampler = SeedableRandomSampler(range(12), data_seed=5)
    assert [list(sampler), list(sampler)] == [reference["5+0"], reference["5+1"]]
    sampler.set_epoch(1)
    assert list(sampler) == reference["5+1"]
    assert sampler.epoch == 2
    torch.manual_seed(1)
    torch.rand(3)
    assert list(SeedableRandomSampler(range(12))) == reference["1+0"]
    drawn = list(SeedableRandomSampler(range(12), replacement=True, num_samples=40, data_seed=1))
    assert len(drawn) == 40
    assert len(set(drawn)) < 13


def test_skip_batch_sampler_shows_what_it_shortens():
    shard = BatchSamplerShard(BatchSampler(range(10), 2, False), 2, 0)
    skip = SkipBatchSampler(shard, 1)
    assert list(skip) == list(skip) == [[4, 5], [8, 9]]
    assert (len(skip), skip.total_length, skip.batch_size, skip.drop_last) == (2, 3, 2, False)
    assert len(SkipBatchSampler(shard, 7)) == 0
    assert not hasattr(SkipBatchSampler([[1]], 0), "batch_size")
    with pytest.raises(SettingError, match="skip_batches=-1"):
        SkipBatchSampler(shard, -1)


def test_iterable_shard_forwards_the_epoch():
    class Told(Counting):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    shard = IterableDatasetShard(Told(4), batch_size=1, num_processes=2)
    shard.set_epoch(3)
    assert shard.epoch == shard.dataset.epoch == 3
    assert list(IterableDatasetShard(Counting(0), batch_size=2, num_processes=2)) == []


class CountsItself(BatchSampler):
    """Promises fewer batches than torch's own would give."""

    def __len__(self) -> int:
        return 1


def test_a_batch_sampler_that_counts_in_its_own_way_is_asked():
    assert len(BatchSamplerShard(CountsItself(range(12), 2, False), 2, 0)) == 1
    assert samplers.num_samples_of(CountsItself(range(12), 2, False)) is None
    assert samplers.num_samples_of(BatchSampler(range(12), 2, False)) == 12
