"""Datasets that are read in order: the share of one process, and starting in the middle.

Owns what wraps an iterable dataset where it is read, in the main process or in workers. Never touches devices, loaders
or process groups.

[Note: padding of a stream]
Only who reads the stream knows that it has ended, and how many samples of the last round are padding. In a prepared
loader they are handed on as `Marked`, and `CountingCollate` turns a batch of them into `Counted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from ..core.available import is_tqdm_available
from ..core.errors import CheckpointError, explain
from ..runtime.progress import tqdm
from .shards import Padding, ShardPlan
from .streams import Seeds, derive, numbered


@dataclass(frozen=True, slots=True)
class Marked:
    """A sample of a round that does not suffice for all shards."""

    sample: Any
    padding: Padding


@dataclass(slots=True)
class Counted:
    """A batch, with what its samples were marked with, and which worker process made it."""

    batch: Any
    padding: Padding | None
    worker: int | None

    def pin_memory(self) -> Counted:
        """Return it in pinned memory, as torch's loader asks for."""
        return Counted(pin_memory(self.batch), self.padding, self.worker)


class CountingCollate:
    """Calls a collate function with plain samples, and hands on what they were marked with and where it runs."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        info = get_worker_info()
        worker = None if info is None else info.id
        if isinstance(samples, Marked):
            return Counted(self.collate(samples.sample), samples.padding, worker)
        if not isinstance(samples, list) or not samples or type(samples[0]) is not Marked:
            batch = self.collate(samples)
            return batch if worker is None else Counted(batch, None, worker)
        return Counted(self.collate([marked.sample for marked in samples]), samples[0].padding, worker)


class SeededCollate:
    """Calls a collate function that draws from seeds of its batch: so samples may be skipped without collating them.

    Args:
        collate: The function.
        seeds: Of the pass, for Python, numpy and torch.
        number: Which batch comes first.
    """

    def __init__(self, collate: Callable[[Any], Any], seeds: tuple[int, int, int], number: int) -> None:
        self.collate = collate
        self._seeds = tuple(derive(seed, "collate") for seed in seeds)
        self._number = number

    def __call__(self, samples: Any) -> Any:
        number, self._number = self._number, self._number + 1
        python, of_numpy, of_torch = (numbered(seed, number) for seed in self._seeds)
        with Seeds((python, of_numpy, of_torch)):
            return self.collate(samples)


class IterableDatasetShard(IterableDataset):
    """The samples of one process out of an iterable dataset that all processes read.

    The dataset must give the same samples on all processes: where it shuffles, from a seed they share.

    Args:
        dataset: The dataset to share out.
        batch_size: Samples in a batch: of one process, or of all with `split_batches`.
        drop_last: Leave an incomplete last round out, in place of topping it up from the beginning.
        num_processes: Among how many.
        process_index: For which one.
        split_batches: Each round is one batch, cut into equal parts, in place of one batch for each process.

    Raises:
        SettingError: (a `ValueError`) if the batch size cannot be split evenly.

    Example:
        >>> # dataset yields 0, 1, ..., 12
        >>> list(IterableDatasetShard(dataset, batch_size=4, num_processes=2, process_index=1))
        [4, 5, 6, 7, 12, 0, 1, 2]
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.epoch = 0
        self.start: int | list[int] = 0
        """At which sample of the dataset the next pass begins: in this process, or in each worker process."""
        self.spread = False
        """Share an incomplete last round out evenly, as a fixed global batch size needs."""
        self.multiple = 1
        """With `drop_last`, leave out what is not a whole multiple of so many samples: read that far ahead to know."""
        self.strict = False
        """Whether a dataset that ends before `start` is refused."""
        self._opening: list[Any] = []
        self._tells = False
        self._plan()

    def _plan(self) -> ShardPlan:
        return ShardPlan(
            index=self.process_index,
            count=self.num_processes,
            batch_size=self.batch_size,
            split=self.split_batches,
            drop_last=self.drop_last,
            spread=self.spread,
            multiple=self.multiple,
        ).check()

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset which epoch comes next, if it wants to know."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        plan = self._plan()
        return plan.num_batches(len(self.dataset)) * plan.rows  # pyright: ignore[reportArgumentType]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Mark the samples of the last round, if it is short, in passes that begin inside."""
        self._tells = True
        try:
            yield
        finally:
            self._tells = False

    def read_opening(self) -> None:
        """Read the first round, which the last one is topped up with, where the next pass begins later."""
        self._opening = list(islice(iter(self.dataset), self._plan().stride))

    def __iter__(self) -> Iterator[Any]:
        # What is set for this pass only is taken now, not when the first sample is asked for.
        start, self.start = self.start, 0
        opening, self._opening = self._opening, []
        worker = get_worker_info()
        if isinstance(start, list):
            start = start[0 if worker is None else worker.id]
        return self._share(start, opening, self._tells)

    def _share(self, start: int, opening: list[Any], tells: bool) -> Iterator[Any]:
        plan = self._plan()
        mine = slice(plan.offset, plan.offset + plan.rows)
        samples = iter(self.dataset)
        begin = start
        if start and not opening:
            opening = list(islice(samples, min(start, plan.stride)))
            start -= min(start, plan.stride) if opening else 0
        skip_with_progress(samples, start, "samples", strict=self.strict)
        if plan.drop_last and plan.multiple > 1:
            samples = _whole_multiples(samples, plan.multiple, begin)
        while block := list(islice(samples, plan.stride)):
            opening += block[: plan.stride - len(opening)]
            found = plan.padding(len(block))
            if found is not None or len(block) < plan.stride:
                if plan.drop_last:
                    return
                if plan.spread:
                    mine, block = slice(None), [block[place] for place in plan.irregular(len(block))[0]]
                while not plan.spread and len(block) < plan.stride:
                    block += opening[: plan.stride - len(block)]
            if found is not None and tells:
                yield from (Marked(sample, found[1]) for sample in block[mine])
            else:
                yield from block[mine]


def _whole_multiples(samples: Iterator[Any], multiple: int, begin: int) -> Iterator[Any]:
    """Yield samples from the `begin`-th on, but for those that come after the last whole multiple."""
    wanted = multiple - begin % multiple
    while len(held := list(islice(samples, wanted))) == wanted:
        yield from held
        wanted = multiple


class Continued(IterableDataset[Any]):
    """A dataset whose next pass leaves out what was read before; in everything else it is the given one.

    Args:
        dataset: Any iterable dataset.
        start: How many samples to leave out: in this process, or in each worker process.
    """

    def __init__(self, dataset: Any, start: int | list[int], strict: bool = False) -> None:
        object.__setattr__(self, "_dataset", dataset)
        object.__setattr__(self, "_start", start)
        object.__setattr__(self, "_strict", strict)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_start", "_strict"):  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return type(self), (self._dataset, self._start, self._strict)

    def __iter__(self) -> Iterator[Any]:
        start = self._start
        object.__setattr__(self, "_start", 0)
        worker = get_worker_info()
        if isinstance(start, list):
            start = start[0 if worker is None else worker.id]
        samples = iter(self._dataset)
        return self._after(samples, start) if start else samples

    def _after(self, samples: Iterator[Any], start: int) -> Iterator[Any]:
        skip_with_progress(samples, start, "samples", strict=self._strict)
        yield from samples


def skip_with_progress(items: Iterator[Any], count: int, what: str, *, strict: bool = False) -> None:
    """Read `count` items and leave them out; show a bar if that takes long.

    Raises:
        CheckpointError: With `strict`, if there are fewer.
    """
    left = count
    show = is_tqdm_available() and get_worker_info() is None
    bar = tqdm(desc=f"reading on to where the run was ({what})", total=count, delay=2.0, leave=False) if show else None
    try:
        while left > 0:
            passed = sum(1 for _ in islice(items, min(left, 256)))
            if not passed:
                break
            left -= passed
            if bar is not None:
                bar.update(passed)
    finally:
        if bar is not None:
            bar.close()
    if left > 0 and strict:
        raise CheckpointError(
            explain(
                f"The dataset ends after {count - left} {what}, and {count} were read before the checkpoint.",
                accepted="a dataset that gives the same samples again",
                remedy="Make the dataset as it was made for the save, or call set_epoch() on the loader to begin a pass "
                "anew.",
            )
        )
