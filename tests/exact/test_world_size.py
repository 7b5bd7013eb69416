"""A run that goes on with another number of ranks reads the same samples in the same global order.

The global order is that of steps, and within a step rank 0's rows, then rank 1's, and so on, without padding.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
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


class Numbers(IterableDataset[torch.Tensor]):
    """0 to 63, shared out among worker processes."""

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from (torch.tensor(number) for number in range(first, 64, step))


def read_numbers(folder: Path, stop: int | None, batch_size: int, options: dict[str, Any], **loader: Any) -> list[int]:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**options))
    prepared = accelerator.prepare(DataLoader(Numbers(), batch_size=batch_size, **loader))
    seen: list[int] = []
    if stop is None:
        accelerator.load_state(folder)
    for number, batch in enumerate(prepared, start=1):
        seen += accelerator.gather_for_metrics(batch).tolist()
        if number == stop:
            accelerator.save_state(folder)
            break
    return seen


def read_numbers_after_going_back(folder: Path) -> list[list[int]]:
    """Load twice in one process whose worker processes last."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    made = DataLoader(Numbers(), batch_size=2, num_workers=2, persistent_workers=True)
    prepared, found = accelerator.prepare(made), []
    for _ in range(2):
        accelerator.load_state(folder)
        found.append(next(iter(prepared)).tolist())
    return found


@pytest.mark.parametrize(
    ("saved", "to", "sizes", "workers", "options"),
    [
        (1, 2, (8, 8), 2, {"global_batch_size": 8}),
        (1, 2, (8, 8), 0, {"global_batch_size": 8, "dispatch_batches": False}),
        (1, 2, (8, 8), 2, {"global_batch_size": 8, "dispatch_batches": False}),
        (2, 1, (8, 8), 0, {"split_batches": True, "dispatch_batches": False}),
        (1, 2, (8, 4), 0, {"dispatch_batches": False}),
        (1, 1, (4, 2), 2, {}),
        (1, 1, (4, 8), 0, {"use_stateful_dataloader": True}),
    ],
)
def test_a_stream_goes_on_in_batches_of_another_size(saved, to, sizes, workers, options, tmp_path):
    """Whether all ranks together still read as many at once, or not."""
    before = run_on_ranks(partial(read_numbers, num_workers=workers), saved, tmp_path, 3, sizes[0], options)[0]
    after = run_on_ranks(partial(read_numbers, num_workers=workers), to, tmp_path, None, sizes[1], options)[0]
    assert sorted(before + after) == list(range(64))


def read_numbers_with_states_of_each_rank() -> tuple[list[int], list[int]]:
    options = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=False)
    accelerator = Accelerator(dataloader_config=options)
    first, second = (accelerator.prepare(DataLoader(Numbers(), batch_size=4)) for _ in range(2))
    passes = iter(first)
    for _ in range(3):
        next(passes)
    second.load_state_dict(first.state_dict())
    return torch.cat(list(passes)).tolist(), torch.cat(list(second)).tolist()


def test_each_rank_may_keep_the_state_of_its_own_loader():
    """Only rank 0 notes what it has seen; that the others did not must not keep them from comparing together."""
    for rest, resumed in run_on_ranks(read_numbers_with_states_of_each_rank, 2, timeout=20):
        assert resumed == rest


def test_workers_that_last_go_back_to_where_they_were_told(tmp_path):
    read_numbers(tmp_path, 3, 4, {"dispatch_batches": False}, num_workers=2, persistent_workers=True)
    (found,) = run_on_ranks(read_numbers_after_going_back, 1, tmp_path)
    assert found[0] == found[1] == [16, 18]


def test_a_stream_that_moved_goes_on_exactly_from_its_next_save(tmp_path):
    """Workers that were told where to start count from there, so torchdata's state of them is not kept."""
    cell = Cell("iterable", "epoch", "2", 2, loader="stateful", keeps_state=True, size=50, batch_size=2)
    saved, moved = tmp_path / "saved", tmp_path / "moved"
    in_epoch = training.steps_of_first_epoch(run_on_ranks(training.uninterrupted, 2, cell, saved, False)[0])
    (once,) = run_on_ranks(training.resumed, 1, cell, saved, "3", in_epoch, moved, False)
    for name in ("5", "8"):
        (twice,) = run_on_ranks(training.resumed, 1, cell, moved, name, in_epoch, None, False)
        assert twice.steps == once.steps[training.steps_in(name) - 3 :]
