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
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from ..core.errors import CheckpointError, explain
from ..runtime import state
from .agreement import TopUp
from .feed import Check, Feed, Source, source_of
from .iterables import Continued, Counted, CountingCollate, IterableDatasetShard, SeededCollate, skip_with_progress
from .position import Place, capture, opening, plain_values, put_back, reopen
from .shards import Padding
from .sources import has_state
from .streams import PrivateStream, Snapshot, derive, numbered, private, seed_globals, seeded_reads
from .trail import Left, Trail, Way, another_batch, find_way
from .under import Own, datasets_under
from .workers import not_held_up

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


def _noted(trail: Trail, batch: Any) -> Any:
    """Take note of a batch that was read; return what the loop gets of it."""
    if type(batch) is not Counted:
        trail.note(batch, None, trail.per_batch)
        return batch
    samples = trail.per_batch if batch.padding is None else sum(batch.padding.real)
    trail.note(batch.batch, batch.worker, samples)
    return batch.batch


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
        self._datasets = datasets_under(base.dataset)  # once: a pass may make more of them
        self._told = self._ahead = False
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
        if self.iterable:
            return [*self._datasets, Own(self._base.generator)]
        nodes, node = [], self._source().batches
        while node is not None:
            nodes.append(node)
            below = getattr(node, "batch_sampler", None)
            node = getattr(node, "sampler", None) if below is None else below
        return [*reversed(nodes), Own(self._base.generator)]

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, pending: Place | None, *, ahead: bool = False, kept: int = 0) -> Iterator[Read]:
        """Read one pass, from its start or from a place that was restored.

        Args:
            pending: That place.
            ahead: Whether the caller takes batches before the loop gets to them.
            kept: How many batches at the start of the pass the caller needs in any case; where it begins later, they
                are in `opening` when the first batch comes.
        """
        self.opening, self._ahead = [], ahead
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
        is_finished = pending is not None and pending.is_finished  # wherever in the pass it goes on
        seed = derive(torch.initial_seed(), owner._mark.ordinal, owner.iteration, owner.shard_index)
        shares = self._is_shared and source.draws_globally
        with self._opened(pending, shares) as opening_states:
            behind = owner.reads_per_step * 2
            seed_of_workers = seed if base.num_workers else None
            feed.begin(source, begin, check, seed_of_workers, behind=behind, kept=kept, is_finished=is_finished)
            batches, makes_workers = self._iterator(pending)
            feed.prime()
        self.opening = [self._fetch(indices, numbered(seed, place)) for place, indices in enumerate(feed.kept)]
        place = Place(opening_states, begin, source.unit, source.size, check)
        place.per_step = source.units_per_step * owner.reads_per_step
        place.workers, place.makes_workers, place.is_finished = base.num_workers, makes_workers, is_finished
        reads = batches
        if base.num_workers == 0 and (ahead or owner.shard_count > 1):
            reads = seeded_reads(batches, seed, begin // source.units_per_step)
        owner._mark.open(place, feed)
        paddings = feed.paddings
        with not_held_up(batches):
            for number, batch in enumerate(reads, start=1):
                yield batch, paddings.pop(number, None) if paddings else None, number == feed.last

    def _fetch(self, indices: Any, seed: int) -> Any:
        """Read one batch here, whoever reads the others."""
        base = self._base
        with PrivateStream(0):
            seed_globals(seed)
            fetch = _MapDatasetFetcher(base.dataset, base.batch_sampler is not None, base.collate_fn, False)
            return fetch.fetch(indices)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Put what decides the order back to what it is now."""
        nodes = self._nodes()
        before = capture(nodes, self._baseline)
        try:
            yield
        finally:
            put_back(nodes, before, self._baseline)

    def _fetch_opening(self, seed: tuple[int, int, int], count: int) -> list[Any]:
        """Read the first samples of a pass that begins later."""
        base: Any = self._base
        with PrivateStream(seed), self._kept():
            samples = list(islice(iter(base.dataset), count))
            if base.batch_size is None:
                return [base.collate_fn(sample) for sample in samples]
            return [
                base.collate_fn(samples[at : at + base.batch_size]) for at in range(0, len(samples), base.batch_size)
            ]

    def _read_stream(self, pending: Place | None, kept: int) -> Iterator[Read]:
        owner, base = self._owner, self._base
        per_step = self._stream_step()
        begin = self._begin(pending, per_step)
        restored = pending if pending is not owner.replaces else None
        # torchdata's loader goes on by itself, unless its place was given up or another loader took it.
        resumes = owner._resumes and pending is owner._resumed
        if owner._resumes and not resumes:
            base.next_iter_state = None  # pyright: ignore[reportAttributeAccessIssue]
        owner._resumes, owner._resumed, owner._mark.read_by = False, None, id(owner)
        with self._opened(pending, self._is_shared) as opening_states:
            own = owner.shard_index if owner.agreement is not None else 0  # each rank reads samples of its own
            seeds = Snapshot(opening_states["random"]).seeds("data", owner.iteration, own)
            stream = None if base.num_workers else PrivateStream(seeds)
            snapshot = restored.snapshot if restored is not None and stream is not None and not resumes else None
            way = Way() if resumes else self._way(begin, per_step, restored)
            owner._base_counts = not way.starts
            skipped = way.starts
            if stream is not None and kept and skipped:
                self.opening = self._fetch_opening(seeds, min(begin, kept * per_step))
            if snapshot is not None and stream is not None and isinstance(skipped, int):
                skipped -= self._return_to(snapshot, stream, seeds)
            # Workers whose part is exhausted read less than the others.
            strict = restored is not None and owner.agreement is None and isinstance(skipped, int)
            with self._started_at(skipped, strict, None if base.num_workers else (seeds, way.started // per_step)):
                self.feed.pass_seed = seeds[2] if base.num_workers else None  # of torch's, as torch seeds workers
                self.feed.pass_epoch = owner.iteration if base.persistent_workers else None
                self.feed.seeds_each = owner.use_stateful_dataloader and self.saves_in_workers
                batches, makes_workers = self._iterator(pending)
                self.feed.pass_seed = None
        reads = batches if stream is None else private(batches, stream)
        begun = restored.by_worker if resumes and restored is not None else way.starts
        trail = Trail(begun if isinstance(begun, list) or not resumes else None, base.num_workers, per_step)
        self._leave_out(reads, way, trail, kept, restored, strict)
        place = Place(
            opening_states, begin, per_step=per_step * owner.reads_per_step, snapshot=snapshot, per_batch=per_step
        )
        place.own_batch, place.workers, place.makes_workers = base.batch_size, base.num_workers, makes_workers
        place.started, place.starts = way.started, way.starts if isinstance(way.starts, list) else None
        owner._mark.open(place, trail=trail)
        watched = self._watched(reads, stream, begin, trail)
        with not_held_up(batches):
            if owner.agreement is not None:
                yield from owner.agreement.walk(self._plain(watched))
                return
            yield from watched if owner.looks_ahead else self._looking_ahead(watched)

    def _way(self, begin: int, per_step: int, restored: Place | None) -> Way:
        """Return how to get to the unit that the pass begins with.

        Raises:
            CheckpointError: If that cannot be told.
        """
        owner, workers = self._owner, self._base.num_workers
        step = per_step * owner.reads_per_step
        left = Left(begin, step, per_step, workers)
        if restored is not None:
            left = Left(
                begin,
                restored.per_step,
                restored.per_batch,
                restored.workers,
                self._reads_alike(restored, per_step) and restored.seen is not None,
                restored.starts,
                restored.started,
                restored.by_worker,
            )
        counts = owner.use_stateful_dataloader  # torchdata's loader counts the batches it gives
        way = find_way(left, per_step, step, workers, reads_alone=owner.looks_ahead, counts=counts)
        if way is None:
            raise CheckpointError(
                explain(
                    f"The loader has num_workers={workers}, and {left.workers} when it was saved in the middle of a "
                    f"pass: {type(self._nodes()[0]).__name__} may give its samples in another order.",
                    accepted=f"num_workers={left.workers} until the pass ends",
                    remedy="Make the loader as it was made for the save, or call set_epoch() to begin a pass anew.",
                )
            )
        return way

    def _reads_alike(self, restored: Place, per_batch: int) -> bool:
        """Tell whether a batch holds the samples now that it held when a place was saved. The same on all ranks."""
        return restored.per_batch == per_batch and restored.own_batch == self._base.batch_size

    def _leave_out(
        self, batches: Iterator[Any], way: Way, trail: Trail, kept: int, restored: Place | None, strict: bool
    ) -> None:
        """Read the batches that come before the place, and see that the last of them is what it was."""
        if not way.batches:
            return
        count = way.batches - 1
        noted = (_noted(trail, batch) for batch in batches)
        if kept and not way.starts:
            self.opening = list(islice(noted, min(kept, count)))
            count -= len(self.opening)
        skip_with_progress(noted, count, "batches", strict=strict)
        last = next(noted, None)
        if last is None and strict:
            skip_with_progress(iter(()), 1, "batches", strict=True)
        if kept and not way.starts and len(self.opening) < kept and last is not None:
            self.opening.append(last)
        owner = self._owner
        # Whether something was noted is no part of the question: only rank 0 did, and each may have kept its own state.
        if restored is not None and self._reads_alike(restored, trail.per_batch):
            problem = (
                another_batch(restored.seen, last, self._nodes()[0], restored.done) if owner.shard_index == 0 else None
            )
            if self._is_shared and not owner.looks_ahead:
                problem = state.current_or_single().collectives.broadcast_object(problem)  # all refuse together
            if problem is not None:
                raise CheckpointError(problem)
        trail.begin()

    def _plain(self, reads: Iterator[Read]) -> Iterator[Any]:
        look = self._owner.adjust_state_dict_for_prefetch if self._owner.use_stateful_dataloader else None
        for batch, _, _ in reads:
            yield batch
            if look is not None:
                look()  # before the next one is read

    def _watched(
        self, batches: Iterator[Any], stream: PrivateStream | None, begin: int, trail: Trail
    ) -> Iterator[Read]:
        """Yield batches, and take the state of a dataset that can save its own now and then."""
        snapshots: deque[dict[str, Any]] = deque(maxlen=3 + 3 * self._owner.reads_per_step // _SNAPSHOT_EVERY)
        self._owner._mark.snapshots = snapshots
        dataset: Any = self._nodes()[0]
        saves = stream is not None and has_state(dataset) and self._owner.agreement is None
        shard: Any = self._base.dataset
        # So many samples are read ahead at once.
        held = shard.multiple if isinstance(shard, IterableDatasetShard) and shard.drop_last else 1
        for number, batch in enumerate(batches, start=1):
            done = begin + number * trail.per_batch
            if saves and stream is not None and number % _SNAPSHOT_EVERY == 0 and done % held == 0:
                now = {"done": done, "dataset": dataset.state_dict(), "stream": stream.state()}
                snapshots.append(copy.deepcopy(now))
            yield _noted(trail, batch), batch.padding if type(batch) is Counted else None, False

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
            outer, others = Snapshot(), capture(nodes, self._baseline)
            reopen(nodes, pending.opening, self._baseline)
            try:
                yield pending.opening
            finally:
                outer.restore()
                if not self.iterable and self._source().is_drawn_first:
                    put_back(nodes, others, self._baseline)  # others may have drawn since from a shared generator
                    self.feed.finish_again()
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

    @contextmanager
    def _started_at(
        self, start: int | list[int], strict: bool, draws: tuple[tuple[int, int, int], int] | None
    ) -> Iterator[None]:
        """Let an iterator that is made inside begin at a sample.

        Args:
            start: Which, in this process or in each worker process.
            strict: Refuse a dataset that ends before.
            draws: What `collate_fn` draws from where this process calls it: seeds of the pass, and the first batch.
        """
        base, dataset = self._base, self._base.dataset
        sharded = isinstance(dataset, IterableDatasetShard)
        running: Any = getattr(base, "_iterator", None)
        if start and running is not None and base.num_workers:
            running._shutdown_workers()  # they have copies of the dataset, which are told nothing any more
            base._iterator = None
        collate = base.collate_fn
        given = collate if draws is None else SeededCollate(collate, *draws)
        if self._owner.agreement is not None:
            given = given if base.batch_size is None else TopUp(given, base.batch_size)
        elif sharded or base.num_workers:
            given = CountingCollate(given)
        base.collate_fn = given
        try:
            if sharded:
                dataset.start, dataset.strict = start, strict
                with dataset.telling():
                    yield
            else:
                # The iterator keeps what it is made with; torch guards the attribute against plain assignment.
                base.__dict__["dataset"] = Continued(dataset, start, strict) if start else dataset
                yield
        finally:
            base.__dict__["dataset"] = dataset
            base.collate_fn = collate
            if sharded and base.num_workers:  # the workers have copies
                dataset.start = 0

    # The state of a dataset that can save its own -----------------------------------------------------------------

    @property
    def saves_in_workers(self) -> bool:
        """Whether worker processes read a dataset that can save its own state."""
        return self.iterable and self._base.num_workers > 0 and has_state(self._base.dataset)

    def _saves_itself(self) -> bool:
        return has_state(self._nodes()[0])

    def _return_to(self, snapshot: dict[str, Any], stream: PrivateStream, seed: tuple[int, int, int]) -> int:
        """Set the dataset to a state of its own; return how many samples were read before that."""
        dataset: Any = self._base.dataset
        inner: Any = self._nodes()[0]
        if isinstance(dataset, IterableDatasetShard):
            with PrivateStream(seed), self._kept():
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
        return None if feed.total is None else max(0, feed.total - mark.given)

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
        common = {"epoch": epoch, "ordinal": mark.ordinal, "has_workers": mark.has_workers, "datasets": self._held()}
        if place is None:
            return {**common, "samplers": capture(self._nodes(), self._baseline)}
        if place is not mark.pending:
            check = place.check
            if mark.feed is not None and self._owner.shard_index == 0 and mark.given and place.opening:
                indices = mark.feed.recently((mark.given - 1) * self._owner.reads_per_step + 1)
                check = None if indices is None else Check.of(done - place.per_step, indices)
            place = self._with_trail(place)
            # Before the last batch, which is compared when it is read again.
            fitting = [snapshot for snapshot in mark.snapshots if snapshot["done"] <= done - place.per_step]
            snapshot = fitting[-1] if fitting else place.snapshot
            now = capture(self._nodes(), self._baseline)
            place = replace(place, done=done, check=check, snapshot=snapshot, shards=self._own_shards(), now=now)
            place.is_finished = place.is_finished or (mark.feed is not None and mark.feed.last is not None)
        return {**common, "place": place.to_state()}

    def _held(self) -> list[dict[str, Any]] | None:
        """Return the generators that datasets with indices hold; say so where they are not those that are drawn from."""
        if self.iterable:
            return None
        held = [
            {name: value for name, value in kept.get("generators", {}).items() if value is not None}
            for kept in capture(self._datasets)
        ]
        if not any(held):
            return None
        if self._base.num_workers == 0 and not self._ahead:
            return held
        if not self._told:
            self._told = True
            name = next(type(node).__name__ for node, kept in zip(self._datasets, held, strict=True) if kept)
            warnings.warn(
                f"{name} holds a random generator of its own, which is drawn from ahead of the loop or in worker processes, "
                "so that a checkpoint cannot hold where it is: after load_state it draws other numbers than in this run. "
                "Draw from the global generators (random, numpy.random, torch) in the dataset: those are seeded for each "
                "batch.",
                stacklevel=6,
            )
        return None

    def _with_trail(self, place: Place) -> Place:
        mark, owner = self._owner._mark, self._owner
        if mark.trail is None or not mark.given:
            return place
        number = mark.given * owner.reads_per_step
        seen = mark.trail.seen(number) if owner.shard_index == 0 else None
        return replace(place, by_worker=mark.trail.by_worker(number), seen=seen)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Let the next pass continue where `state` was called.

        Raises:
            CheckpointError: If the data has another size now, or the samplers are others.
        """
        place = Place.from_state(saved["place"]) if "place" in saved else None
        if place is not None:
            self._check_shards(place)
            if not self.iterable:
                self._check_size(place)
        mark = self._owner._mark
        mark.place, mark.given, mark.finished, mark.pending = None, 0, False, None
        mark.loads += 1
        if saved.get("datasets") is not None and len(saved["datasets"]) == len(self._datasets):
            put_back(self._datasets, [{"values": {}, "generators": kept} for kept in saved["datasets"]])
        mark.iteration, mark.ordinal, mark.has_workers = saved["epoch"], saved["ordinal"], saved["has_workers"]
        now = saved["samplers"] if place is None else place.now
        if now is not None:
            put_back(self._nodes(), now, self._baseline)
        mark.pending = place

    def _check_shards(self, place: Place) -> None:
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
