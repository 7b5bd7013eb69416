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
from accelerate.session.metrics import Part, Step, choose_loader, kept_lengths, step_of

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
    assert kept_lengths(cut_step((3, 3), (2, 1)), [6, 6]) is None


def test_nothing_is_guessed_where_no_rank_has_real_rows_beside_padded_ones():
    assert kept_lengths(cut_step((3, 3), (2, 0)), [7, 5]) == [7, 0]
    assert kept_lengths(cut_step((1, 0), (1, 1)), [3, 2]) == [0, 2]
    assert kept_lengths(cut_step((3, 3), (2, 0), (2, 1)), [7, 5, 5]) is None


def test_a_step_is_short_where_a_batch_is_and_full_ones_are_known():
    assert step_of(Loader(Padding((4, 3), (4, 2)), full_batch_size=4), 0, 2).is_short
    assert not step_of(Loader(Padding((4, 3), (4, 2))), 0, 2).is_short  # no batch size is known
    assert not step_of(Loader(Padding((4, 4), (4, 2)), full_batch_size=4), 0, 2).is_short
    assert not step_of(Loader(FULL, full_batch_size=4), 0, 2).is_short


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


def gather_in_pass(size: int, make: Any) -> list[int]:
    """Return how many numbers of each batch of 8 are kept, where `make` makes them of the number of its rows."""
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(size), batch_size=8))
    return [len(accelerator.gather_for_metrics(make(len(batch)))) for batch in loader]


@pytest.mark.parametrize("value", [torch.zeros, torch.rand])
def test_numbers_for_each_row_are_kept_whatever_they_are(value):
    for size in range(1, 20):
        rows = [8] * (size // 8) + [size % 8] * (size % 8 > 0)
        for times in (1, 2, 3, 4, 8):
            assert gather_in_pass(size, lambda rows, times=times: value(rows * times)) == [
                count * times for count in rows
            ]


@pytest.mark.parametrize("times", [1, 2])
def test_a_mean_counts_once_for_each_row_of_a_short_batch(times):
    for size in range(9, 16):
        assert gather_in_pass(size, lambda rows: torch.ones(8 * times)) == [8 * times, (size - 8) * times]


def test_calls_of_one_step_are_remembered_one_by_one():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(12), batch_size=8))
    found = []
    for _ in range(2):  # two passes
        for batch in loader:
            labels = torch.zeros(len(batch) * 2)
            found += [len(item) for item in accelerator.gather_for_metrics((torch.ones(8), labels))]
            found += [len(accelerator.gather_for_metrics(item)) for item in (labels, batch.float(), torch.ones(8))]
    assert found == [8, 16, 16, 8, 8, 4, 8, 8, 4, 4] * 2


def test_calls_that_bring_now_a_mean_and_now_numbers_for_each_row_are_refused():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(20), batch_size=8))
    for step, batch in enumerate(loader):
        if step < 2:
            accelerator.gather_for_metrics(torch.ones(8 + 8 * step))
            continue
        with pytest.raises(
            SettingError, match="8 equal numbers for a batch of 4 rows, where full ones have 8"
        ) as caught:
            accelerator.gather_for_metrics(torch.ones(8))
        assert "Pass the mean itself in place of mean.repeat(batch_size)" in str(caught.value)
        assert len(accelerator.gather_for_metrics(batch)) == 4


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from itertools.count()
