"""The index arithmetic: observed tables, and what must hold for any numbers."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate.core.errors import SettingError
from accelerate.data.shards import ShardPlan, mesh_data_shard


def in_batches(num_samples: int, size: int, drop_last: bool) -> list[list[int]]:
    batches = [list(range(start, min(start + size, num_samples))) for start in range(0, num_samples, size)]
    return [batch for batch in batches if len(batch) == size] if drop_last else batches


plans = st.builds(
    lambda count, rows, split, even, drop_last: [
        ShardPlan(
            index=index,
            count=count,
            batch_size=rows * count if split else rows,
            split=split,
            even=even,
            drop_last=drop_last,
        )
        for index in range(count)
    ],
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(plans, st.integers(0, 60))
def test_shards_cover_the_source_and_agree_on_lengths(shards, num_samples):
    first = shards[0]
    source = in_batches(num_samples, first.batch_size, first.drop_last)
    before = copy.deepcopy(source)
    given_out = [list(plan.walk(source)) for plan in shards]
    assert source == before
    for plan, batches in zip(shards, given_out, strict=True):
        assert plan.length(len(source), num_samples) == plan.num_batches(num_samples) == len(batches)
        if plan.even or plan.drop_last:
            assert all(len(batch) == plan.rows for batch in batches)
            assert plan.length(len(source)) == len(batches)
    samples = [i for batches in given_out for batch in batches for i in batch]
    if first.drop_last:
        assert len(samples) == len(set(samples)) == num_samples // first.stride * first.stride
    else:
        assert set(samples) == set(range(num_samples))
    if first.even:
        assert len({len(batches) for batches in given_out}) == 1
    elif not first.drop_last:
        assert sorted(samples) == list(range(num_samples))


@given(plans, st.integers(0, 60))
def test_positions_are_those_of_walking(shards, num_samples):
    for plan in shards:
        regular = [
            list(range(start, start + plan.rows))
            for start in range(plan.offset, plan.offset + plan.num_regular(num_samples) * plan.stride, plan.stride)
        ]
        source = in_batches(num_samples, plan.batch_size, plan.drop_last)
        assert regular + plan.irregular(num_samples) == list(plan.walk(source))


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 5), max_size=12),
    st.integers(1, 4),
    st.sampled_from([None, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_batches_of_changing_size_lose_nothing(sizes, count, batch_size, split, even):
    source, start = [], 0
    for size in sizes:
        source.append(list(range(start, start + size)))
        start += size
    if split and (batch_size is None or batch_size % count):
        return
    shards = [
        list(ShardPlan(index=i, count=count, batch_size=batch_size, split=split, even=even).walk(source))
        for i in range(count)
    ]
    samples = [i for batches in shards for batch in batches for i in batch]
    assert set(samples) == set(range(start))
    if even:
        assert len({len(batches) for batches in shards}) == 1
    else:
        assert len(samples) == start


def test_last_round_of_changing_sizes_is_topped_up_from_the_first():
    source = [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9], [10, 11]]
    plans_ = [ShardPlan(index=i, count=2, batch_size=4) for i in range(2)]
    assert [list(plan.walk(source)) for plan in plans_] == [
        [[0, 1], [5], [10, 11, 0, 1]],
        [[2, 3, 4], [6, 7, 8, 9], [2, 3, 4, 0]],
    ]
    unsized = ShardPlan(index=1, count=2)
    assert list(unsized.walk(source)) == [[2, 3, 4], [6, 7, 8, 9], [0, 1]]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ShardPlan(count=2, batch_size=3, split=True), "batch_size=3 .*does not divide by 2"),
        (ShardPlan(count=2, split=True), "batch_size=None .*is not known"),
        (ShardPlan(count=2, batch_size=1, split=True), "round multiple of the number of processes"),
        (ShardPlan(index=2, count=2), "process_index=2 .*num_processes=2"),
        (ShardPlan(index=0, count=0), "num_processes of at least 1"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(plan, words):
    with pytest.raises(SettingError, match=f"(?s){words}"):
        plan.check()


def test_positions_need_a_batch_size():
    with pytest.raises(SettingError, match="no positions"):
        _ = ShardPlan(count=2).stride


def test_ranks_that_differ_in_model_axes_only_share_a_shard():
    names, shape = ("dp_replicate", "dp_shard", "cp", "tp"), (2, 3, 2, 2)
    shards = {
        mesh_data_shard(names, shape, (r, s, c, t)): None
        for r in range(2)
        for s in range(3)
        for c in range(2)
        for t in range(2)
    }
    assert list(shards) == [(index, 6) for index in range(6)]
    assert mesh_data_shard(("dp", "tp"), (4, 2), (3, 1)) == (3, 4)
    assert mesh_data_shard(("fsdp",), (4,), (2,)) == (2, 4)
    assert mesh_data_shard(("sp", "tp"), (2, 2), (1, 1)) == (0, 1)


def test_nothing_is_padding_where_the_rest_is_left_out():
    assert ShardPlan(count=2, batch_size=4).padding(13) is not None
    assert ShardPlan(count=2, batch_size=4, drop_last=True).padding(13) is None
