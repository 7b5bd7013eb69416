"""What `gather_for_metrics` returns, over all ways to share data out: exactly the samples, in order, once.

A cell is one setting. `expected_steps` says, from the documentation alone, which samples each step holds and which
ranks take it; many cells run inside one group of ranks. The full grid is `make metrics-grid`.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from accelerate import Accelerator
from accelerate.core.errors import SettingError
from accelerate.data.prepare import prepare_data_loader
from tests.support.data_tables import Counting
from tests.support.ranks import run_on_ranks

KINDS = ("map", "shuffled", "iterable", "batch sampler", "ragged", "reshuffled sampler")
MODES = ("even", "uneven", "split")
SEED = 5


@dataclass(frozen=True)
class Cell:
    """One setting."""

    n: int
    batch: int
    kind: str
    mode: str
    drop_last: bool
    dispatch: bool


def all_cells(sizes: range, batches: range) -> list[Cell]:
    return [
        Cell(*values)
        for values in product(sizes, batches, KINDS, MODES, (False, True), (False, True))
        if values[0] or "shuffled" not in values[2]  # torch draws no order of nothing
    ]


# What is expected -------------------------------------------------------------------------------------------------


def permuted(n: int) -> list[int]:
    """The first epoch of a seedable sampler."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()


def ragged_sizes(batch: int) -> Iterator[int]:
    """1, 2, ..., batch, and again."""
    while True:
        yield from range(1, batch + 1)


def in_batches(samples: list[int], sizes: Iterator[int]) -> list[list[int]]:
    found = []
    while samples:
        size = next(sizes)
        found.append(samples[:size])
        samples = samples[size:]
    return found


def expected_steps(cell: Cell, ranks: int) -> list[tuple[list[int], range]] | str:
    """The samples of each step with the ranks that take it, or the words of an error on all ranks."""
    alone = ranks == 1
    if cell.mode == "split" and ((cell.kind == "ragged" and (cell.dispatch or not alone)) or cell.batch % ranks):
        return "split_batches=True"
    if alone:
        return [(batch, range(1)) for batch in make_batches(cell)]
    if cell.mode == "uneven" and cell.dispatch and not cell.drop_last:
        return "even_batches=False contradicts dispatch_batches=True"
    # Batches of iterable datasets are topped up without dispatching too.
    tops_up = cell.mode != "uneven" or cell.kind == "iterable"
    batches = make_batches(cell)
    if cell.mode == "split":
        return [(batch, range(ranks)) for batch in batches]
    steps = [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
    if cell.drop_last and steps and len(steps[-1]) < ranks:
        steps.pop()
    return [(sum(step, []), range(ranks if tops_up else len(step))) for step in steps]


def make_batches(cell: Cell) -> list[list[int]]:
    order = permuted(cell.n) if "shuffled" in cell.kind else list(range(cell.n))
    if cell.kind == "ragged":
        return in_batches(order, ragged_sizes(cell.batch))  # says drop_last, but no batch is incomplete
    batches = in_batches(order, iter(lambda: cell.batch, None))
    return [batch for batch in batches if len(batch) == cell.batch or not cell.drop_last]


# What happens -----------------------------------------------------------------------------------------------------


class OwnBatches:
    """A batch sampler that is none of torch's, with or without a batch size."""

    def __init__(self, batches: list[list[int]], drop_last: bool, batch_size: int | None) -> None:
        self.batches, self.drop_last = batches, drop_last
        if batch_size is not None:
            self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Permuted(SequentialSampler):
    """A sampler of a kind of its own."""

    def __iter__(self) -> Iterator[int]:
        return iter(permuted(len(self)))


def make_loader(cell: Cell) -> DataLoader:
    if cell.kind == "iterable":
        return DataLoader(Counting(cell.n), batch_size=cell.batch, drop_last=cell.drop_last)
    data: Any = range(cell.n)
    if cell.kind == "reshuffled sampler":
        return DataLoader(data, batch_sampler=BatchSampler(Permuted(data), cell.batch, cell.drop_last))
    if cell.kind in ("batch sampler", "ragged"):
        size = cell.batch if cell.kind == "batch sampler" else None
        return DataLoader(data, batch_sampler=OwnBatches(make_batches(cell), cell.drop_last, size))  # pyright: ignore[reportArgumentType]
    return DataLoader(data, batch_size=cell.batch, shuffle=cell.kind == "shuffled", drop_last=cell.drop_last)


def prepare(accelerator: Accelerator, cell: Cell) -> Any:
    return prepare_data_loader(
        make_loader(cell),
        device=accelerator.device,
        put_on_device=True,
        rng_types=["generator"],
        split_batches=cell.mode == "split",
        even_batches=cell.mode != "uneven",
        dispatch_batches=cell.dispatch,
        use_seedable_sampler=cell.kind == "shuffled",
        data_seed=SEED,
    )


def wide(batch: torch.Tensor, width: int) -> torch.Tensor:
    return batch[:, None].expand(-1, width) + 1


def gather_forms(accelerator: Accelerator, batch: torch.Tensor, form: int) -> list[int]:
    """Send the samples of a batch in one of several forms, and read them back."""
    gather, rank = accelerator.gather_for_metrics, accelerator.process_index
    if form == 0:
        return gather(batch).tolist()
    if form == 1:  # of another width on each rank and in each batch, and beside a tensor without rows
        found = gather({"wide": wide(batch, 1 + rank + int(batch.sum()) % 3), "one": torch.tensor(1.0)}, pad_index=-7)
        rows = found["wide"]
        assert all(set(row) <= {row[0], -7} for row in rows.tolist())
        return (rows[:, 0] - 1).tolist() if rows.numel() else []
    if form == 2:
        return [int(text) for text in gather([str(int(item)) for item in batch])]
    if form == 3:  # several outputs for each sample
        twice = gather(batch.repeat_interleave(3))
        assert twice.view(-1, 3).unique(dim=1).shape[1] == 1 if len(twice) else True
        return twice[::3].tolist()
    rows = gather(wide(batch, 1 + rank), use_gather_object=True)  # rows travel as objects
    return [int(row[0]) - 1 for row in rows]


FORMS = 5


def run_cell(accelerator: Accelerator, cell: Cell, number: int) -> str | None:
    """Return what is wrong with a cell on this rank."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    steps = expected_steps(cell, ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that even_batches=False has no effect here
        try:
            loader = prepare(accelerator, cell)
        except SettingError as error:
            return None if isinstance(steps, str) and steps in str(error) else f"raised {error}"
    if isinstance(steps, str):
        return "did not raise"
    expected = [samples for samples, takers in steps if rank in takers]
    got, others = [], []
    for place, batch in enumerate(loader):
        got.append(accelerator.gather_for_metrics(batch).tolist())
        others.append(gather_forms(accelerator, batch, (number + place) % FORMS))
    if ranks == 1:  # nothing is gathered
        others = got
    return None if got == others == expected else f"expected {expected}, got {got}, otherwise {others}"


def run_cells(cells: list[Cell]) -> list[str]:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    wrong = []
    for number, cell in enumerate(cells):
        fault = run_cell(accelerator, cell, number)
        if fault is not None:
            wrong.append(f"{cell} on {accelerator.num_processes}: {fault}")
    accelerator.wait_for_everyone()
    return wrong


def count_wrong(cells: list[Cell], ranks: int, timeout: float) -> None:
    start = time.monotonic()
    by_rank = run_on_ranks(run_cells, ranks, cells, timeout=timeout)
    wrong = sorted({fault for faults in by_rank for fault in faults})
    print(f"{ranks} ranks: {len(cells)} cells, {len(wrong)} wrong, {time.monotonic() - start:.1f} s")
    assert not wrong, "\n".join([f"{len(wrong)} wrong cells; of kinds {_kinds(wrong)}", *wrong[:10]])


def _kinds(wrong: list[str]) -> Counter[str]:
    return Counter(text[text.index("kind=") : text.index(", drop_last")] for text in wrong)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_sample_of_the_grid(ranks: int) -> None:
    cells = all_cells(range(14), range(1, 7))
    count_wrong(cells[ranks :: 41 if ranks > 1 else 11], ranks, timeout=120)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_whole_grid(ranks: int) -> None:
    count_wrong(all_cells(range(41), range(1, 7)), ranks, timeout=7200)


# Several loaders --------------------------------------------------------------------------------------------------


def make_pair(accelerator: Accelerator, first: int, second: int, dispatch: bool) -> tuple[Any, Any]:
    """Two loaders with batches of 2: what is padding in one fits the other's shapes too."""
    one = Cell(first, 2, "map", "even", drop_last=False, dispatch=dispatch)
    two = Cell(second, 2, "iterable" if dispatch else "map", "even", drop_last=False, dispatch=dispatch)
    return prepare(accelerator, one), prepare(accelerator, two)


def side_by_side(accelerator: Accelerator, pair: tuple[Any, Any]) -> tuple[list[list[int]], str | None]:
    """Return what is gathered of each in a common loop."""
    seen: list[list[int]] = [[], []]
    fault = None
    for batches in zip(*pair, strict=False):
        for loader, batch, found in zip(pair, batches, seen, strict=True):
            named = accelerator.gather_for_metrics(batch + 0, dataloader=loader).tolist()
            found += named
            try:
                unnamed = accelerator.gather_for_metrics(batch).tolist()
            except SettingError:
                continue
            if unnamed != named:
                fault = f"without a name {unnamed}, with it {named}"
    return seen, fault


def run_pairs(sizes: list[tuple[int, int]], dispatch: bool) -> list[str]:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    ranks, wrong = accelerator.num_processes, []
    for first, second in sizes:
        pair = make_pair(accelerator, first, second, dispatch)
        seen, fault = side_by_side(accelerator, pair)
        steps = min(-(-size // (2 * ranks)) for size in (first, second))
        whole = [list(range(min(size, steps * 2 * ranks))) for size in (first, second)]
        if seen != whole or fault:
            wrong.append(f"{first}, {second} side by side: {seen}; {fault}")
        outer: list[int] = []
        inner: list[list[int]] = []
        for batch in pair[0]:
            inner.append([item for other in pair[1] for item in accelerator.gather_for_metrics(other + 0).tolist()])
            outer += accelerator.gather_for_metrics(batch + 0).tolist()
        if outer != list(range(first)) or any(items != list(range(second)) for items in inner):
            wrong.append(f"{first}, {second} inside each other: {inner}, {outer}")
    return wrong


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_loops_side_by_side_and_inside_each_other(ranks: int, dispatch: bool) -> None:
    sizes = [(first, second) for first in (1, 5, 8, 12) for second in (1, 4, 6, 11)]
    assert [fault for faults in run_on_ranks(run_pairs, ranks, sizes, dispatch) for fault in faults] == []


@pytest.mark.full
@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_loops_side_by_side_and_inside_each_other(ranks: int, dispatch: bool) -> None:
    sizes = list(product(range(25), repeat=2))
    faults = run_on_ranks(run_pairs, ranks, sizes, dispatch, timeout=3600)
    assert [fault for of_rank in faults for fault in of_rank] == []
