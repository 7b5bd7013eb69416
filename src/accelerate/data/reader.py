"""How one pass over a loader is read: begun at the start or in the middle, with its own random numbers.

Owns the order in which a pass is opened, and what is saved of it. Which indices come is in `data.feed`, what is drawn
from in `data.streams`, what a place is in `data.position`. Never moves anything to a device.

[Note: opening a pass]
Drawn from the global generators, in the order of a loop without this library: torch's seed for workers, then what the
sampler draws. Around that, where a place was restored: the global generators are set to what they were when that
pass was opened first, and back to where the run had them afterwards. Ranks that share an order which they draw from
their global generators take it from those of rank 0.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from ..core.errors import CheckpointError, explain
from ..runtime import state
from .agreement import TopUp
from .feed import Check, Feed, Source, source_of
from .iterables import Continued, Counted, CountingCollate, IterableDatasetShard, skip_with_progress
from .position import Place, capture, opening, plain_values, put_back, reopen
from .samplers import BatchSamplerShard, SkipBatchSampler
from .shards import Padding
from .streams import PrivateStream, SeededReads, Snapshot, derive, numbered, private, seed_globals

_SNAPSHOT_EVERY = 16
"""How many batches lie between two states taken of a dataset that can save its own."""

Read = tuple[Any, Padding | None, bool]
"""A batch, what other shards get in the same step if that differs, and whether it is the last."""


class FedLoader(DataLoader[Any]):
    """Torch's loader, which takes its indices from a `Feed`."""

    feed: Feed | None = None

    @property
    def _index_sampler(self) -> Any:
        return super()._index_sampler if self.feed is None else self.feed  # pyright: ignore[reportAttributeAccessIssue]


def shard_of(dataset: Any, sampler: Any) -> tuple[int, int]:
    """Return which data shard a loader over these reads, and of how many."""
    while type(sampler) is SkipBatchSampler:
        sampler = sampler.batch_sampler
    for holder in (dataset, sampler):
        if isinstance(holder, (IterableDatasetShard, BatchSamplerShard)):
            return holder.process_index, holder.num_processes
    return 0, 1


def _has_state(dataset: Any) -> bool:
    return all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


class _Own:
    """The generator that a loader was given, in the shape of a sampler's."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator


class Reader:
    """Reads the passes of one loader.

    Args:
        owner: The prepared loader: its bookmark, its number of the pass, and whether it skips.
        base: The loader that does the reading.
    """

    def __init__(self, owner: Any, base: DataLoader[Any]) -> None:
        # Weakly, for the owner holds this: a cycle would keep its worker processes until garbage is collected.
        self._owner_reference, self._base = weakref.ref(owner), base
        self.iterable = isinstance(base.dataset, IterableDataset)
        feed: Feed | None = getattr(base, "feed", None)
        self.feed = Feed(base) if feed is None or feed.loader is not base else feed  # a copy shares its loader's
        base.feed = self.feed  # pyright: ignore[reportAttributeAccessIssue]
        self._baseline = [plain_values(node) for node in self._nodes()]
        self.opening: list[Any] = []
        """The first batches of a pass that begins later, where the caller asked for them."""

    @property
    def _owner(self) -> Any:
        return self._owner_reference()

    @property
    def _is_shared(self) -> bool:
        """Whether ranks read shares of one order."""
        return self._owner.shard_count > 1 and state.current_or_single().process.world_size > 1

    def _source(self) -> Source:
        base = self._base
        return source_of(base.sampler if base.batch_sampler is None else base.batch_sampler)

    def _nodes(self) -> list[Any]:
        """Return everything that decides the order, from the bottom up."""
        dataset: Any = self._base.dataset
        if self.iterable:
            while isinstance(dataset, IterableDatasetShard):
                dataset = dataset.dataset
            return [dataset, _Own(self._base.generator)]
        nodes, node = [], self._source().batches
        while node is not None:
            nodes.append(node)
            below = getattr(node, "batch_sampler", None)
            node = getattr(node, "sampler", None) if below is None else below
        return [*reversed(nodes), _Own(self._base.generator)]

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, pending: Place | None, *, ahead: bool = False, kept: int = 0) -> Iterator[Read]:
        """Read one pass, from its start or from a place that was restored.

        Args:
            pending: That place.
            ahead: Whether the caller takes batches before the loop gets to them.
            kept: How many batches at the start of the pass the caller needs in any case; where it begins later, they
                are in `opening` when the first batch comes.
        """
        self.opening = []
        if self.iterable:
            return self._read_stream(pending, kept)
        return self._read_indices(pending, ahead, kept)

    def open_without_reading(self, pending: Place | None) -> None:
        """Begin a pass that another rank reads."""
        begin = self._begin(pending, self._units_per_read())
        per_step = self._units_per_read() * self._owner.reads_per_step
        self._owner._mark.open(Place({}, begin, per_step=per_step, unit=self._unit()))

    def _begin(self, pending: Place | None, units_per_read: int) -> int:
        """Return which unit of the source the pass begins with."""
        owner = self._owner
        if pending is not None and pending is not owner.replaces:
            return pending.done
        skipped = owner.skip_batches if self.iterable else owner.skip_batches + self._source().skip
        return skipped * units_per_read * owner.reads_per_step

    def _units_per_read(self) -> int:
        return self._stream_step() if self.iterable else self._source().units_per_step

    def _unit(self) -> str:
        return "samples" if self.iterable else self._source().unit

    def _read_indices(self, pending: Place | None, ahead: bool, kept: int) -> Iterator[Read]:
        owner, base, feed = self._owner, self._base, self.feed
        source = self._source()
        begin = self._begin(pending, source.units_per_step)
        check = None if pending is None or pending is owner.replaces else pending.check
        seed = derive(torch.initial_seed(), owner._mark.ordinal, owner.iteration, owner.shard_index)
        shares = self._is_shared and source.draws_globally
        with self._opened(pending, shares) as opening_states:
            behind = owner.reads_per_step * 2
            feed.begin(source, begin, check, seed if base.num_workers else None, behind=behind, kept=kept)
            batches, makes_workers = self._iterator(pending)
            feed.prime()
        self.opening = [self._fetch(indices, numbered(seed, place)) for place, indices in enumerate(feed.kept)]
        place = Place(opening_states, begin, source.unit, source.size, check)
        place.per_step = source.units_per_step * owner.reads_per_step
        place.workers, place.makes_workers = base.num_workers, makes_workers
        if base.num_workers == 0 and (ahead or owner.shard_count > 1):
            place.draws = None if pending is None else pending.draws
            first = begin // source.units_per_step
            batches = iter(SeededReads(batches, seed, first, place.draws, partial(setattr, place, "draws")))
        owner._mark.open(place, feed)
        paddings = feed.paddings
        for number, batch in enumerate(batches, start=1):
            yield batch, paddings.pop(number, None) if paddings else None, number == feed.last

    def _fetch(self, indices: Any, seed: int) -> Any:
        """Read one batch here, whoever reads the others."""
        base = self._base
        with PrivateStream(0):
            seed_globals(seed)
            fetch = _MapDatasetFetcher(base.dataset, base.batch_sampler is not None, base.collate_fn, False)
            return fetch.fetch(indices)

    def _fetch_opening(self, seed: int, count: int) -> list[Any]:
        """Read the first samples of a pass that begins later."""
        base: Any = self._base
        with PrivateStream(seed):
            samples = list(islice(iter(base.dataset), count))
            if base.batch_size is None:
                return [base.collate_fn(sample) for sample in samples]
            return [
                base.collate_fn(samples[at : at + base.batch_size]) for at in range(0, len(samples), base.batch_size)
            ]

    def _read_stream(self, pending: Place | None, kept: int) -> Iterator[Read]:
        owner, base = self._owner, self._base
        dataset: Any = base.dataset
        per_step = self._stream_step()
        begin = self._begin(pending, per_step)
        restored = None if pending is owner.replaces else pending
        strict = restored is not None and owner.agreement is None
        # torchdata's loader goes on by itself, unless its place was given up or another loader took it.
        resumes = owner._resumes and pending is owner._resumed
        if owner._resumes and not resumes:
            base.next_iter_state = None  # pyright: ignore[reportAttributeAccessIssue]
        owner._resumes, owner._resumed, owner._mark.read_by = False, None, id(owner)
        if resumes:
            discarded, starts = 0, 0
        elif base.num_workers or owner.use_stateful_dataloader or (restored is not None and restored.workers):
            discarded, starts = self._to_discard(begin, per_step, pending)
        else:
            discarded, starts = 0, begin
        owner._base_counts = not starts
        with self._opened(pending, self._is_shared) as opening_states:
            own = owner.shard_index if owner.agreement is not None else 0  # each rank reads samples of its own
            seed = Snapshot(opening_states["random"]).seed("data", owner.iteration, own)
            stream = None if base.num_workers else PrivateStream(seed)
            if stream is not None and kept and begin and not discarded:
                self.opening = self._fetch_opening(seed, min(begin, kept * per_step))
            usable = pending is not None and pending is not owner.replaces and stream is not None and not resumes
            snapshot = pending.snapshot if pending is not None and usable else None
            if snapshot is not None and stream is not None:
                starts = begin - self._return_to(snapshot, stream, seed)
            with self._started_at(dataset, starts, strict):
                self.feed.pass_seed = None if stream is not None else seed
                self.feed.seeds_each = owner.use_stateful_dataloader and self.saves_in_workers
                batches, makes_workers = self._iterator(pending)
                self.feed.pass_seed = None
        if stream is not None:
            batches = private(batches, stream)
        if discarded and kept:
            self.opening = list(islice(batches, min(kept, discarded)))
        left_out = discarded - (min(kept, discarded) if self.opening else 0)
        skip_with_progress(batches, left_out, "batches", strict=strict)
        place = Place(opening_states, begin, per_step=per_step * owner.reads_per_step, snapshot=snapshot)
        place.workers, place.makes_workers = base.num_workers, makes_workers
        owner._mark.open(place)
        watched = self._watched(batches, stream, begin, per_step)
        if owner.agreement is not None:
            yield from owner.agreement.walk(self._plain(watched))
            return
        yield from watched if owner.looks_ahead else self._looking_ahead(watched)

    def _plain(self, reads: Iterator[Read]) -> Iterator[Any]:
        look = self._owner.adjust_state_dict_for_prefetch if self._owner.use_stateful_dataloader else None
        for batch, _, _ in reads:
            yield batch
            if look is not None:
                look()  # before the next one is read

    def _watched(
        self, batches: Iterator[Any], stream: PrivateStream | None, begin: int, per_step: int
    ) -> Iterator[Read]:
        """Yield batches, and take the state of a dataset that can save its own now and then."""
        snapshots: deque[dict[str, Any]] = deque(maxlen=2 + 2 * self._owner.reads_per_step // _SNAPSHOT_EVERY)
        self._owner._mark.snapshots = snapshots
        dataset: Any = self._nodes()[0]
        saves = stream is not None and _has_state(dataset) and self._owner.agreement is None
        for number, batch in enumerate(batches, start=1):
            if saves and stream is not None and number % _SNAPSHOT_EVERY == 0:
                now = {"done": begin + number * per_step, "dataset": dataset.state_dict(), "stream": stream.state()}
                snapshots.append(copy.deepcopy(now))
            yield (batch.batch, batch.padding, False) if type(batch) is Counted else (batch, None, False)

    def _looking_ahead(self, reads: Iterator[Read]) -> Iterator[Read]:
        look = self._owner.adjust_state_dict_for_prefetch if self._owner.use_stateful_dataloader else None
        current = next(reads, None)
        while current is not None:
            if look is not None:
                look()
            following = next(reads, None)
            yield current[0], current[1], following is None
            current = following

    # Opening ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, pending: Place | None, shares: bool) -> Iterator[dict[str, Any]]:
        """Draw inside what a pass draws when it begins. See [Note: opening a pass]."""
        runtime = state.current_or_single()
        nodes = self._nodes()
        if pending is not None and pending.opening:
            outer = Snapshot()
            reopen(nodes, pending.opening)
            try:
                yield pending.opening
            finally:
                outer.restore()
            return
        kept = opening(nodes, self._baseline)
        if not shares:
            yield kept
            return
        outer = Snapshot()
        kept["random"] = runtime.collectives.broadcast_object(kept["random"])
        Snapshot(kept["random"]).restore()
        yield kept
        if runtime.process.rank != 0:
            outer.restore()

    def _iterator(self, pending: Place | None) -> tuple[Iterator[Any], bool]:
        """Return torch's iterator, and whether the run draws a seed for workers here, which torch does on making them."""
        base, mark = self._base, self._owner._mark
        lasting = base.persistent_workers and base.num_workers > 0
        draws = not (lasting and mark.has_workers) if pending is None or not pending.opening else pending.makes_workers
        mark.has_workers = lasting
        generator = base.generator
        if not draws:
            base.generator = torch.Generator()
        elif lasting and getattr(base, "_iterator", None) is not None:
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # continued in the process that saved
        try:
            return iter(base), draws
        finally:
            base.generator = generator

    def _stream_step(self) -> int:
        dataset, size = self._base.dataset, self._base.batch_size
        return dataset._plan().stride if isinstance(dataset, IterableDatasetShard) else size or 1

    def _to_discard(self, begin: int, per_step: int, pending: Place | None) -> tuple[int, int | list[int]]:
        """Return how many batches to read and leave out, or at which sample each worker process starts."""
        workers = self._base.num_workers
        reads = self._owner.reads_per_step
        same = pending is not None and pending.workers == workers
        if pending is None or pending is self._owner.replaces or (same and pending.per_step == per_step * reads):
            return begin // per_step, 0
        if same and self._owner.looks_ahead:  # rank 0 reads the same batches, whatever the number of ranks
            return begin // per_step, 0
        if workers == pending.workers == 0:
            return 0, begin
        if pending.workers != workers:
            raise CheckpointError(
                explain(
                    f"The loader has num_workers={workers}, and {pending.workers} when it was saved in the middle of a "
                    f"pass: {type(self._nodes()[0]).__name__} may give its samples in another order.",
                    accepted=f"num_workers={pending.workers} until the pass ends",
                    remedy="Make the loader as it was made for the save, or call set_epoch() to begin a pass anew.",
                )
            )
        # Workers take turns, one batch each: the first ones are one batch ahead of the others.
        rounds, more = divmod(begin // pending.per_step, workers)
        return 0, [(rounds + (worker < more)) * pending.per_step for worker in range(workers)]

    @contextmanager
    def _started_at(self, dataset: Any, start: int | list[int], strict: bool) -> Iterator[None]:
        """Let an iterator that is made inside begin at a sample, and its batches say what of them is padding."""
        base = self._base
        sharded = isinstance(dataset, IterableDatasetShard)
        if not sharded:
            # The iterator keeps what it is made with; torch guards the attribute against plain assignment.
            base.__dict__["dataset"] = Continued(dataset, start, strict) if start else dataset
            collate = base.collate_fn
            if self._owner.agreement is not None and base.batch_size is not None:
                base.collate_fn = TopUp(collate, base.batch_size)
            try:
                yield
            finally:
                base.__dict__["dataset"] = dataset
                base.collate_fn = collate
            return
        collate = base.collate_fn
        dataset.start, dataset.strict, base.collate_fn = start, strict, CountingCollate(collate)
        try:
            with dataset.telling():
                yield
        finally:
            base.collate_fn = collate
            if base.num_workers:  # the workers have copies
                dataset.start = 0

    # The state of a dataset that can save its own -----------------------------------------------------------------

    @property
    def saves_in_workers(self) -> bool:
        """Whether worker processes read a dataset that can save its own state."""
        return self.iterable and self._base.num_workers > 0 and _has_state(self._base.dataset)

    def _saves_itself(self) -> bool:
        return _has_state(self._nodes()[0])

    def _return_to(self, snapshot: dict[str, Any], stream: PrivateStream, seed: int) -> int:
        """Set the dataset to a state of its own; return how many samples were read before that."""
        dataset: Any = self._base.dataset
        inner: Any = self._nodes()[0]
        if isinstance(dataset, IterableDatasetShard):
            with PrivateStream(seed):
                dataset.read_opening()
        inner.load_state_dict(snapshot["dataset"])
        stream.load_state(snapshot["stream"])
        return snapshot["done"]

    # What is saved ------------------------------------------------------------------------------------------------

    def batches_ahead(self) -> int | None:
        """Return how many batches of the pass follow the one given last; `None` if that is not known."""
        mark, feed = self._owner._mark, self.feed
        if self.iterable or feed.source is None or mark.place is None:
            return None
        total = feed.last
        if total is None:
            total = feed.source.num_batches(mark.place.done)
        return None if total is None else max(0, total - mark.given)

    def progress(self, place: Place, done: int) -> tuple[int, int | None]:
        """Return how many steps of a pass are done, as this run counts them, and how many samples."""
        owner = self._owner
        if self.iterable:
            return -(-done // (self._stream_step() * owner.reads_per_step)), done
        source = self._source()
        total, left = source.num_batches(0), source.num_batches(done)
        if total is None or left is None:
            step = -(-done // (source.units_per_step * owner.reads_per_step))
        else:
            step = owner.steps_of(total) - owner.steps_of(left)
        if source.in_samples:
            return step, done
        size = getattr(source.batches, "batch_size", None)
        return step, None if size is None else done * size

    def state(self) -> dict[str, Any]:
        """Return the loader's place, for `load_state`. The same on all ranks, but for dispatched loaders."""
        mark = self._owner._mark
        epoch, place, done = mark.now()
        common = {"epoch": epoch, "ordinal": mark.ordinal, "has_workers": mark.has_workers}
        if place is None:
            return {**common, "samplers": capture(self._nodes(), self._baseline)}
        if place is not mark.pending:
            check = place.check
            if mark.feed is not None and self._owner.shard_index == 0 and mark.given and place.opening:
                indices = mark.feed.recently((mark.given - 1) * self._owner.reads_per_step + 1)
                check = None if indices is None else Check.of(done - place.per_step, indices)
            fitting = [snapshot for snapshot in mark.snapshots if snapshot["done"] <= done]
            snapshot = fitting[-1] if fitting else place.snapshot
            place = replace(place, done=done, check=check, snapshot=snapshot, shards=self._own_shards())
        return {**common, "place": place.to_state()}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Let the next pass continue where `state` was called.

        Raises:
            CheckpointError: If the data has another size now, or the samplers are others.
        """
        mark = self._owner._mark
        mark.place, mark.given, mark.finished, mark.pending = None, 0, False, None
        mark.iteration, mark.ordinal, mark.has_workers = saved["epoch"], saved["ordinal"], saved["has_workers"]
        if "place" not in saved:
            put_back(self._nodes(), saved["samplers"])
            return
        place = Place.from_state(saved["place"])
        if place.shards != self._own_shards():
            raise CheckpointError(
                explain(
                    f"{type(self._nodes()[0]).__name__} shares its samples out by itself, among {self._own_shards()} "
                    f"processes here and {place.shards} when it was saved in the middle of a pass (0 stands for one that "
                    "leaves it to prepare): which samples are left cannot be told.",
                    accepted="the number of processes of the save, until the pass ends",
                    remedy="Continue on as many processes, or from a checkpoint at the end of an epoch.",
                )
            )
        if not self.iterable:
            self._check_size(place)
        if place.opening:
            put_back(self._nodes(), place.opening["samplers"])
        mark.pending = place

    def _own_shards(self) -> int:
        """Return among how many shards the dataset shares its samples out itself; 0 if it does not."""
        return self._owner.shard_count if self._owner.agreement is not None else 0

    def go_to_step(self, step: int) -> None:
        """Let the next pass begin at a step, in an order that is drawn then."""
        source = self._source()
        done = step * source.units_per_step * self._owner.reads_per_step
        self._owner._mark.pending = Place({}, done, source.unit, source.size)

    def _check_size(self, place: Place) -> None:
        source = self._source()
        if place.unit != source.unit or (place.size is not None and place.size != source.size):
            raise CheckpointError(
                explain(
                    f"The loader has {source.size} {source.unit} to read, and had {place.size} {place.unit} when it was "
                    "saved in the middle of a pass: the order cannot be drawn again.",
                    accepted="the same data, and the same kind of sampler",
                    remedy="Make the loader as it was made for the save.",
                )
            )
