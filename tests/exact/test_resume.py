"""Training that is stopped at any step and resumed in a new process sees the same samples and has the same losses.

One run goes from the start to the end and saves at every step; from each of these checkpoints another run begins in
new processes, with new objects and other seeds. What each rank saw then has to be the end of what it saw in the
first run: epochs, indices, losses and final weights, bit for bit.

The whole grid, with every habit of resuming, is `make exact`; without it a sample of the grid runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.exact import training
from tests.exact.cells import HABITS, Cell, grid, sample_of_grid, with_habits
from tests.exact.training import EPOCHS, Trace
from tests.support.ranks import run_on_ranks


def check_uninterrupted(cell: Cell, traces: list[Trace]) -> None:
    """The run to compare with is one: it shuffles, and has all samples in each epoch."""
    assert all(trace.started_at == (0, 0, 0) for trace in traces)
    orders = [[step.indices for trace in traces for step in trace.steps if step.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for epoch in range(EPOCHS if cell.drawn_once else 0):
        read = [i for trace in traces for step in trace.steps if step.epoch == epoch for i in step.indices[: step.real]]
        assert sorted(read) == list(range(cell.size)), f"epoch {epoch}"


def run_whole(cell: Cell, folder: Path) -> list[Trace]:
    """Train from the start to the end and save at every step, which changes nothing."""
    traces = run_on_ranks(training.uninterrupted, cell.ranks, cell, folder)
    undisturbed = run_on_ranks(training.uninterrupted, cell.ranks, cell, None)
    for with_saves, without in zip(traces, undisturbed, strict=True):
        assert with_saves.steps == without.steps, "saving changed the run"
    check_uninterrupted(cell, traces)
    return traces


def check_resumed(cell: Cell, whole: list[Trace], folder: Path, name: str) -> None:
    """Resume from one checkpoint; compare with the end of the whole run."""
    done, in_epoch = training.steps_in(name), training.steps_of_first_epoch(whole[0])
    traces = run_on_ranks(training.resumed, cell.ranks, cell, folder, name, in_epoch)
    epoch, step = divmod(done, in_epoch)
    samples = sum(item.real for trace in whole for item in trace.steps[epoch * in_epoch : done])
    started_at = (epoch, step, samples if cell.counts_samples or not step else traces[0].started_at[2])
    for trace, reference in zip(traces, whole, strict=True):
        where = f"resumed from {name} ({in_epoch} steps in an epoch)"
        assert trace.started_at == started_at, where
        assert trace.steps == reference.steps[done:], where
        assert trace.ended_at == reference.ended_at, where
        assert all(map(torch.equal, trace.weights, reference.weights)), where


def check(cell: Cell, habits: tuple[str, ...], folder: Path, tally: Counter[str], which: slice = slice(None)) -> None:
    whole = run_whole(replace(cell, habit=habits[0]), folder)
    saved = training.names(folder)
    if cell.endless:
        saved.remove(f"{training.ENDLESS_STEPS}")  # the loop was left there, which a resumed one cannot know
    else:
        assert len(saved) == len(whole[0].steps) + EPOCHS
    for number, habit in enumerate(habits):
        # The first two at each step; the others, which differ from these in one call, at every other one.
        for name in saved[which] if number < 2 else saved[number % 2 :: 2]:
            check_resumed(replace(cell, habit=habit), whole, folder, name)
            tally["resumed runs"] += 1
        tally["cells"] += 1


@pytest.mark.parametrize("cell", sample_of_grid(), ids=str)
def test_a_resumed_run_is_the_rest_of_the_whole_one(cell, tmp_path, tally):
    first = sample_of_grid().index(cell) % 2
    check(cell, (cell.habit,), tmp_path, tally, which=slice(first, None, 2))


@pytest.mark.full
@pytest.mark.parametrize("cell", grid(), ids=str)
def test_every_cell_of_the_grid_is_exact(cell, tmp_path, tally):
    check(cell, HABITS, tmp_path, tally)


def test_the_sample_has_every_value_of_every_property():
    everything, sample = with_habits(grid()), sample_of_grid()
    assert set(sample) <= set(everything)
    for name in ("reads", "order", "workers", "ranks", "loader", "keeps_state", "augmented", "habit"):
        assert {getattr(cell, name) for cell in sample} == {getattr(cell, name) for cell in everything}, name


STREAMS = [
    Cell(reads, order, ranks=ranks, keeps_state=True, size=180)
    for reads in ("iterable", "dispatched-iterable")
    for order in ("epoch", "global")
    for ranks in (1, 2)
]


@pytest.mark.parametrize(
    "cell",
    [
        STREAMS[1],
        STREAMS[6],
        *(pytest.param(cell, marks=pytest.mark.full) for cell in (*STREAMS[:1], *STREAMS[2:6], STREAMS[7])),
    ],
    ids=str,
)
def test_a_stream_that_keeps_its_place_is_not_read_again(cell, tmp_path, tally):
    whole = run_whole(cell, tmp_path)
    in_epoch = training.steps_of_first_epoch(whole[0])
    for done in (in_epoch // 2, in_epoch - 3, in_epoch + in_epoch // 2 + 1):
        check_resumed(cell, whole, tmp_path, f"{done}")
        traces = run_on_ranks(training.resumed, cell.ranks, cell, tmp_path, f"{done}", in_epoch)
        left = cell.size * EPOCHS - (done // in_epoch * cell.size + traces[0].started_at[2])
        assert left <= traces[0].samples_read <= left + 18 * cell.batch_size * cell.ranks, "a few batches again"
        tally["resumed runs"] += 1


# Interrupted twice ------------------------------------------------------------------------------------------------

TWICE = [
    Cell("map", "plain", "0", 1),
    Cell("map", "numpy", "0", 2),
    Cell("map", "seedable", "2-persistent", 1),
    Cell("dispatched-map", "weighted", "0", 2),
    Cell("iterable", "epoch-buffer", "0", 2),
    Cell("dispatched-iterable", "global", "0", 1, keeps_state=True),
    Cell("iterable", "epoch", "2", 1, loader="stateful", keeps_state=True),
]


def check_twice(cell: Cell, folder: Path, *, firsts: slice, seconds: slice, tally: Counter[str]) -> None:
    whole = run_whole(cell, folder / "whole")
    in_epoch = training.steps_of_first_epoch(whole[0])
    for number, first in enumerate(training.names(folder / "whole")[firsts]):
        again = folder / f"again-{number}"
        run_on_ranks(training.resumed, cell.ranks, cell, folder / "whole", first, in_epoch, again)
        for second in training.names(again)[seconds] if again.exists() else ():
            check_resumed(cell, whole, again, second)
            tally["runs resumed twice"] += 1


@pytest.mark.parametrize(
    "cell",
    [
        replace(TWICE[0], habit="load"),
        replace(TWICE[0], habit="recipe"),
        replace(TWICE[4], habit="recipe"),
        replace(TWICE[6], habit="recipe"),
    ],
    ids=str,
)
def test_a_resumed_run_is_interrupted_again(cell, tmp_path, tally):
    # The second time in the same epoch: with `recipe` the loop runs over what `skip_first_batches` returned.
    check_twice(cell, tmp_path, firsts=slice(1, 2), seconds=slice(0, 6, 2), tally=tally)


@pytest.mark.full
@pytest.mark.parametrize("cell", with_habits(TWICE), ids=str)
def test_every_pair_of_interruptions_is_exact(cell, tmp_path, tally):
    check_twice(cell, tmp_path, firsts=slice(0, None, 3), seconds=slice(None), tally=tally)


# Accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("inside", [False, True], ids=["border", "inside"])
def test_accumulation_goes_on_after_a_save(ranks, inside, tmp_path, tally):
    """Saved between two windows, and inside one: then the gradients it has so far belong to the run."""
    cell, options = Cell("map", "plain", ranks=ranks), {"gradient_accumulation_steps": 2}
    whole = run_on_ranks(training.uninterrupted, ranks, cell, tmp_path, True, options)
    in_epoch = training.steps_of_first_epoch(whole[0])
    assert in_epoch % 2, "the last window of an epoch is short"
    for name in training.names(tmp_path):
        done = training.steps_in(name)
        if bool(done % in_epoch % 2) is not inside:
            continue
        traces = run_on_ranks(training.resumed, ranks, cell, tmp_path, name, in_epoch, None, True, options)
        for trace, reference in zip(traces, whole, strict=True):
            assert trace.steps == reference.steps[done:], name
            assert all(map(torch.equal, trace.weights, reference.weights)), name
        tally["runs resumed while accumulating"] += 1
