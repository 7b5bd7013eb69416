"""Loaders without their first batches, for continuing in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..core.errors import SettingError, explain
from ..runtime.accumulation import GradientState
from .agreement import Agreement
from .dispatcher import DataLoaderDispatcher
from .loader import POSITION, DataLoaderAdapter, DataLoaderShard, steps_of_state
from .loop import DataLoaderStateMixin
from .prepare import is_stateful, loader_arguments
from .samplers import SkipBatchSampler
from .stateful import make_stateful_loader


class SkipDataLoader(DataLoaderAdapter, DataLoaderStateMixin):
    """A loader that reads its first batches and leaves them out, where a sampler cannot skip them.

    Args:
        dataset: What to load from.
        skip_batches: How many batches to leave out, in every pass.
        use_stateful_dataloader: Use torchdata's `StatefulDataLoader`.
        **kwargs: Further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in islice(iter(self.base_dataloader), self._left_out(), None):
            self.adjust_state_dict_for_prefetch()
            yield batch
        self.adjust_state_dict_for_prefetch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the next pass from a place that `state_dict` returned, by torchdata's state of it."""
        base: Any = self._require_stateful("load_state_dict")
        own = {name: value for name, value in state_dict.items() if name != POSITION}
        if own:  # nothing was read yet where there is none
            base.load_state_dict(own)
        self._resumes = bool(own) and steps_of_state(own) > 0

    def _left_out(self) -> int:
        # A place that was loaded lies behind the batches to skip already.
        resumes, self._resumes = self._resumes, False
        return 0 if resumes else self.skip_batches

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)


def skip_first_batches(dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
    """Make a loader like this one without its first batches. The given loader is left as it is.

    The new loader leaves them out in every pass, so go back to the given one for the next epoch. Where there is a
    sampler, skipped samples are not read.

    Args:
        dataloader: Any loader, prepared or not.
        num_batches: How many batches, as a loop over the loader sees them.

    Returns:
        A loader of the same kind; a `SkipDataLoader` for an iterable dataset that is not prepared.

    Raises:
        SettingError: (a `ValueError`) for a negative number.

    Example:
        >>> for batch in skip_first_batches(dataloader, num_batches=120):
        ...     ...
    """
    if num_batches < 0:
        raise SettingError(
            explain(
                f"num_batches={num_batches} is negative.",
                accepted="0 or more",
                remedy="Pass a count of batches.",
            )
        )
    arguments = loader_arguments(dataloader)
    if isinstance(dataloader, DataLoaderDispatcher):
        skipping: DataLoader[Any] = DataLoaderDispatcher(
            split_batches=dataloader.split_batches,
            skip_batches=dataloader.skip_batches + num_batches,
            slice_fn=dataloader.slice_fn,
            **_of_prepared(dataloader),
            **arguments,
        )
        skipping.device, skipping.rng_types = dataloader.device, dataloader.rng_types
    elif isinstance(dataloader, DataLoaderShard):
        skipping = DataLoaderShard(
            device=dataloader.device,
            rng_types=dataloader.rng_types,
            synchronized_generator=dataloader.synchronized_generator,
            skip_batches=dataloader.skip_batches + _left_to_reading(arguments, num_batches),
            **_of_prepared(dataloader),
            **arguments,
        )
    elif isinstance(dataloader, SkipDataLoader) or isinstance(dataloader.dataset, IterableDataset):
        skipping = SkipDataLoader(
            skip_batches=getattr(dataloader, "skip_batches", 0) + num_batches,
            use_stateful_dataloader=is_stateful(dataloader),
            **arguments,
        )
    else:
        _left_to_reading(arguments, num_batches)
        skipping = make_stateful_loader(**arguments) if is_stateful(dataloader) else DataLoader(**arguments)
    if isinstance(skipping, (DataLoaderShard, DataLoaderDispatcher)):
        _continue_for(skipping, dataloader)
    if hasattr(dataloader, "_is_accelerate_prepared"):
        skipping._is_accelerate_prepared = dataloader._is_accelerate_prepared  # pyright: ignore[reportAttributeAccessIssue]
    return skipping


def _continue_for(skipping: Any, dataloader: Any) -> None:
    """Let a loader count its passes and places as those of the loader it was made from."""
    skipping._mark = dataloader._mark
    skipping.replaces = dataloader._mark.pending
    skipping.global_batch, skipping.lacks_global_batch = dataloader.global_batch, dataloader.lacks_global_batch
    if isinstance(dataloader, DataLoaderShard):
        skipping.prefetches = dataloader.prefetches
        skipping.shard_index, skipping.shard_count = dataloader.shard_index, dataloader.shard_count
        if dataloader.agreement is not None:
            skipping.agreement = Agreement(drop_last=dataloader._drop_last)


def _of_prepared(dataloader: DataLoaderShard | DataLoaderDispatcher) -> dict[str, Any]:
    return {
        "use_stateful_dataloader": dataloader.use_stateful_dataloader,
        "_drop_last": dataloader._drop_last,
        "_non_blocking": dataloader._non_blocking,
        "torch_device_mesh": dataloader.torch_device_mesh,
        "iteration": dataloader.iteration,
    }


def _left_to_reading(arguments: dict[str, Any], num_batches: int) -> int:
    """Let the sampler skip, if there is one; return how many batches it cannot skip."""
    for key in ("batch_sampler", "sampler"):
        if key in arguments:
            arguments[key] = SkipBatchSampler(arguments[key], skip_batches=num_batches)
            return 0
    return num_batches
