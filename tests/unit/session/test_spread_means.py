"""How a mean that was repeated to the length of a full batch is told from several numbers for each row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accelerate.core.errors import SettingError
from accelerate.session.spread_means import note_full, seen_by_call, times_spread


class Loader(SimpleNamespace):
    """What a prepared loader tells of its pass."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize(
    ("pieces", "times"),
    [
        ([torch.zeros(4), torch.ones(4)], 1),
        ([torch.zeros(8), torch.ones(8)], 2),
        ([torch.full((4,), torch.nan), torch.ones(4)], 1),
        ([torch.zeros(3), torch.zeros(3)], None),  # not a full batch
        ([torch.zeros(4), torch.zeros(3)], None),
        ([torch.zeros(4), torch.arange(4.0)], None),
        ([torch.zeros(4).long(), torch.zeros(4).long()], None),
        ([torch.zeros(4, 1), torch.zeros(4, 1)], None),
        ([torch.zeros(0), torch.zeros(0)], None),
    ],
)
def test_it_is_told_by_its_length_and_one_value(pieces, times):
    assert times_spread([4, 3], 4, pieces, set()) == times


@pytest.mark.parametrize(
    ("length", "seen", "times"),
    [
        (4, {1}, 1),
        (4, {2}, None),
        (4, {1, 3}, 1),
        (4, {3}, None),
        (4, set(), None),  # there is no other step to weigh it against
        (8, {2}, 2),
        (8, {4}, None),
    ],
)
def test_where_it_could_be_numbers_for_each_row_the_full_steps_tell(length, seen, times):
    assert times_spread([2, 2], 4, [torch.ones(length)] * 2, seen) == times
    unlike = [torch.ones(length), torch.arange(float(length))]
    assert times_spread([2, 2], 4, unlike, seen) is None


def test_it_is_refused_where_full_steps_had_both():
    with pytest.raises(SettingError, match="or 2 numbers for each row"):
        times_spread([2, 2], 4, [torch.ones(4)] * 2, {1, 2})


def test_what_full_steps_had_is_noted_where_it_is_the_same_on_all_ranks():
    seen: set[int] = set()
    for leaf, lengths in (
        (torch.ones(4), [4, 8]),
        (torch.ones(6), [6, 6]),
        (torch.ones(4).long(), [4, 4]),
        (torch.ones(4, 1), [4, 4]),
    ):
        note_full(seen, 4, leaf, lengths)
    assert seen == set()
    note_full(seen, 4, torch.ones(8), [8, 8])
    assert seen == {2}


def test_calls_are_counted_in_each_batch_and_forgotten_with_the_pass():
    loader = Loader(pass_began=0, steps_given=1)
    first, second = seen_by_call(loader), seen_by_call(loader)
    assert first is not second
    loader.steps_given = 2
    assert seen_by_call(loader) is first
    assert seen_by_call(Loader(pass_began=0, steps_given=2)) is not first
    loader.pass_began, loader.steps_given = 2, 3
    assert seen_by_call(loader) is not first
    many = [seen_by_call(loader) for _ in range(1000)]
    assert len(set(map(id, many))) < 100
    assert many[0] is not many[1]
    assert seen_by_call(None) is not seen_by_call(None)
