"""The arithmetic of a global batch size: fixed examples, and what must hold for any numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.core.errors import SettingError, UnsupportedCombination
from accelerate.data.global_batch import GlobalBatch, check_combination, describe, plan_global_batch
from accelerate.settings.options.data import DataLoaderConfiguration

sizes, batch_sizes, counts = st.integers(1, 5000), st.integers(1, 600), st.integers(1, 24)


@pytest.mark.parametrize(
    ("size", "given_size", "count", "batch_size", "accumulation"),
    [
        (64, 32, 1, 32, 2),
        (64, 32, 2, 32, 1),
        (64, 32, 4, 16, 1),  # a share smaller than the loader's batch
        (96, 32, 2, 24, 2),  # 32 does not divide 48
        (512, 8, 4, 8, 16),
        (7, 4, 1, 1, 7),  # a prime number of samples fits in ones only
        (1, 1, 1, 1, 1),
        (6, 100, 3, 2, 1),
    ],
)
def test_examples(size, given_size, count, batch_size, accumulation):
    assert plan_global_batch(size, given_size, count) == GlobalBatch(size, batch_size, accumulation, count)


@given(sizes, batch_sizes, counts)
def test_the_parts_make_the_whole_and_no_larger_batch_would(size, given_size, count):
    if size % count:
        with pytest.raises(SettingError):
            plan_global_batch(size, given_size, count)
        return
    plan = plan_global_batch(size, given_size, count)
    assert plan.size == size == plan.batch_size * plan.accumulation * plan.count
    assert plan.count == count
    fitting = [size_ for size_ in range(1, given_size + 1) if size % (size_ * count) == 0]
    assert plan.batch_size == max(fitting)


@given(sizes, batch_sizes, counts, counts)
def test_more_processes_never_take_larger_batches(size, given_size, count, factor):
    size = size * count * factor
    few, many = (plan_global_batch(size, given_size, number) for number in (count, count * factor))
    assert many.batch_size <= given_size
    assert many.batch_size * many.accumulation * factor == few.batch_size * few.accumulation


@given(st.integers(1, 5000), counts)
def test_what_cannot_be_shared_names_the_nearest_sizes_that_can(size, count):
    if size % count == 0:
        return
    with pytest.raises(SettingError) as error:
        plan_global_batch(size, 8, count)
    (accepted,) = re.findall(r"Accepted: (.*)", str(error.value))
    named = [int(number) for number in re.findall(r"\d+", accepted)][1:]
    expected = [near for near in (size // count * count, (size // count + 1) * count) if near]
    assert named == expected
    assert all(plan_global_batch(near, 8, count) for near in named)


def test_other_ways_to_say_it_are_refused():
    check_combination(64, accumulation_steps=1, split_batches=False)
    with pytest.raises(UnsupportedCombination, match="gradient_accumulation_steps=4"):
        check_combination(64, accumulation_steps=4, split_batches=False)
    with pytest.raises(UnsupportedCombination, match="split_batches=True"):
        check_combination(64, accumulation_steps=1, split_batches=True)


@pytest.mark.parametrize("value", [0, -8, True, 2.0, "64"])
def test_the_option_takes_numbers_of_samples_only(value):
    with pytest.raises(SettingError, match=re.escape(f"global_batch_size={value!r}")):
        DataLoaderConfiguration(global_batch_size=value)


def test_the_option_is_off_by_default():
    assert DataLoaderConfiguration().global_batch_size is None
    assert DataLoaderConfiguration(global_batch_size=64).global_batch_size == 64


def test_the_line_of_a_run_says_it_in_numbers():
    plan = plan_global_batch(96, 32, 2)
    assert describe(plan, batches=9, lr_unit="optimizer step") == (
        "Global batch 96 = 2 processes x batch 24 x accumulation 2; 5 optimizer steps in an epoch; the learning rate "
        "counts in optimizer steps."
    )
    alone = describe(plan_global_batch(8, 8, 1), batches=1, lr_unit="batch of 8 sample")
    assert "1 process x batch 8 x accumulation 1; 1 optimizer step in an epoch" in alone
    assert "an unknown number of optimizer steps in an epoch" in describe(plan, batches=None, lr_unit="optimizer step")
