"""Which indices a loader reads next, from any place of a pass on.

Owns what stands between a loader and its samplers: starting in the middle, telling the last batch one ahead, the
padding of each batch, and the check that a sampler gives the order again that it gave before. Never reads a sample.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..core.errors import CheckpointError, explain
from .samplers import (
    BatchSamplerShard,
    Order,
    SeedableRandomSampler,
    SkipBatchSampler,
    draw_order,
    is_permutation,
    sequential_batches,
    shuffled_batches,
)
from .shards import Padding, ShardPlan
from .streams import PrivateStream, Seeded, Snapshot, numbered

_DRAW_AT_ONCE = (
    range, list, tuple, SequentialSampler, RandomSampler, SeedableRandomSampler, WeightedRandomSampler,
    SubsetRandomSampler, DistributedSampler,
)  # fmt: skip
"""Samplers that draw from the global generators when a pass begins, if ever, and not later."""


@dataclass(frozen=True)
class Check:
    """Indices that were read before, to be found again at the same place of the order."""

    at: int
    """How many units of the source come before them."""

    rows: int
    digest: str

    @classmethod
    def of(cls, at: int, indices: Any) -> Check:
        """Take the digest of one batch of indices."""
        return cls(at, len(indices) if isinstance(indices, Sized) else 1, _digest(indices))

    def matches(self, found: Any) -> bool:
        """Tell whether `found`, read at the same place, begins with the same indices."""
        return _digest(list(found[: self.rows]) if isinstance(found, (list, tuple)) else found) == self.digest


def _digest(indices: Any) -> str:
    items = list(indices) if isinstance(indices, (list, tuple)) else indices
    return hashlib.blake2b(repr(items).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Source:
    """What is under the shards and skips of a loader."""

    plan: ShardPlan
    batches: Any
    """The batch sampler, or the sampler of a loader that does not batch."""
    in_samples: bool
    """Whether its batches are cut from a stream of samples, so that it can be entered at any of them."""
    skip: int
    """How many steps are left out in every pass."""
    plain: bool
    """Whether there is nothing between the loader and `batches`."""

    @property
    def unit(self) -> str:
        """What it is counted in."""
        return "samples" if self.in_samples else "batches"

    @property
    def units_per_step(self) -> int:
        """How much of the source all shards together use in one step: samples, or batches."""
        if self.in_samples:
            return self.plan.stride
        return 1 if self.plan.split else self.plan.count

    @property
    def size(self) -> int | None:
        """How many units there are, where that is known."""
        sized = self.batches.sampler if self.in_samples else self.batches
        try:
            return len(sized)
        except (TypeError, NotImplementedError):  # how samplers say that they have no length
            return None

    @property
    def draws_at_once(self) -> bool:
        """Whether the whole order depends on the global generators at the start of a pass only."""
        return self.in_samples and type(self.batches.sampler) in _DRAW_AT_ONCE

    @property
    def is_drawn_first(self) -> bool:
        """Whether the whole order is drawn, from whatever generator, before its first item is given."""
        return self.draws_at_once and (
            type(self.batches.sampler) is not RandomSampler or is_permutation(self.batches.sampler)
        )

    @property
    def draws_globally(self) -> bool:
        """Whether the order may depend on the global generators, so that ranks have to take it from those of one."""
        if not self.draws_at_once:
            return True
        sampler = self.batches.sampler
        return hasattr(sampler, "generator") and sampler.generator is None

    def num_batches(self, begin: int) -> int | None:
        """Count this shard's batches from unit `begin` on, where that is known."""
        size = self.size
        if size is None:
            return None
        if self.in_samples:
            return replace(self.plan, begin=begin).num_batches(size)
        if self.plain:
            return max(0, size - begin)
        return self.plan.length(max(0, size - begin))


def source_of(sampler: Any) -> Source:
    """Find what is under the shards and skips on top of an index sampler."""
    skip, plain = 0, True
    while type(sampler) is SkipBatchSampler:
        skip, sampler = skip + sampler.skip_batches, sampler.batch_sampler
    plan = ShardPlan(batch_size=None, even=False)
    if type(sampler) is BatchSamplerShard:
        plan, sampler, plain = sampler._plan(), sampler.batch_sampler, False
    in_samples = type(sampler) is BatchSampler
    if plain and in_samples:
        plan = replace(plan, batch_size=sampler.batch_size, drop_last=sampler.drop_last)
    if in_samples and (sampler.batch_size, sampler.drop_last) != (plan.batch_size, plan.drop_last):
        in_samples = False
    return Source(plan, sampler, in_samples, skip, plain)


class Feed:
    """Hands a loader its indices, one pass after the other.

    Args:
        loader: Whose indices.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._reference = weakref.ref(loader)  # which holds this
        self._order: Iterator[tuple[Any, Padding | None]] | None = None
        self.source: Source | None = None
        self.last: int | None = None
        """The number of the last batch since `begin`, counted from 1, once it is known."""
        self.paddings: dict[int, Padding] = {}
        """By number, for batches that are not the same for all shards."""
        self.pass_seed: int | None = None
        """The seed of worker processes over an iterable dataset in the pass that begins."""
        self.pass_epoch: int | None = None
        """The epoch to tell worker processes that outlast a pass: their copies of the dataset are not told otherwise."""
        self.seeds_each = False
        """Seed them for each batch, in place of once: then a dataset can go on from a state of its own."""
        self._drawn_orders: list[Order] = []
        self._was_finished = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_feed, ()  # a copy of its loader makes another one

    @property
    def loader(self) -> Any:
        """Whose indices these are; `None` for a copy, which a loader of its own replaces."""
        return self._reference()

    def __len__(self) -> int:
        return len(self._own())  # pyright: ignore[reportArgumentType]

    def _own(self) -> Any:
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    def begin(
        self,
        source: Source,
        begin: int,
        check: Check | None,
        seed: int | None,
        *,
        behind: int = 2,
        kept: int = 0,
        is_finished: bool = False,
    ) -> None:
        """Set what the next `iter` gives.

        Args:
            source: What to read, as `source_of` found it.
            begin: Which unit of it comes first.
            check: What comes somewhere before.
            seed: Seed each batch on arrival in a worker process, by this seed of the pass.
            behind: How many batches the loop may be behind the reading, besides those that workers prefetch.
            kept: How many batches from the start of the pass to keep in `kept`, where it begins later.
            is_finished: Whether the sampler is already as it is at the end of the pass.
        """
        self.source, self.last, self.paddings = source, None, {}
        self._seed, self._drawn = seed, 0
        self._begin, self._first = begin, begin // source.units_per_step
        self._total: int | None = None
        self._is_counted = False
        ahead = behind + max(1, self.loader.num_workers) * (self.loader.prefetch_factor or 2)
        self.kept: list[Any] = []
        self._recent: deque[Any] = deque(maxlen=ahead)
        self._drawn_orders = []
        self._was_finished = is_finished
        self._order = _order(source, begin, check, kept if begin else 0, self.kept, self._drawn_orders, is_finished)
        self._following: Any = None
        self._primed = False

    @property
    def total(self) -> int | None:
        """How many batches there are since `begin`, as far as that is known."""
        if self.last is not None:
            return self.last
        if not self._is_counted and self.source is not None:
            self._total, self._is_counted = self.source.num_batches(self._begin), True
        return self._total

    def prime(self) -> None:
        """Draw the first batch, if none was drawn yet: with it all is drawn that a pass draws when it begins."""
        if not self._primed and self._order is not None:
            self._following = next(self._order, None)
            self._primed = True

    def finish_again(self) -> None:
        """Leave the sampler as it is at the end of a pass, where that was undone when the pass had been opened.

        Worker processes that read further ahead than batches are left have come to the end by then.
        """
        for order in self._drawn_orders:
            if order.is_finished and not self._was_finished:
                order.is_finished = False
                order.finish()

    def __iter__(self) -> Iterator[Any]:
        if self.pass_seed is not None:
            return self._seeding_workers(self.pass_seed, self.pass_epoch, self.seeds_each)
        return iter(self._own()) if self._order is None else self._hand_out(self._order)

    def _seeding_workers(self, seed: int, epoch: int | None, each: bool) -> Iterator[Any]:
        """Give requests for batches, of which the first goes to the first worker process, and so on."""
        workers = self.loader.num_workers
        for number, request in enumerate(self._own()):
            first = number < workers
            yield Seeded(request, numbered(seed, number), epoch if first else None) if each or first else request

    def _hand_out(self, order: Iterator[tuple[Any, Padding | None]]) -> Iterator[Any]:
        self.prime()
        following, seed, number, recent = self._following, self._seed, 0, self._recent
        while following is not None:
            indices, padding = following
            following = next(order, None)
            number += 1
            if padding is not None:
                self.paddings[number] = padding
            if following is not None and following[1] is not None:
                self.paddings[number + 1] = following[1]
            if following is None:
                self.last = number
            recent.append(indices)
            self._drawn = number
            yield indices if seed is None else Seeded(indices, numbered(seed, self._first + number - 1))
        self._order = None

    def recently(self, number: int) -> Any:
        """Return the indices of batch `number`, or `None` if that is too long ago."""
        place = len(self._recent) - 1 - (self._drawn - number)
        return self._recent[place] if 0 <= place < len(self._recent) else None


def _no_feed() -> None:
    return None


def _order(
    source: Source,
    begin: int,
    check: Check | None,
    wanted: int,
    kept: list[Any],
    drawn: list[Order],
    is_finished: bool,
) -> Iterator[tuple[Any, Padding | None]]:
    """Yield the batches from `begin` on; before that, put as many as are wanted from the start of the pass in `kept`.

    A permutation is put in `drawn`.
    """
    size = source.plan.batch_size or 1
    if source.in_samples:
        sampler = source.batches.sampler
        plan = replace(source.plan, begin=begin)
        if type(sampler) is SequentialSampler:
            if check is not None:
                _verify(check, list(range(check.at, min(check.at + check.rows, len(sampler)))), sampler)
            kept += islice(_chunks(iter(range(begin)), size, True), wanted)
            yield from _padded(plan, len(sampler), sequential_batches(plan, len(sampler)))
            return
        if type(sampler) in (RandomSampler, SeedableRandomSampler) and is_permutation(sampler):
            draw = draw_order(sampler)
            draw.is_finished = is_finished
            drawn.append(draw)
            if check is not None:
                _verify(check, draw.order[check.at : check.at + check.rows].tolist(), sampler)
            kept += [chunk.tolist() for chunk in draw.order[: min(begin, wanted * size)].split(size)] if wanted else []
            yield from _padded(plan, len(sampler), shuffled_batches(plan, draw))
            return
    yield from _walk(source, begin, check, wanted, kept)


def _padded(
    plan: ShardPlan, num_samples: int, batches: Iterator[list[int]]
) -> Iterator[tuple[list[int], Padding | None]]:
    found = plan.padding(num_samples)
    if found is None:
        return ((batch, None) for batch in batches)
    step, padding = found
    return ((batch, padding if number == step else None) for number, batch in enumerate(batches))


def _walk(
    source: Source, begin: int, check: Check | None, wanted: int, kept: list[Any]
) -> Iterator[tuple[Any, Padding | None]]:
    """Read the sampler from its beginning. See [Note: streams of random numbers] in `data.streams`."""
    items = iter(source.batches.sampler if source.in_samples else source.batches)
    if source.draws_at_once:
        yield from _deal(source, items, begin, check, wanted, kept)
        return
    first = list(islice(items, 1))
    dealt = _deal(source, chain(first, items), begin, check, wanted, kept)
    stream = PrivateStream(Snapshot().seeds("order"))
    while True:
        with stream:
            item = next(dealt, None)
        if item is None:
            return
        yield item


def _deal(
    source: Source, items: Iterator[Any], begin: int, check: Check | None, wanted: int, kept: list[Any]
) -> Iterator[tuple[Any, Padding | None]]:
    plan, opening = source.plan, []
    if begin:
        opening = list(islice(items, min(begin, source.units_per_step * max(1, wanted))))
        kept += islice(_chunks(iter(opening), plan.batch_size or 1, True) if source.in_samples else opening, wanted)
        passed = deque(opening, maxlen=begin - check.at if check is not None else 0)
        passed.extend(islice(items, begin - len(opening)))
        if check is not None:
            found = list(islice(passed, check.rows)) if source.in_samples else passed[0] if passed else None
            _verify(check, found, source.batches.sampler if source.in_samples else source.batches)
    if source.in_samples and plan.drop_last and plan.multiple > 1 and source.size is not None:
        items = islice(items, max(0, plan.usable(source.size) - begin))
    if source.in_samples:
        size = source.plan.batch_size or 1
        batches = _chunks(items, size, plan.drop_last)
        opening = list(_chunks(iter(opening), size, False))
    else:
        batches = items
    if plan.count == 1 and (plan.spread or plan.drop_last or not plan.even):
        size = plan.batch_size if plan.spread and source.in_samples else None
        for batch in batches:
            yield batch, None if size is None or len(batch) == size else Padding((len(batch),), (len(batch),))
        return
    if opening and len(opening) < plan.count and not plan.split:
        # Fewer were read before than one round of this many shards: the rest of that round comes now.
        more = list(islice(batches, plan.count - len(opening)))
        opening, batches = opening + more, chain(more, batches)
    yield from plan.deal(batches, opening)


def _chunks(items: Iterator[Any], size: int, drop_last: bool) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        if len(chunk) < size and drop_last:
            return
        yield chunk


def _verify(check: Check, found: Any, sampler: Any) -> None:
    if not check.matches(found):
        raise CheckpointError(
            explain(
                f"{type(sampler).__name__} does not give the order again that it gave before the checkpoint: at place "
                f"{check.at} it has {found!r:.80} now. Going on would repeat some samples and lose others.",
                accepted="samplers whose order follows from the global random generators, from generators and numbers "
                "among their attributes, or from their own state_dict() and load_state_dict()",
                remedy="Give the sampler these two methods, or call set_epoch() on the loader to begin a pass anew.",
            )
        )
