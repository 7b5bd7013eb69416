"""Which loader results belong to, and what of them is kept: the decisions, without other processes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import SettingError
from accelerate.data.shards import Padding
from accelerate.session.metrics import Part, Step, choose_loader, kept_lengths, step_of, times_spread

FULL, SHORT = None, Padding((2, 2), (2, 1))


class Loader(SimpleNamespace):
    """What a prepared loader shows while it is iterated."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __init__(self, padding: Padding | None = FULL, inside: tuple[Loader, ...] = (), **more: Any) -> None:
        super().__init__(padding=padding, inside=inside, **more)

    def is_inside(self, loader: Loader) -> bool:
        return any(loader is one for one in self.inside)


# Which loader ----------------------------------------------------------------------------------------------------


def test_without_a_loop_there_is_no_loader():
    assert choose_loader([]) is None


def test_one_loader_is_the_one():
    loader = Loader(SHORT)
    assert choose_loader([loader]) is loader
    assert choose_loader([loader, loader]) is loader  # inside a loop over itself


def test_a_loop_inside_a_loop_is_meant():
    for one, other in ((FULL, SHORT), (SHORT, FULL)):
        training = Loader(one)
        evaluation = Loader(other, inside=(training,))
        assert choose_loader([training, evaluation]) is evaluation


def test_loops_side_by_side_have_to_be_told_apart():
    with pytest.raises(SettingError, match="2 loaders that are iterated side by side") as caught:
        choose_loader([Loader(SHORT), Loader(FULL)])
    assert "different padding: none, (2, 1) of (2, 2) rows are real" in str(caught.value)
    assert "Pass dataloader=" in str(caught.value)


def test_loops_side_by_side_inside_another_one_are_compared_with_each_other():
    training = Loader(SHORT)
    first, second = Loader(FULL, inside=(training,)), Loader(FULL, inside=(training,))
    assert choose_loader([training, first, second]) is second
    first.padding = SHORT
    with pytest.raises(SettingError, match="2 loaders that are iterated side by side"):
        choose_loader([training, first, second])


@pytest.mark.parametrize("padding", [FULL, SHORT])
def test_loops_side_by_side_are_alike_in_most_steps(padding):
    loaders = [Loader(padding), Loader(padding)]
    assert choose_loader(loaders) in loaders


def test_loaders_over_different_meshes_are_not_alike():
    with pytest.raises(SettingError, match="side by side"):
        choose_loader([Loader(torch_device_mesh="dp x tp"), Loader()])


def test_a_loop_that_was_left_by_break_is_not_meant():
    training = Loader(SHORT)
    broken_off = Loader(FULL, _left_early=1)
    assert choose_loader([training, broken_off]) is training
    assert choose_loader([broken_off]) is broken_off
    assert choose_loader([Loader(_left_early=1), broken_off]) is broken_off


def test_loaders_of_other_kinds_may_be_active():
    strange = SimpleNamespaceLoader(end_of_dataloader=False, remainder=-1)
    ours = Loader(SHORT, inside=(strange,))  # pyright: ignore[reportArgumentType]
    assert choose_loader([strange, ours]) is ours
    assert choose_loader([ours, strange]) is strange
    assert step_of(strange, 0, 2) == step_of(None, 0, 2)


class SimpleNamespaceLoader(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


# What each rank brings -------------------------------------------------------------------------------------------


def test_outside_of_a_loop_and_in_full_steps_everything_is_kept():
    for loader in (None, Loader(FULL)):
        step = step_of(loader, 0, 3)
        assert (step.ranks, step.cuts, step.copies) == ((0, 1, 2), False, frozenset())
        assert kept_lengths(step, [5, 4, 0]) == [5, 4, 0]


def test_ranks_without_a_batch_are_not_waited_for():
    step = step_of(Loader(Padding((4, 3, 0), (4, 3, 0))), 1, 3)
    assert (step.ranks, step.cuts) == ((0, 1), False)
    assert kept_lengths(step, [7, 2]) == [7, 2]
    with pytest.raises(SettingError, match="rank 2 has no batch"):
        step_of(Loader(Padding((4, 3, 0), (4, 3, 0))), 2, 3)


def cut_step(*rows_and_real: tuple[int, int]) -> Step:
    parts = tuple(Part(rank, rows, real) for rank, (rows, real) in enumerate(rows_and_real))
    return Step(parts, cuts=True, copies=frozenset())


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((4, 4), [4, 1]),
        ((12, 12), [12, 3]),
        ((0, 0), [0, 0]),
        ((4, 8), None),  # another number of entries for each row
        ((4, 5), None),
        ((5, 5), None),
        ((2, 2), None),
        ((0, 4), None),
    ],
)
def test_entries_are_kept_by_rows(lengths, kept):
    assert kept_lengths(cut_step((4, 4), (4, 1)), lengths) == kept


def test_entries_are_kept_by_each_ranks_own_rows():
    assert kept_lengths(cut_step((3, 3), (2, 0)), [6, 4]) == [6, 0]
    assert kept_lengths(cut_step((3, 3), (2, 0)), [6, 6]) is None


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
def test_a_mean_spread_over_a_full_batch_is_told_by_its_length_and_one_value(pieces, times):
    step = step_of(Loader(Padding((4, 3), (4, 2)), full_batch_size=4), 0, 2)
    assert times_spread(step, pieces) == times
    assert times_spread(step_of(Loader(Padding((4, 3), (4, 2))), 0, 2), pieces) is None  # no batch size is known
    assert times_spread(step_of(Loader(Padding((4, 4), (4, 2)), full_batch_size=4), 0, 2), pieces) is None  # is full


class Mesh:
    """Two data shards, each on two ranks."""

    mesh_dim_names = ("dp", "tp")
    mesh = torch.arange(4).view(2, 2)


def test_of_ranks_that_share_a_batch_one_counts():
    step = step_of(Loader(Padding((2, 2), (2, 1)), torch_device_mesh=Mesh()), 3, 4)
    assert [(part.rows, part.real) for part in step.parts] == [(2, 2), (2, 2), (2, 1), (2, 1)]
    assert step.copies == {1, 3}
    assert step_of(Loader(FULL, torch_device_mesh=Mesh()), 0, 4).copies == {1, 3}


@pytest.mark.parametrize(
    ("padding", "words"),
    [
        (Padding((2, 2), (-1, -1)), "slice_fn_for_dispatch gave pieces that are not rows"),
        (Padding((2, 2, 2), (2, 2, 1)), "prepared for 3 processes or groups of them, and there are 2"),
    ],
)
def test_a_loader_that_cannot_tell_is_refused(padding, words):
    with pytest.raises(SettingError, match=words) as caught:
        step_of(Loader(padding), 0, 2)
    assert "Use accelerator.gather and cut yourself" in str(caught.value)


# Alone -----------------------------------------------------------------------------------------------------------


def test_the_named_loader_must_be_iterated():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(3), batch_size=2))
    for batch in loader:
        assert accelerator.gather_for_metrics(batch, dataloader=loader) is batch
    for wrong in (loader, torch.utils.data.DataLoader(torch.arange(3))):
        with pytest.raises(SettingError, match="dataloader=DataLoader.*, which is not being iterated"):
            accelerator.gather_for_metrics(torch.zeros(2), dataloader=wrong)


def test_a_named_loader_need_not_have_a_length():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(Endless(), batch_size=2))
    assert next(accelerator.gather_for_metrics(batch, dataloader=loader) is batch for batch in loader)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from itertools.count()
