"""How loaders are sharded over processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataLoaderConfiguration:
    """Options of the loaders that `prepare` returns."""

    split_batches: bool = False
    """Cut each batch of the given loader over the processes, so that its batch size is the total one. Otherwise
    each process reads whole batches, and the total batch size is the loader's times the number of processes."""

    dispatch_batches: bool | None = None
    """Read on the main process only and send each other process its slice. `None` means: for iterable datasets."""

    even_batches: bool = True
    """Give all processes the same number of samples, topping up the end with samples from the beginning."""

    use_seedable_sampler: bool = False
    """Shuffle with a sampler whose order depends on a seed and the epoch only."""

    data_seed: int | None = None
    """The seed of that sampler. `None` means torch's seed at `prepare`."""

    non_blocking: bool = False
    """Move batches to the device without waiting, which needs `pin_memory=True` in the given loader."""

    use_stateful_dataloader: bool = False
    """Build on torchdata's `StatefulDataLoader`. Needs torchdata >= 0.8."""
