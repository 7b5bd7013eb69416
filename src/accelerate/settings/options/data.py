"""How loaders are sharded over processes."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import SettingError, explain


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

    global_batch_size: int | None = None
    """Samples of all processes together in one optimizer step, whatever their number. The loader's batch size then
    is the most that one process takes at once: `prepare` chooses the largest batch within it that divides the
    share of a process, and accumulates as many. Dispatched loaders do the same. Refused together with
    `gradient_accumulation_steps` and `split_batches`, which say the same in other ways, and for a batch sampler of
    one's own, whose batches cannot be resized. `None` means that the total follows from the loader's batch size."""

    prefetch: bool = True
    """Copy each batch to the device while the one before is computed on, through pinned memory and on a stream of its
    own. One more batch then is in the device's memory, or a few while the host runs ahead of the device. Happens on
    CUDA devices; changes nothing elsewhere, and for batches that only know how to move themselves."""

    def __post_init__(self) -> None:
        given = self.global_batch_size
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise SettingError(
                explain(
                    f"DataLoaderConfiguration(global_batch_size={given!r}) is not a number of samples.",
                    accepted="an integer >= 1, or None",
                    remedy="Pass the number of samples that all processes together take for one optimizer step.",
                )
            )
