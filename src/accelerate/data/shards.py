"""Which samples each data shard reads.

Owns the index arithmetic. Never touches tensors, devices, loaders or process groups. Called by `data.samplers`,
`data.prepare` and by tests.

[Note: positions]
Samples are numbered in the order in which the sampler gives them. They are dealt in rounds of `stride`, from `begin`
on; in each, shard `index` reads `rows` of them from `offset` on. A last round that is short is, with `even`, continued
from the first sample again, as often as it takes: position `p` past the end is sample `p % num_samples`. With `spread`
its samples are shared out evenly, and only a shard that gets none of them reads one that is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import cycle, islice
from math import prod
from typing import Any

from ..core.errors import SettingError, explain

AXES_SHARING_BATCHES = frozenset({"tp", "cp", "sp", "pp"})
"""Mesh axes along which ranks work on the same batch; along any other one they read different data."""


def mesh_data_shard(axis_names: Sequence[str], shape: Sequence[int], coordinate: Sequence[int]) -> tuple[int, int]:
    """Return which data shard a place in a mesh reads, and of how many.

    Ranks that differ along `tp`, `cp`, `sp` or `pp` only get the same answer.

    Args:
        axis_names: Names of the axes, such as `("dp_replicate", "dp_shard", "tp")`.
        shape: Their sizes.
        coordinate: The place along each of them.
    """
    axes = zip(axis_names, shape, coordinate, strict=True)
    data = [(size, place) for name, size, place in axes if name not in AXES_SHARING_BATCHES]
    index = 0
    for size, place in data:
        index = index * size + place
    return index, prod(size for size, _ in data)


@dataclass(frozen=True, slots=True)
class Padding:
    """What the data shards get in one step, where that is not the same number of real samples for all.

    Also given for a last step in which all get equally few, and where a global batch size is kept for any step that is
    not full, on one shard too.
    """

    rows: tuple[int, ...]
    """Samples in the batch of each shard; 0 for one that has no batch in this step."""

    real: tuple[int, ...]
    """How many of them, from the front, no other shard and no earlier step has; the others are padding. -1 where a
    slicing function of the user's own does not let one tell."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The share of one data shard in a stream of batches. See [Note: positions]."""

    index: int = 0
    """Which data shard, from 0 on; ranks that share a batch share the index."""

    count: int = 1
    """How many data shards there are."""

    batch_size: int | None = None
    """Samples in a batch of the source; `None` when it has no fixed size."""

    split: bool = False
    """Cut each batch of the source into `count` parts, in place of giving out whole batches in turn."""

    even: bool = True
    """Top up the last round, so that all shards get the same number of batches of the same size."""

    drop_last: bool = False
    """Leave an incomplete last round out."""

    spread: bool = False
    """Share the samples of an incomplete last round out evenly, in place of topping up."""

    multiple: int = 1
    """With `drop_last`, leave out what is not a whole multiple of so many samples."""

    begin: int = 0
    """Which sample is dealt first: those before it were, perhaps to another number of shards."""

    def check(self) -> ShardPlan:
        """Return the plan if it can be carried out.

        Raises:
            SettingError: (a `ValueError`) if the index is not one of `count`, or batches cannot be split evenly.
        """
        if not 0 <= self.index < self.count:
            raise SettingError(
                explain(
                    f"process_index={self.index} is not one of num_processes={self.count} data shards.",
                    accepted=f"0 to {self.count - 1}" if self.count > 0 else "num_processes of at least 1",
                    remedy="Pass the rank and the world size, or leave both out.",
                )
            )
        if self.split and (self.batch_size is None or self.batch_size % self.count):
            given = "is not known" if self.batch_size is None else f"does not divide by {self.count}"
            raise SettingError(
                explain(
                    f"split_batches=True cuts each batch into num_processes={self.count} equal parts, and "
                    f"batch_size={self.batch_size} (from the loader) {given}.",
                    accepted="a batch size that is a round multiple of the number of processes",
                    remedy="Change the batch size, or pass split_batches=False: each process then gets whole batches.",
                )
            )
        return self

    @property
    def rows(self) -> int:
        """Samples this shard reads in a round; needs a batch size."""
        return self._size // self.count if self.split else self._size

    @property
    def stride(self) -> int:
        """Samples all shards together read in a round; needs a batch size."""
        return self._size if self.split else self._size * self.count

    @property
    def offset(self) -> int:
        """Where in a round this shard's samples begin; needs a batch size."""
        return self.index * self.rows

    @property
    def _size(self) -> int:
        if self.batch_size is None:
            raise SettingError(explain("A source of batches without batch_size has no positions."))
        return self.batch_size

    def usable(self, num_samples: int) -> int:
        """Count the samples that are not left out for being no whole multiple."""
        return num_samples - num_samples % self.multiple if self.drop_last else num_samples

    def num_batches(self, num_samples: int) -> int:
        """Count this shard's batches from a source that cuts `num_samples` into batches of `batch_size`."""
        left = max(0, self.usable(num_samples) - self.begin)
        if self.drop_last:
            return left // self.stride
        if self.even or self.spread:
            return -(-left // self.stride)
        return max(0, -((self.offset - left) // self.stride))

    def num_regular(self, num_samples: int) -> int:
        """Count those of them that are full without topping up; they come first."""
        left = num_samples - self.begin
        if self.spread:
            return min(max(0, left // self.stride), self.num_batches(num_samples))
        whole = max(0, (left - self.offset - self.rows) // self.stride + 1)
        return min(whole, self.num_batches(num_samples))

    def irregular(self, num_samples: int) -> list[list[int]]:
        """Return the positions in the batches after the regular ones: none, or one that is topped up or short."""
        found = []
        for step in range(self.num_regular(num_samples), self.num_batches(num_samples)):
            start = self.begin + step * self.stride
            if self.spread:
                sizes = self._spread(num_samples - start)
                start += sum(sizes[: self.index])
                found.append(list(range(start, start + sizes[self.index])) or [0])
                continue
            positions = range(start + self.offset, start + self.offset + self.rows)
            found.append([p % num_samples for p in positions if self.even or p < num_samples])
        return found

    def padding(self, num_samples: int) -> tuple[int, Padding] | None:
        """Return the step in which shards get different numbers of real samples, and how many; `None` if in none."""
        step, left = divmod(max(0, num_samples - self.begin), self.stride)
        if left == 0 or self.drop_last:
            return None
        if self.spread:
            real = self._spread(left)
            found = Padding(tuple(max(1, size) for size in real), tuple(real))
        else:
            real = [min(max(0, left - index * self.rows), self.rows) for index in range(self.count)]
            found = Padding((self.rows,) * self.count if self.even else tuple(real), tuple(real))
        return (step, found) if self.count > 1 or self.spread else None

    def _spread(self, left: int) -> list[int]:
        share, more = divmod(left, self.count)
        return [share + (index < more) for index in range(self.count)]

    def length(self, source_length: int, num_samples: int | None = None) -> int:
        """Count this shard's batches.

        Args:
            source_length: Number of batches of the source.
            num_samples: Number of its samples, where it is known and all batches but the last are full.
        """
        if num_samples is not None and self.batch_size is not None:
            return self.num_batches(num_samples)
        if self.split:
            return source_length
        if self.drop_last:
            return source_length // self.count
        if self.even:
            return -(-source_length // self.count)
        return max(0, -((self.index - source_length) // self.count))

    def walk(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield this shard's batches of a source of any kind, which is read to its end.

        Nothing of the source is changed. Batches need not have `batch_size` samples; without one, they need not
        even be lists, and are given out whole.
        """
        return (batch for batch, _ in self.deal(source))

    def deal(self, source: Iterable[Any], opening: Sequence[Any] = ()) -> Iterator[tuple[Any, Padding | None]]:
        """Yield what `walk` does, each batch with what the other shards get in the same step, if that differs.

        Args:
            source: Gives batches, from `begin` on.
            opening: The first batches of the pass where `source` begins later, to top up with; one for each shard,
                or one with `split`.
        """
        return self._deal_parts(source, opening) if self.split else self._deal_whole(source, list(opening))

    def _deal_whole(self, source: Iterable[Any], opening: list[Any]) -> Iterator[tuple[Any, Padding | None]]:
        for batches, last in _groups(source, self.count):
            opening = opening or batches
            missing = self.count - len(batches)
            if last and not self.drop_last and self.spread:
                yield self._spread_out(batches, opening)
                continue
            given = self._topped_up(batches, opening) if last and not self.drop_last and self.even else batches
            if self.index < len(given) and not (missing and self.drop_last):
                yield given[self.index], self._padding(given, batches)

    def _spread_out(self, batches: list[Any], opening: list[Any]) -> tuple[Any, Padding | None]:
        samples = [sample for batch in batches for sample in batch]
        sizes = self._spread(len(samples))
        start = sum(sizes[: self.index])
        mine = samples[start : start + sizes[self.index]] or [opening[0][0]]
        padding = Padding(tuple(max(1, size) for size in sizes), tuple(sizes))
        return mine, padding

    def _padding(self, given: list[Any], batches: list[Any]) -> Padding | None:
        if self.count == 1:
            return None
        absent = (0,) * (self.count - len(given))
        rows = tuple(_size(batch) for batch in given) + absent
        real = tuple(_size(batch) for batch in batches) + (0,) * (self.count - len(batches))
        return None if rows == real and len(set(rows)) == 1 else Padding(rows, real)

    def _topped_up(self, batches: list[Any], opening: list[Any]) -> list[Any]:
        missing = self.count - len(batches)
        if self.batch_size is None:
            return [*batches, *islice(cycle(opening), missing)]
        short = self.batch_size - len(batches[-1])
        if not missing and short <= 0:
            return batches
        filling = cycle([sample for batch in opening for sample in batch])
        completed = [*batches[-1], *islice(filling, max(0, short))]
        return [
            *batches[:-1],
            completed,
            *([*islice(filling, self.batch_size)] for _ in range(missing)),
        ]

    def _deal_parts(
        self, source: Iterable[list[Any]], given: Sequence[list[Any]]
    ) -> Iterator[tuple[list[Any], Padding | None]]:
        opening = [*given[0]] if given else []
        for (batch,), last in _groups(source, 1):
            opening = opening or batch
            if last and not self.drop_last and self.spread:
                yield self._spread_out([batch], [opening])
                continue
            part, padding = self._part(batch, opening, last)
            if part:
                yield part, padding

    def _part(self, batch: list[Any], opening: list[Any], last: bool) -> tuple[list[Any], Padding | None]:
        size = len(batch)
        whole = batch
        if self.drop_last:
            rows = size // self.count
            size = rows * self.count
        elif self.even:
            target = max(self._size, size) if last else size
            rows = -(-target // self.count)
            whole = [*batch, *islice(cycle(opening), rows * self.count - size)] if rows * self.count > size else batch
        else:
            rows = max(self.rows, -(-size // self.count))
        mine = whole[self.index * rows : (self.index + 1) * rows]
        if self.count == 1 or (rows == self.rows and rows * self.count == size):
            return mine, None
        real = tuple(min(max(0, size - index * rows), rows) for index in range(self.count))
        return mine, Padding((rows,) * self.count if self.even and not self.drop_last else real, real)


def _size(batch: Any) -> int:
    return len(batch) if isinstance(batch, Sized) else 1


def _groups(source: Iterable[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """Yield `size` items at a time (fewer at the end), and whether they are the last ones."""
    items = iter(source)
    head = list(islice(items, 1))
    while head:
        group = head + list(islice(items, size - 1))
        head = list(islice(items, 1))
        yield group, not head
