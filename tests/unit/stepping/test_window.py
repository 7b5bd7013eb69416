"""The arithmetic of windows: which batch ends one, and how much each loss counts. No tensors, no processes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.accumulation import plan_sync
from accelerate.stepping.window import Place, Share, next_place, share_of, units_of_step


def places(count: int, num_steps: int, *, ends: bool = True, known: bool = True, passes: int = 1) -> list[Place]:
    """Walk over a loader of `count` batches."""
    found = [Place()]
    for _ in range(passes):
        for index in range(count):
            ahead = count - index - 1 if known and ends else None
            found.append(next_place(found[-1], num_steps, ends=ends and index == count - 1, ahead=ahead))
    return found[1:]


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "num_steps", "lengths", "numbers"),
    [
        (5, 2, [2, 2, 2, 2, 1], [1, 2, 1, 2, 1]),
        (6, 3, [3] * 6, [1, 2, 3, 1, 2, 3]),
        (7, 4, [4, 4, 4, 4, 3, 3, 3], [1, 2, 3, 4, 1, 2, 3]),
        (3, 4, [3, 3, 3], [1, 2, 3]),
        (2, 1, [1, 1], [1, 1]),
    ],
)
def test_a_known_length_is_planned_at_the_first_batch(count, num_steps, lengths, numbers):
    found = places(count, num_steps, passes=2)
    assert [place.length for place in found] == lengths * 2
    assert [place.number for place in found] == numbers * 2


@pytest.mark.parametrize(("known", "ends"), [(False, True), (False, False), (True, False)])
def test_without_one_a_full_window_is_expected(known, ends):
    assert {place.length for place in places(7, 4, known=known, ends=ends, passes=2)} == {4}


@given(st.integers(1, 8), st.integers(1, 30), st.booleans(), st.booleans())
def test_places_synchronise_as_ever_and_windows_are_counted_from_one(num_steps, count, ends, known):
    step, before = 0, Place()
    for place, index in zip(
        places(count, num_steps, ends=ends, known=known, passes=2), [*range(count)] * 2, strict=True
    ):
        step, sync = plan_sync(step, num_steps, end_of_dataloader=ends and index == count - 1)
        assert (place.step, place.is_last) == (step, sync)
        assert place.number == (1 if before.is_last else before.number + 1)
        if place.is_last and (known or not ends):
            assert place.number == place.length
        before = place


def test_a_counter_from_a_checkpoint_without_gradients_leaves_a_shorter_window():
    place = next_place(Place(step=3), 4, ends=False, ahead=None)
    assert (place.number, place.length, place.is_last) == (1, 1, True)


def test_a_plan_that_did_not_come_true_is_kept_until_the_window_ends():
    place = next_place(Place(), 4, ends=False, ahead=1)  # two batches, says the loader; then the loop is broken off
    for _ in range(3):
        place = next_place(place, 4, ends=False, ahead=None)
    assert (place.number, place.length, place.is_last) == (4, 2, True)


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "reference", "target", "expected"),
    [
        (1, None, 4, Share(4, 4.0)),
        (1, 4, 4, Share(4, 4.0)),
        (1, 4, 3, Share(3, 3.0, 4 / 3)),
        (8, 32, 32.0, Share(32.0, 4.0)),
        (0, None, 4, Share(4, None)),  # where batches are reduced, it gets what other ranks had
        (0, 4, 2, Share(2, None, 2.0)),
        (0, None, 0, Share(None, None)),
    ],
)
def test_one_share(units, reference, target, expected):
    assert share_of(units, reference, target) == expected


class Sum:
    """What gradients would hold, with the exact gradients 1, 2, 3, ... of the batches."""

    def __init__(self) -> None:
        self.value, self.reference = 0.0, None

    def add(self, gradient: float, units: float, target: float) -> None:
        share = share_of(units, self.reference, target)
        self.value *= share.rescale
        self.value += gradient / share.divisor if share.divisor is not None else 0.0
        self.reference = share.reference


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(1, 5000))
def test_any_guess_is_put_right_by_the_last_share(units, guess):
    held = Sum()
    for number, count in enumerate(units, start=1):
        held.add(number, count, sum(units) if number == len(units) else guess)
    if sum(units):
        exact = Fraction(sum(number * count for number, count in enumerate(units, start=1)), sum(units))
        assert held.value == pytest.approx(float(exact), rel=1e-12)
    else:
        assert held.value == 0.0


@given(st.integers(1, 16), st.integers(1, 100_000), st.integers(1, 64))
def test_units_that_are_all_alike_divide_by_the_length_exactly(length, units, ranks):
    """So full windows are those of a plain loop, bit for bit."""
    guess = units * length
    right = ranks * units * length / ranks  # as the mean over ranks comes out of the sum
    for _ in range(length - 1):
        assert share_of(units, guess, guess) == Share(guess, length)
    assert share_of(units, guess, right) == Share(guess, length)


# Steps of a schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "filled", "number", "num_steps", "expected"),
    [
        (4, 4, 1, 1, 4),
        (4, 2, 1, 1, 2),  # the last step of 10 batches
        (2, 2, 4, 4, 2),
        (2, 2, 1, 4, 1),  # batches 9 and 10 of 10: one short window
        (2, 1, 3, 4, 2),
        (1, 1, 3, 4, 1),
    ],
)
def test_steps_that_one_process_would_have_taken(shards, filled, number, num_steps, expected):
    assert units_of_step(shards, filled, number, num_steps) == expected


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 8))
def test_a_pass_has_as_many_steps_as_a_pass_of_one_process(batches, num_steps, shards):
    rounds = -(-batches // shards)
    total = 0
    for place in places(rounds, num_steps)[: rounds + 1]:
        if place.is_last:
            is_end = place.step == 0
            filled = (batches - 1) % shards + 1 if is_end else shards
            total += units_of_step(shards, filled, place.number, num_steps)
    assert total == -(-batches // num_steps)
