"""The samplers of prepared loaders, over the arithmetic of `data.shards`.

Owns the public classes that say which indices a rank reads. Never touches devices or process groups.

[Note: drawing an order at once]
For torch's own `BatchSampler` over a sampler that visits each sample once, the order of a pass is one permutation,
and a rank needs only its own rows of it. Drawing it as a tensor and reading those rows costs the same on one rank
or a thousand; walking all batches of all ranks does not. The order, and what it takes from the random generator,
are bit for bit those of walking; tests compare the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from ..core.errors import SettingError, explain
from .shards import ShardPlan

_BATCHES_AT_ONCE = 512
"""How many batches become lists of Python numbers at a time; bounds memory and the time to the first batch."""


class SeedableRandomSampler(RandomSampler):
    """A random sampler whose order depends on a seed and the epoch only.

    The order of epoch `e` is `torch.randperm(n)` of a generator seeded with `initial_seed + e`. The epoch advances
    after each pass.

    Args:
        *args: As for `torch.utils.data.RandomSampler`.
        data_seed: The seed; without one, torch's initial seed at construction.
        **kwargs: As for `torch.utils.data.RandomSampler`.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.generator is None:
            self.generator = torch.Generator()
        self.initial_seed = torch.random.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self._seed_epoch()
        if is_permutation(self):
            yield from torch.randperm(len(self.data_source), generator=self.generator).tolist()
        else:
            yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def _seed_epoch(self) -> None:
        self.generator.manual_seed((self.initial_seed + self.epoch) % 2**64)


class BatchSamplerShard(BatchSampler):
    """The batches of one process out of those of a batch sampler.

    Args:
        batch_sampler: The sampler to share out. It must give the same batches on all processes.
        num_processes: Among how many. May be assigned later.
        process_index: For which one. May be assigned later.
        split_batches: Cut each batch into equal parts, in place of giving whole batches in turn.
        even_batches: Top up from the beginning where processes would get different numbers of samples.

    Raises:
        SettingError: (a `ValueError`) if batches cannot be split evenly.

    Example:
        >>> batches = BatchSampler(range(10), batch_size=4, drop_last=False)
        >>> list(BatchSamplerShard(batches, num_processes=2, process_index=1))
        [[4, 5, 6, 7], [2, 3, 4, 5]]
    """

    def __init__(
        self,
        batch_sampler: Sampler[list[int]] | Iterable[Any],
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.spread = False
        """Share an incomplete last round out evenly, as a fixed global batch size needs."""
        self.multiple = 1
        """With `drop_last`, leave out what is not a whole multiple of so many samples."""
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self._plan()

    def _plan(self) -> ShardPlan:
        # Made anew each time: clients assign num_processes and process_index, one after the other.
        return ShardPlan(
            index=self.process_index,
            count=self.num_processes,
            batch_size=self.batch_size,
            split=self.split_batches,
            even=self.even_batches,
            drop_last=self.drop_last,
            spread=self.spread,
            multiple=self.multiple,
        ).check()

    @property
    def total_length(self) -> int:
        """Number of batches of all processes together."""
        return len(self.batch_sampler)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return self._plan().length(self.total_length, num_samples_of(self.batch_sampler))

    def __iter__(self) -> Iterator[list[int]]:
        plan, source = self._plan(), cast("Any", self.batch_sampler)
        if type(source) is not BatchSampler or (
            source.batch_size,
            source.drop_last,
        ) != (plan.batch_size, plan.drop_last):
            return plan.walk(source)
        if type(source.sampler) is SequentialSampler:
            return sequential_batches(plan, len(source.sampler))
        if type(source.sampler) in (
            RandomSampler,
            SeedableRandomSampler,
        ) and is_permutation(source.sampler):
            return _shuffled(plan, cast("RandomSampler", source.sampler))
        return plan.walk(source)


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches.

    Args:
        batch_sampler: The sampler to shorten.
        skip_batches: How many batches to leave out, in every pass.
    """

    def __init__(self, batch_sampler: Sampler[list[int]] | Iterable[Any], skip_batches: int = 0) -> None:
        if skip_batches < 0:
            raise SettingError(
                explain(
                    f"skip_batches={skip_batches} is negative.",
                    accepted="0 or more",
                    remedy="Pass a count of batches.",
                )
            )
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        # Size and sampler are those of the sampler it shortens, which need not have any.
        if name not in ("batch_size", "drop_last", "sampler"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.batch_sampler, name)

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batch_sampler), self.skip_batches, None)

    @property
    def total_length(self) -> int:
        """Number of batches without skipping."""
        return len(self.batch_sampler)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return max(0, self.total_length - self.skip_batches)


def is_permutation(sampler: Any) -> bool:
    """Tell whether a `RandomSampler` visits each sample exactly once."""
    num_samples = len(sampler.data_source)
    return not sampler.replacement and sampler.num_samples == num_samples > 0


def num_samples_of(batch_sampler: Any) -> int | None:
    """Return how many samples torch's own batch sampler draws in a pass; `None` where that cannot be known.

    A class derived from it counts as its own where it neither batches nor counts in another way.
    """
    kind = type(batch_sampler)
    if (
        not isinstance(batch_sampler, BatchSampler)
        or kind.__iter__ is not BatchSampler.__iter__
        or kind.__len__ is not BatchSampler.__len__
        or not isinstance(batch_sampler.sampler, Sized)
    ):
        return None
    return len(batch_sampler.sampler)


def sequential_batches(plan: ShardPlan, num_samples: int) -> Iterator[list[int]]:
    """Yield a shard's batches of samples that are read in order."""
    stride, rows = plan.stride, plan.rows
    first = plan.begin + plan.offset
    for start in range(first, first + plan.num_regular(num_samples) * stride, stride):
        yield list(range(start, start + rows))
    yield from plan.irregular(num_samples)


@dataclass
class Order:
    """The permutation of one pass."""

    sampler: RandomSampler | SeedableRandomSampler
    generator: torch.Generator
    order: torch.Tensor
    """Shape (num_samples,), integers."""

    is_finished: bool = False
    """Whether the sampler is as it is at the end of a pass."""

    def finish(self) -> None:
        """Leave the sampler as it is at the end of a pass."""
        if self.is_finished:
            return
        self.is_finished = True
        if isinstance(self.sampler, SeedableRandomSampler):
            self.sampler.set_epoch(self.sampler.epoch + 1)
        elif self.sampler.generator is not None:
            _skip_permutation(len(self.sampler.data_source), self.generator)


def draw_order(sampler: RandomSampler | SeedableRandomSampler) -> Order:
    """Draw the permutation of a pass, as iterating the sampler would."""
    if isinstance(sampler, SeedableRandomSampler):
        sampler._seed_epoch()
    generator = sampler.generator
    if generator is None:
        # As torch's sampler does: a generator of its own for each pass, seeded from the global one.
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return Order(sampler, generator, _permutation(len(sampler.data_source), generator))


def shuffled_batches(plan: ShardPlan, drawn: Order) -> Iterator[list[int]]:
    """Yield a shard's batches of a permutation, which is given up as soon as the shard's rows are taken from it."""
    order, num_samples = drawn.order, len(drawn.order)
    regular = plan.num_regular(num_samples)
    first = plan.begin + plan.offset if regular else 0
    mine = order.as_strided((regular, plan.rows), (plan.stride, 1), first).clone()
    irregular = [order[torch.tensor(positions)].tolist() for positions in plan.irregular(num_samples)]
    del order
    drawn.order = mine.new_empty(0)  # the whole permutation need not outlive this rank's rows of it
    for some in mine.split(_BATCHES_AT_ONCE):
        yield from some.tolist()
    yield from irregular
    drawn.finish()


def _shuffled(plan: ShardPlan, sampler: RandomSampler) -> Iterator[list[int]]:
    yield from shuffled_batches(plan, draw_order(sampler))


_MOST_SAMPLES = 2**32 // 20
"""Above this many, torch draws permutations with numbers of 64 bits."""


def _permutation(num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `torch.randperm(num_samples)`, in half the memory and time where the numbers allow it."""
    if num_samples < _MOST_SAMPLES and _shortcuts_hold():
        return torch.randperm(num_samples, generator=generator, dtype=torch.int32)
    return torch.randperm(num_samples, generator=generator)


def _skip_permutation(num_samples: int, generator: torch.Generator) -> None:
    """Advance the generator as `torch.randperm(num_samples)` does.

    At the end of a pass torch's random sampler draws a second permutation, and takes none of it. The generator has
    to move all the same, or the next epoch's order would differ.
    """
    if num_samples < _MOST_SAMPLES and _shortcuts_hold():
        torch.empty(num_samples - 1, dtype=torch.uint8).random_(generator=generator)
    else:
        torch.randperm(num_samples, generator=generator)


@functools.cache
def _shortcuts_hold() -> bool:
    """Tell whether this torch draws permutations as `_permutation` and `_skip_permutation` take for granted."""
    wide, narrow, skipped = (torch.Generator().manual_seed(11) for _ in range(3))
    same = torch.equal(
        torch.randperm(999, generator=wide),
        torch.randperm(999, generator=narrow, dtype=torch.int32).long(),
    )
    torch.empty(998, dtype=torch.uint8).random_(generator=skipped)
    states = [generator.get_state() for generator in (wide, narrow, skipped)]
    return same and torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def known_batch_size(size: int | None, sampler: Any) -> int:
    """Return `size`, unless it is not known.

    Raises:
        SettingError: (a `ValueError`) if batches have no fixed size.
    """
    if size is None:
        raise SettingError(
            explain(
                f"total_batch_size is not known: {type(sampler).__name__} (from the loader) has no batch_size.",
                accepted="batch samplers with an integer attribute batch_size",
                remedy="Give the batch sampler a batch_size, or count the samples of each batch.",
            )
        )
    return size
