"""The loader `prepare` returns when each rank reads its own data.

Owns looking one batch ahead, placing batches on the device and counting passes. Never decides which samples a rank
reads: that is in the samplers it is given.

[Note: one ahead]
Whether a batch is the last is known only when the next one was asked for. Where indices say what to read, it is the
indices of the next batch, and no sample is read ahead. A loop over an iterable dataset is one batch behind the loader
underneath, and a state for resuming is taken before that next one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
from . import borders
from .agreement import Agreement, settle_left
from .loop import DataLoaderStateMixin
from .position import Bookmark, Place
from .prefetch import prefetched
from .reader import FedLoader, Reader
from .samplers import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    known_batch_size,
    num_samples_of,
)
from .stateful import make_stateful_loader
from .under import shard_of

NOTHING = object()
"""What a source without a further batch gives; `None` is a batch like any other."""

POSITION = "position"
"""Under which name the state of a stateful loader holds what torchdata does not know of."""


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
        make = make_stateful_loader if use_stateful_dataloader else FedLoader
        self.use_stateful_dataloader = use_stateful_dataloader
        self.dl_state_dict: dict[str, Any] | None = None
        self.skip_batches = 0
        self._resumes = False
        self._resumed: Place | None = None
        """The restored place that torchdata's state belongs to."""
        self._base_counts = True
        self._loops_around: dict[int, int] = {}
        self._loops_beside: dict[int, int] = {}
        self.replaces: Place | None = None
        """A restored place that the batches to skip were told in place of."""
        self._mark = Bookmark()
        self.base_dataloader = base = make(dataset, batch_sampler=batch_sampler, **kwargs)
        self._reader = Reader(self, base)

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = Reader(self, self.base_dataloader)

    def __len__(self) -> int:
        return len(self.base_dataloader)

    def position_state(self) -> dict[str, Any]:
        """Return what `load_position_state` continues from: numbers, texts and tensors."""
        return self._reader.state()

    def load_position_state(self, saved: dict[str, Any]) -> None:
        """Let the next pass continue where `position_state` was called, on any number of processes.

        Raises:
            CheckpointError: If the data has another size now, or the samplers are others.
        """
        self._reader.load_state(saved)

    def own_state(self) -> dict[str, Any] | None:
        """Return torchdata's state of this rank's reading, where it saves reading up to the place again, and is right."""
        mid_pass = self._mark.now()[1] is not None and self._mark.pending is None
        if not (
            mid_pass
            and self._mark.read_by == id(self)
            and self.use_stateful_dataloader
            and self._reader.saves_in_workers
            and self._base_counts
        ):
            return None
        base: Any = self.base_dataloader
        return base.state_dict() if self.dl_state_dict is None else self.dl_state_dict

    def load_own_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `own_state` returned on this rank."""
        place = self._mark.pending
        if place is not None and not place.makes_workers and not _all_workers_have_begun(saved, place.workers):
            return  # the place is found by reading up to it
        self.dl_state_dict = saved
        if not self._reader.iterable:
            self._reader.go_to_step(steps_of_state(saved))
            return
        base: Any = self.base_dataloader
        base.load_state_dict(saved)
        self._resumes, self._resumed = True, self._mark.pending

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the current pass, counting only batches that the loop was given.

        Raises:
            SettingError: (a `ValueError`) without `use_stateful_dataloader`.
        """
        base: Any = self._require_stateful("state_dict")
        # Asked before the first pass, torchdata's loader would begin one, by itself.
        unread = not self._reader.iterable and base._iterator is None
        kept = self.dl_state_dict if self._reader.iterable or unread else None
        own = kept if kept is not None else {} if unread else base.state_dict()
        return {**own, POSITION: self.position_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the next pass from a place that `state_dict` returned.

        Raises:
            SettingError: (a `ValueError`) without `use_stateful_dataloader`.
        """
        self._require_stateful("load_state_dict")
        own = {name: value for name, value in state_dict.items() if name != POSITION}
        if POSITION in state_dict:
            self.load_position_state(state_dict[POSITION])
        if POSITION not in state_dict or self._reader.saves_in_workers:
            self.load_own_state(own)
        else:  # where indices say what to read, the place is known without torchdata's state
            self.dl_state_dict = own

    def adjust_state_dict_for_prefetch(self) -> None:
        """Take the state for resuming before a batch is read ahead. See [Note: one ahead]."""
        if self.use_stateful_dataloader:
            base: Any = self.base_dataloader
            self.dl_state_dict = base.state_dict()

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
        self.shard_index, self.shard_count = shard_of(dataset, self.index_sampler)
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self._seed_is_shared = False
        self.agreement: Agreement | None = None
        """How ranks find out together that they are done, where each has samples of its own."""
        self.prefetches = False
        """Whether batches are copied to the device while the ones before are computed on."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.look_around()
        return self._walk()

    def _walk(self) -> Iterator[Any]:
        watch = borders.before_pass(self)
        settle_left(self.gradient_state)
        place = placement(self.device, self._non_blocking or self.prefetches)
        ahead = self.prefetches and place is not None and self.device is not None
        if self.use_stateful_dataloader and self._reader.saves_in_workers:
            ahead = False  # its state is that of the batch read last, which must be the one given last
        mark = self._mark
        pending, loads = self._take_pending()
        if pending is None:
            self._synchronize()
        self.begin()
        try:
            self._set_samplers_epoch(self.iteration)
            reads = self._reader.read(pending, ahead=ahead)
            if ahead and place is not None and self.device is not None:
                reads, place = prefetched(reads, place, torch.device(self.device)), None
            for batch, padding, last in reads:
                mark.given += 1
                mark.steps_given += 1
                mark.padding = padding
                if last:
                    self.end_of_dataloader = mark.finished = True
                if watch is not None:
                    borders.give(self, watch)
                yield batch if place is None else place(batch)
                if mark.loads != loads:
                    self._check_loads(loads)
                if watch is not None:
                    borders.after_body(self, watch)
        except GeneratorExit:
            if mark.finished:  # zip, for example, does not ask for more than it needs
                mark.close()
            self.leave()
            if (
                watch is not None and not watch.is_closed
            ):  # an iterator may outlive the modules at the end of the process
                borders.end(self, watch)
            raise
        except BaseException:
            self.end()
            raise
        mark.close()
        self.adjust_state_dict_for_prefetch()
        self.end()
        if watch is not None:
            borders.end(self, watch)

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    def batches_ahead(self) -> int | None:
        """Return how many batches of the pass follow the one given last; `None` if that is not known."""
        return 0 if self.end_of_dataloader else self._reader.batches_ahead()

    @property
    def is_last_for_some(self) -> bool:
        """Whether a data shard, this one or another, has no batch after this step."""
        following = self._reader.feed.paddings.get(self._mark.given + 1)
        return self.end_of_dataloader or (following is not None and 0 in following.rows)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the next pass, for samplers and datasets whose order depends on it.

        A place in the middle of a pass that `load_state` restored is kept if it is in this epoch, and given up if not.
        """
        if epoch != self.iteration:
            self._mark.pending = None
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
    def full_batch_size(self) -> int | None:
        """Number of samples this process gets in a full step; `None` if batches have no fixed size."""
        sampler = self.index_sampler
        while isinstance(sampler, SkipBatchSampler):
            sampler = sampler.batch_sampler
        size = getattr(sampler, "batch_size", None)
        if size is not None and isinstance(sampler, BatchSamplerShard) and sampler.split_batches:
            return size // sampler.num_processes
        return size

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


def steps_of_state(saved: dict[str, Any]) -> int:
    """Return how many batches a loader of torchdata had given."""
    if "_num_yielded" in saved:
        return saved["_num_yielded"]
    return saved["_snapshot"]["_snapshot_step"] + saved["_steps_since_snapshot"]


def _all_workers_have_begun(saved: dict[str, Any], workers: int) -> bool:
    """Tell whether torchdata's state of a pass is one of that pass in all worker processes.

    Of one that lasts from pass to pass and has given nothing yet, it keeps where the pass before ended.
    """
    return not workers or saved["_snapshot"]["_snapshot_step"] >= workers


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
