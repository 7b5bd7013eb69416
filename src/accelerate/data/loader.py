"""The loader `prepare` returns when each rank reads its own data.

Owns looking one batch ahead, placing batches on the device and counting passes. Never decides which samples a rank
reads: that is in the samplers it is given.

[Note: one ahead]
Whether a batch is the last is known only when the next one was asked for. So a loop over a prepared loader is one
batch behind the loader underneath, and a state for resuming is taken before that next one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from .. import hardware
from ..core.enums import RNGType
from ..core.errors import SettingError, explain
from ..runtime import state
from ..runtime.accumulation import GradientState
from ..runtime.ops import send_to_device
from ..runtime.rng import synchronize_rng_states
from .samplers import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    num_samples_of,
)
from .stateful import make_stateful_loader

NOTHING = object()
"""What a source without a further batch gives; `None` is a batch like any other."""


class DataLoaderAdapter(DataLoader[Any]):
    """A `DataLoader` that stands in front of another one.

    `base_dataloader` holds all arguments and does the reading; attributes are read from it and written to it. With
    `use_stateful_dataloader` it is torchdata's, and `state_dict` is available.

    Args:
        dataset: What to load from.
        use_stateful_dataloader: Use torchdata's `StatefulDataLoader`.
        batch_sampler: Which indices make a batch.
        **kwargs: Further arguments of `torch.utils.data.DataLoader`.

    Raises:
        MissingPackage: (an `ImportError`) if torchdata is needed and absent.
    """

    base_dataloader: DataLoader[Any]

    def __init__(
        self,
        dataset: Any,
        use_stateful_dataloader: bool = False,
        batch_sampler: BatchSampler | Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        make = make_stateful_loader if use_stateful_dataloader else DataLoader
        self.use_stateful_dataloader = use_stateful_dataloader
        self.dl_state_dict: dict[str, Any] | None = None
        self.skip_batches = 0
        self._resumes = False
        self.base_dataloader = make(dataset, batch_sampler=batch_sampler, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":  # copying makes an empty object first
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_dataloader")
        if base is not None and (name in base.__dict__ or name == "multiprocessing_context"):
            setattr(base, name, value)
        else:
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.base_dataloader)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the current pass, counting only batches that the loop was given.

        Raises:
            SettingError: (a `ValueError`) without `use_stateful_dataloader`.
        """
        base: Any = self._require_stateful("state_dict")
        return base.state_dict() if self.dl_state_dict is None else self.dl_state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the next pass from a place that `state_dict` returned.

        Raises:
            SettingError: (a `ValueError`) without `use_stateful_dataloader`.
        """
        base: Any = self._require_stateful("load_state_dict")
        base.load_state_dict(state_dict)
        self.dl_state_dict = state_dict
        self._resumes = True

    def adjust_state_dict_for_prefetch(self) -> None:
        """Take the state for resuming before a batch is read ahead. See [Note: one ahead]."""
        if self.use_stateful_dataloader:
            base: Any = self.base_dataloader
            self.dl_state_dict = base.state_dict()

    def _batches_to_skip(self) -> int:
        # A saved place lies behind the batches to skip already.
        resumes, self._resumes = self._resumes, False
        return 0 if resumes else self.skip_batches

    def _require_stateful(self, method: str) -> DataLoader[Any]:
        if not self.use_stateful_dataloader:
            raise SettingError(
                explain(
                    f"{method}() was called on a loader prepared with use_stateful_dataloader=False, which has no state.",
                    accepted="loaders prepared with use_stateful_dataloader=True",
                    remedy="Pass DataLoaderConfiguration(use_stateful_dataloader=True), or use skip_first_batches.",
                )
            )
        return self.base_dataloader

    @property
    def index_sampler(self) -> Any:
        """What says which indices make a batch: the batch sampler, or a sampler that takes its place."""
        return index_sampler(self.base_dataloader)

    def get_sampler(self) -> Any:
        """Return the sampler at the bottom, under everything that batches and shards."""
        return innermost_sampler(self.index_sampler)

    def set_sampler(self, sampler: Any) -> None:
        """Replace the sampler at the bottom."""
        replace_innermost_sampler(self.base_dataloader, sampler)

    def _set_samplers_epoch(self, epoch: int) -> None:
        node = self.index_sampler
        while node is not None:
            if hasattr(node, "set_epoch"):
                node.set_epoch(epoch)
            node = _below(node)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


def index_sampler(dataloader: DataLoader[Any]) -> Any:
    """Return what says which indices make a batch: the batch sampler, or a sampler that takes its place."""
    return dataloader.sampler if dataloader.batch_sampler is None else dataloader.batch_sampler


def replace_innermost_sampler(dataloader: DataLoader[Any], sampler: Any) -> None:
    """Put `sampler` in the place of the one under all batch samplers."""
    owner = index_sampler(dataloader)
    while (below := _below(owner)) is not None and _below(below) is not None:
        owner = below
    if below is not None:
        owner.sampler = sampler
    if below is None or owner is dataloader.batch_sampler:
        # The loader names its sampler too; torch guards that against plain assignment.
        object.__setattr__(dataloader, "sampler", sampler)


def _below(sampler: Any) -> Any:
    below = getattr(sampler, "batch_sampler", None)
    return getattr(sampler, "sampler", None) if below is None else below


def innermost_sampler(sampler: Any) -> Any:
    """Return the sampler under any number of batch samplers."""
    while (below := _below(sampler)) is not None:
        sampler = below
    return sampler


class DataLoaderStateMixin:
    """What `GradientState` reads from the loader a loop runs over.

    `end_of_dataloader` is true during the last batch. `remainder` is the number of real samples in the last global
    batch: 0 when it is full, -1 when that is not known.
    """

    end_of_dataloader = False
    remainder = -1
    gradient_state: GradientState
    _left_early = 0

    def reset(self) -> None:
        """Forget what is known of the last batch."""
        self.end_of_dataloader = False
        self.remainder = -1

    def begin(self) -> None:
        """Start a pass: this is the innermost loader now."""
        for _ in range(self._left_early):  # a pass that was broken off left it among the active ones
            self.gradient_state._remove_dataloader(self)
        self._left_early = 0
        self.reset()
        self.remainder = self._expected_remainder()
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """End a pass: the loader around this one, if any, is the innermost again."""
        self.gradient_state._remove_dataloader(self)
        self.reset()

    def _expected_remainder(self) -> int:
        return -1


class DataLoaderShard(DataLoaderAdapter, DataLoaderStateMixin):
    """A loader that gives this process its share of the data, on its device.

    Args:
        dataset: What to load from.
        device: Where to put batches; `None` leaves them where they are.
        rng_types: Which random generators to make equal on all ranks at the start of each pass; collective.
        synchronized_generator: The generator meant by `"generator"`.
        skip_batches: How many batches to read and leave out, in every pass.
        use_stateful_dataloader: Use torchdata's `StatefulDataLoader`.
        torch_device_mesh: The mesh whose data axes the samplers were made for.
        iteration: The number of the first pass.
        **kwargs: Further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | int | None = None,
        rng_types: Sequence[str | RNGType] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self.torch_device_mesh = torch_device_mesh
        self.iteration = iteration
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self._seed_is_shared = False

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._synchronize()
        place = placement(self.device, self._non_blocking)
        look_ahead = self.adjust_state_dict_for_prefetch if self.use_stateful_dataloader else None
        self.begin()
        try:
            self.set_epoch(self.iteration)
            batches = islice(iter(self.base_dataloader), self._batches_to_skip(), None)
            current = next(batches, NOTHING)
            if current is not NOTHING:
                if look_ahead is not None:
                    look_ahead()
                for following in batches:
                    yield current if place is None else place(current)
                    current = following
                    if look_ahead is not None:
                        look_ahead()
                self.end_of_dataloader = True
                yield current if place is None else place(current)
        except GeneratorExit:
            self._left_early += 1  # the loop was broken off; it stays the active loader until it begins again
            raise
        except BaseException:
            self.end()
            raise
        self.iteration += 1
        self.adjust_state_dict_for_prefetch()
        self.end()

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the next pass, for samplers and datasets whose order depends on it."""
        self.iteration = epoch
        self._set_samplers_epoch(epoch)

    @property
    def total_batch_size(self) -> int:
        """Number of samples all processes read in one step; of a sharded iterable dataset, this process alone.

        Raises:
            SettingError: (a `ValueError`) if batches have no fixed size.
        """
        return known_batch_size(self._total_batch_size(), self.index_sampler)

    @property
    def total_dataset_length(self) -> int:
        """Number of samples in the dataset; of a sharded iterable dataset, in this process's share."""
        dataset: Any = self.dataset
        return dataset.total_length if hasattr(dataset, "total_length") else len(dataset)

    def _total_batch_size(self) -> int | None:
        sampler = self.index_sampler
        while isinstance(sampler, SkipBatchSampler):
            sampler = sampler.batch_sampler
        size = getattr(sampler, "batch_size", None)
        if isinstance(sampler, BatchSamplerShard) and not sampler.split_batches:
            return None if size is None else size * sampler.num_processes
        return size

    def _expected_remainder(self) -> int:
        total = self._total_batch_size()
        if self._drop_last or total is None:
            return -1
        source, left_out = _source_of_batches(self.index_sampler)
        num_samples = num_samples_of(source)
        if num_samples is None:
            num_samples = _length(self, "total_dataset_length")
            num_batches = _length(source)
            # A sampler of another kind may draw anything: believe in the dataset's length only if it fits.
            if num_samples is None or (num_batches is not None and num_batches != -(-num_samples // source.batch_size)):
                return -1
        return max(0, num_samples - left_out) % total

    def _synchronize(self) -> None:
        if self.rng_types is None:
            return
        synchronize_rng_states(self.rng_types, self.synchronized_generator)
        sampler = self.get_sampler()
        if self._seed_is_shared or not isinstance(sampler, SeedableRandomSampler):
            return
        # Its order follows from its seed, which ranks took from their own generators, and not from its state.
        if RNGType.GENERATOR in [RNGType(kind) for kind in self.rng_types]:
            sampler.initial_seed = state.current_or_single().collectives.broadcast_object(sampler.initial_seed)
            self._seed_is_shared = True


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


def _source_of_batches(sampler: Any) -> tuple[Any, int]:
    """Return what is under shards and skips, and how many of its samples are left out before they are shared out.

    Skips above a shard leave out whole steps, which changes nothing about the last one.
    """
    left_out, inside = 0, False
    while isinstance(sampler, (SkipBatchSampler, BatchSamplerShard)):
        if isinstance(sampler, BatchSamplerShard):
            inside = True
        elif inside:
            left_out += sampler.skip_batches * (getattr(sampler, "batch_size", None) or 0)
        sampler = sampler.batch_sampler
    return sampler, left_out


def _length(owner: Any, name: str | None = None) -> int | None:
    try:
        return len(owner) if name is None else getattr(owner, name)
    except (TypeError, NotImplementedError):  # how datasets and samplers say that they have no length
        return None


def placement(device: torch.device | str | int | None, non_blocking: bool) -> Callable[[Any], Any] | None:
    """Return what moves a batch to `device`, or `None` when batches are made where they are used."""
    if device is None or not hardware.of(torch.device(device), "device of a loader").needs_placement:
        return None
    return partial(send_to_device, device=torch.device(device), non_blocking=non_blocking)
