"""A run that goes on with another number of ranks reads the same samples in the same global order.

The global order is that of steps, and within a step rank 0's rows, then rank 1's, and so on, without padding.
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.exact import training
from tests.exact.cells import Cell, Move, moves, sample_of_moves
from tests.exact.training import EPOCHS, Trace
from tests.support.ranks import run_on_ranks

Order = list[tuple[int, int]]


def global_order(traces: list[Trace]) -> Order:
    """Return (epoch, index) of all real samples of all ranks."""
    return [
        (step.epoch, index)
        for steps in zip_longest(*(trace.steps for trace in traces))
        for step in steps
        if step is not None
        for index in step.indices[: step.real]
    ]


def check(move: Move, folder: Path, tally: Counter[str], *, every: int) -> None:
    cell = move.cell
    whole = run_on_ranks(training.uninterrupted, cell.ranks, cell, folder, False)
    order, in_epoch = global_order(whole), training.steps_of_first_epoch(whole[0])
    if cell.drawn_once:
        assert sorted(order) == [(epoch, index) for epoch in range(EPOCHS) for index in range(cell.size)]
    for name in [name for name in training.names(folder) if "-" not in name][1::every]:
        done = training.steps_in(name)
        read = sum(step.real for trace in whole for step in trace.steps[:done])
        traces = run_on_ranks(training.resumed, move.to, cell, folder, name, in_epoch, None, False)
        epoch, step = divmod(done, in_epoch)
        samples = sum(item.real for trace in whole for item in trace.steps[epoch * in_epoch : done])
        for trace in traces:
            started = trace.started_at
            assert started[0] == epoch, f"{name} on {move.to} ranks"
            assert started[2] == samples or (step and not cell.counts_samples), f"{name} on {move.to} ranks"
        assert global_order(traces) == order[read:], f"{name} on {move.to} ranks"
        tally["moved runs"] += 1
    tally["moves"] += 1


@pytest.mark.parametrize("move", sample_of_moves(), ids=str)
def test_the_order_does_not_depend_on_the_number_of_ranks(move, tmp_path, tally):
    check(move, tmp_path, tally, every=13)


@pytest.mark.full
@pytest.mark.parametrize("move", moves(), ids=str)
def test_every_move_keeps_the_order(move, tmp_path, tally):
    check(move, tmp_path, tally, every=2)


@pytest.mark.parametrize(
    ("saved", "to", "loader"), [(2, 1, "torch"), (1, 2, "torch"), (2, 3, "torch"), (1, 2, "stateful")]
)
def test_a_stream_over_workers_loses_nothing_on_another_number_of_ranks(saved, to, loader, tmp_path):
    """Their order depends on how the workers take turns; the set of the samples that are left does not."""
    keeps = loader == "stateful"
    cell = Cell("iterable", "epoch", "2-persistent", saved, loader, keeps, size=50, batch_size=2)
    whole = run_on_ranks(training.uninterrupted, saved, cell, tmp_path, False)
    order, in_epoch = global_order(whole), training.steps_of_first_epoch(whole[0])
    for done in (3, in_epoch + 4):
        read = sum(step.real for trace in whole for step in trace.steps[:done])
        traces = run_on_ranks(training.resumed, to, cell, tmp_path, f"{done}", in_epoch, None, False)
        assert sorted(global_order(traces)) == sorted(order[read:])


def test_a_stream_that_moved_goes_on_exactly_from_its_next_save(tmp_path):
    """Workers that were told where to start count from there, so torchdata's state of them is not kept."""
    cell = Cell("iterable", "epoch", "2", 2, loader="stateful", keeps_state=True, size=50, batch_size=2)
    saved, moved = tmp_path / "saved", tmp_path / "moved"
    in_epoch = training.steps_of_first_epoch(run_on_ranks(training.uninterrupted, 2, cell, saved, False)[0])
    (once,) = run_on_ranks(training.resumed, 1, cell, saved, "3", in_epoch, moved, False)
    for name in ("5", "8"):
        (twice,) = run_on_ranks(training.resumed, 1, cell, moved, name, in_epoch, None, False)
        assert twice.steps == once.steps[training.steps_in(name) - 3 :]
