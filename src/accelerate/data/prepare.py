"""From a loader to a sharded loader.

Owns the choice between reading on every rank and on rank 0, and what random generators ranks share. Called by
`parallel` and by users; never iterates anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
)

from ..core.enums import RNGType
from ..core.errors import SettingError, UnsupportedCombination, explain
from ..runtime import state
from ..runtime.rng import check_rng_type
from .agreement import Agreement
from .dispatcher import DataLoaderDispatcher
from .global_batch import GlobalBatch, plan_global_batch
from .iterables import IterableDatasetShard
from .loader import (
    DataLoaderAdapter,
    DataLoaderShard,
    index_sampler,
    innermost_sampler,
    replace_innermost_sampler,
)
from .samplers import BatchSamplerShard, SeedableRandomSampler
from .shards import ShardPlan, mesh_data_shard
from .sources import Source, SourceKind, plan_source
from .stateful import make_stateful_loader, stateful_class


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | str | int | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Sequence[str | RNGType] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
    global_batch_size: int | None = None,
    prefetch: bool = False,
) -> DataLoader[Any]:
    """Make a loader give this process its share of the data.

    Args:
        dataloader: The loader to share out. One that is prepared already is returned as it is. Of torchdata's
            `StatefulDataLoader` another one is made, as with `use_stateful_dataloader`.
        device: Where batches go, with `put_on_device`.
        num_processes: Among how many processes; by default all.
        process_index: For which one; by default this one.
        split_batches: The loader's batch size is that of all processes together, in place of each one.
        put_on_device: Move batches to `device`.
        rng_types: Which random generators to make equal on all processes at the start of each pass.
        dispatch_batches: Read on rank 0 and send each process its slice; by default for iterable datasets whose
            batches are moved to the device.
        even_batches: Give all processes the same number of batches of the same size, topped up from the beginning.
            Dispatched and sharded iterable datasets always do.
        slice_fn_for_dispatch: Cuts a batch where `dispatch_batches` is on, called as
            `slice_fn(batch, slice, process_index=i, num_processes=n)`.
        use_seedable_sampler: Where the loader shuffles, make the order depend on a seed and the epoch only.
        data_seed: That seed; by default torch's initial seed.
        non_blocking: Do not wait for copies from pinned memory to the device.
        use_stateful_dataloader: Use torchdata's loader, which can save its place within a pass.
        torch_device_mesh: A mesh; processes that differ along its axes tp, cp, sp or pp only read the same data.
            It takes the place of `num_processes` and `process_index`.
        global_batch_size: Samples of all processes in one optimizer step; no batch is larger than the loader's own.
        prefetch: Copy each batch to the device while the one before is computed on.

    Returns:
        A `DataLoaderShard`, or with dispatching a `DataLoaderDispatcher`.

    Raises:
        SettingError: (a `ValueError`) if the batch size cannot be split, arguments contradict each other, or the
            loader shares out or skips samples itself.
        MissingPackage: (an `ImportError`) if torchdata is needed and absent.
    """
    if isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher)):
        _check_prepared(dataloader, global_batch_size)
        return dataloader
    index, count = _data_shard(num_processes, process_index, torch_device_mesh)
    source, is_one_order = _source(dataloader.dataset, index, count, whole=bool(global_batch_size or dispatch_batches))
    dispatch = _chooses_dispatch(dataloader, dispatch_batches, put_on_device, source)
    _check_order(dataloader, dispatch or is_one_order)
    _check_loader(dataloader, count)
    _check_uneven(dataloader, dispatch, dispatch_batches, even_batches or count == 1)
    dataloader, batches, lacks = _in_global_batches(dataloader, source, global_batch_size, count)
    if use_seedable_sampler:
        _make_seedable(dataloader, data_seed)
    common = _common_arguments(dataloader, use_stateful_dataloader, non_blocking, torch_device_mesh)
    if dispatch:
        arguments = _dispatched_arguments(dataloader, source, rng_types, count, split_batches, batches)
        dispatcher = DataLoaderDispatcher(slice_fn=slice_fn_for_dispatch, **common, **arguments)
        dispatcher.device, dispatcher.rng_types = device, _without_generator(rng_types)  # only rank 0 draws an order
        dispatcher.global_batch, dispatcher.lacks_global_batch = batches, lacks
        return dispatcher
    generator, rng_types = _shared_generator(dataloader, rng_types, count, always=batches is not None)
    common["device"] = device if put_on_device else None
    arguments = _sharded_arguments(dataloader, index, count, split_batches, even_batches, batches, source)
    prepared = DataLoaderShard(rng_types=rng_types, synchronized_generator=generator, **common, **arguments)
    prepared.global_batch, prepared.lacks_global_batch, prepared.prefetches = batches, lacks, prefetch and put_on_device
    if source.ragged and count > 1:
        _let_agree(prepared, index, count, dataloader.drop_last)
    return prepared


def _let_agree(prepared: DataLoaderShard, index: int, count: int, drop_last: bool) -> None:
    """Let ranks find out together that they are done."""
    prepared.agreement = Agreement(drop_last=drop_last)
    prepared.shard_index, prepared.shard_count = index, count


def _chooses_dispatch(
    dataloader: DataLoader[Any], dispatch_batches: bool | None, put_on_device: bool, source: Source
) -> bool:
    if dispatch_batches is None:
        return put_on_device and isinstance(dataloader.dataset, IterableDataset) and not source.ragged
    if dispatch_batches and source.kind is SourceKind.ALREADY:
        raise UnsupportedCombination(
            explain(
                f"dispatch_batches=True reads on rank 0 for all, and {type(dataloader.dataset).__name__} gives each rank "
                f"samples of its own ({source.reason}): those of the others would be lost.",
                accepted="dispatch_batches=None or False",
                remedy="Leave dispatch_batches out, or give the DataLoader a dataset that is not split.",
            )
        )
    if dispatch_batches and not put_on_device:
        raise UnsupportedCombination(
            explain(
                "dispatch_batches=True needs put_on_device=True, which is False: slices are sent from device to device.",
                accepted="dispatch_batches=True with put_on_device=True, or dispatch_batches=False",
                remedy="Pass device_placement=True to Accelerator or prepare, or dispatch_batches=False.",
            )
        )
    return dispatch_batches


def _check_prepared(dataloader: Any, global_batch_size: int | None) -> None:
    kept = None if dataloader.global_batch is None else dataloader.global_batch.size
    if global_batch_size not in (None, kept):
        raise SettingError(
            explain(
                f"global_batch_size={global_batch_size} (from DataLoaderConfiguration) cannot be kept by this "
                f"{type(dataloader).__name__}, which prepare_data_loader has made with global_batch_size={kept}.",
                accepted="a loader that is not prepared, or one with the same global_batch_size",
                remedy="Pass the loader as you made it to accelerator.prepare().",
            )
        )


def _source(dataset: Any, index: int, count: int, *, whole: bool) -> tuple[Source, bool]:
    """Return what to read from, and whether all ranks read it in one order. Collective if it is shuffled by itself."""
    source = plan_source(dataset, index, count, whole=whole)
    if count == 1 or not source.order:
        return source, True
    if len(set(state.current_or_single().collectives.all_gather_object(source.order))) == 1:
        return source, True
    return plan_source(dataset, index, count, whole=True), False


def _check_order(dataloader: DataLoader[Any], is_one: bool) -> None:
    """Refuse what every rank would read in an order of its own, to take its rows of it."""
    if not is_one:
        raise SettingError(
            explain(
                f"{type(dataloader.dataset).__name__} (of the loader) is shuffled by other seeds on each process, and each "
                "would take its share of another order: samples would be lost, and others come twice.",
                accepted="datasets that are shuffled with the same seed on all processes, or that are dispatched",
                remedy="Pass a seed to shuffle(), or leave dispatch_batches=False out.",
            )
        )


def _check_source(dataloader: DataLoader[Any], source: Source, size: int, count: int) -> None:
    """Refuse data of which each rank has its own where all ranks together take a fixed number of samples."""
    # Torch looks for a filter in the dataset itself, to share it out over workers.
    if source.kind is SourceKind.ALREADY and (count > 1 or isinstance(dataloader.dataset, IterDataPipe)):
        raise UnsupportedCombination(
            explain(
                f"global_batch_size={size} (from DataLoaderConfiguration) needs the same samples in each step on any number "
                f"of processes, and {type(dataloader.dataset).__name__} gives each its own ({source.reason}).",
                accepted="datasets that give all samples on every process",
                remedy="Leave the splitting to prepare, or leave global_batch_size out and choose "
                "gradient_accumulation_steps.",
            )
        )


def _check_loader(dataloader: DataLoader[Any], count: int) -> None:
    """Refuse a loader that shares out or skips samples itself; warn about what preparing would lose."""
    sampler = get_sampler(dataloader)
    if count > 1 and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise SettingError(
            explain(
                f"The loader has a {type(sampler).__name__} with num_replicas={sampler.num_replicas}, which shares samples "
                f"out already, and prepare would share each share out again over {count} processes.",
                accepted="samplers that give the same samples on all processes",
                remedy="Leave the sampler out and pass shuffle=True or False to the DataLoader.",
            )
        )
    skipped = dataloader.skip_batches if isinstance(dataloader, DataLoaderAdapter) else 0
    if count > 1 and skipped:
        raise SettingError(
            explain(
                f"The loader is one that skip_first_batches({skipped}) returned, and skipping batches before they are "
                f"shared out over {count} processes is not possible where they must be read.",
                accepted="skip_first_batches of a prepared loader",
                remedy="Prepare first, then skip: skip_first_batches(accelerator.prepare(loader), n).",
            )
        )
    stateful = stateful_class()
    known = (DataLoader.__iter__, *(() if stateful is None else (stateful.__iter__,)))
    if not isinstance(dataloader, DataLoaderAdapter) and type(dataloader).__iter__ not in known:
        warnings.warn(
            f"{type(dataloader).__name__} has an __iter__ of its own, which is not called once the loader is prepared: "
            "prepare makes another loader with the same arguments. Move what it does to collate_fn or the dataset, or "
            "do not prepare it.",
            stacklevel=3,
        )


def _check_uneven(dataloader: DataLoader[Any], dispatch: bool, dispatch_batches: bool | None, even: bool) -> None:
    """Tell that `even_batches=False` cannot be had, if that is so."""
    if even or dataloader.drop_last or getattr(dataloader.batch_sampler, "drop_last", False):
        return  # as asked, or nothing is topped up
    if dispatch and dispatch_batches:
        raise SettingError(
            explain(
                "even_batches=False contradicts dispatch_batches=True: dispatched batches are always cut evenly, and "
                "the last ones topped up from the beginning.",
                accepted="even_batches=True, or loaders with drop_last=True, which top nothing up",
                remedy="Pass dispatch_batches=False, or even_batches=True.",
            )
        )
    if isinstance(dataloader.dataset, IterableDataset):
        warnings.warn(
            f"even_batches=False has no effect on {type(dataloader.dataset).__name__}: batches of iterable datasets are "
            "always topped up, unless drop_last=True leaves incomplete ones out.",
            stacklevel=3,
        )


def is_stateful(dataloader: DataLoader[Any]) -> bool:
    """Tell whether a loader, prepared or not, is torchdata's `StatefulDataLoader` or stands in front of one."""
    if isinstance(dataloader, DataLoaderAdapter):
        return dataloader.use_stateful_dataloader
    stateful = stateful_class()
    return stateful is not None and isinstance(dataloader, stateful)


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """Return the sampler at the bottom of a loader, under everything that batches and shards."""
    return innermost_sampler(index_sampler(dataloader))


_COPIED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "generator",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def loader_arguments(dataloader: DataLoader[Any]) -> dict[str, Any]:
    """Return the arguments that make a loader like this one, over the same dataset and samplers."""
    arguments = {
        "dataset": dataloader.dataset,
        **{name: getattr(dataloader, name) for name in _COPIED},
    }
    if dataloader.num_workers > 0:
        arguments["prefetch_factor"] = dataloader.prefetch_factor
        arguments["multiprocessing_context"] = dataloader.multiprocessing_context
    if is_stateful(dataloader):
        arguments["snapshot_every_n_steps"] = getattr(dataloader, "snapshot_every_n_steps")  # noqa: B009 - torchdata's
    if isinstance(dataloader.dataset, IterableDataset):
        arguments.update(batch_size=dataloader.batch_size, drop_last=dataloader.drop_last)
    elif dataloader.batch_sampler is not None:
        arguments["batch_sampler"] = dataloader.batch_sampler
    else:
        arguments.update(batch_size=None, sampler=dataloader.sampler)
    return arguments


def _sharded_arguments(
    dataloader: DataLoader[Any],
    index: int,
    count: int,
    split_batches: bool,
    even_batches: bool,
    batches: GlobalBatch | None,
    source: Source,
) -> dict[str, Any]:
    arguments = {**loader_arguments(dataloader), "dataset": source.dataset}
    if count == 1 and batches is None:
        return arguments
    if isinstance(dataloader.dataset, IterableDataset):
        size = dataloader.batch_size
        if source.ragged and batches is None:
            if split_batches:
                arguments["batch_size"] = ShardPlan(count=count, batch_size=size, split=True).check().rows
            return arguments
        arguments["dataset"] = IterableDatasetShard(
            source.dataset,
            # Where the dataset makes its batches itself, each of its items is one.
            batch_size=1 if size is None else size,
            drop_last=dataloader.drop_last,
            num_processes=count,
            process_index=index,
            split_batches=split_batches,
        )
        if batches is not None:
            arguments["dataset"].spread, arguments["dataset"].multiple = True, batches.size
        if split_batches and size is not None:
            arguments["batch_size"] = size // count
        return arguments
    key = "sampler" if dataloader.batch_sampler is None else "batch_sampler"
    arguments[key] = BatchSamplerShard(
        arguments[key],
        num_processes=count,
        process_index=index,
        split_batches=split_batches,
        even_batches=even_batches,
    )
    if batches is not None:
        arguments[key].spread, arguments[key].multiple = True, batches.size
    return arguments


def _common_arguments(dataloader: DataLoader[Any], stateful: bool, non_blocking: bool, mesh: Any) -> dict[str, Any]:
    return {
        "skip_batches": dataloader.skip_batches if isinstance(dataloader, DataLoaderAdapter) else 0,
        "use_stateful_dataloader": stateful or is_stateful(dataloader),
        "_drop_last": dataloader.drop_last or getattr(dataloader.batch_sampler, "drop_last", False),
        "_non_blocking": non_blocking,
        "torch_device_mesh": mesh,
    }


def _dispatched_arguments(
    dataloader: DataLoader[Any],
    source: Source,
    rng_types: Sequence[str | RNGType] | None,
    count: int,
    split_batches: bool,
    batches: GlobalBatch | None,
) -> dict[str, Any]:
    if split_batches:
        ShardPlan(count=count, batch_size=_batch_size(dataloader), split=True).check()
    arguments = {"split_batches": split_batches, **loader_arguments(dataloader), "dataset": source.dataset}
    if batches is not None:
        # Its order is the one that ranks would share, and it leaves out what they would.
        _shared_generator(dataloader, rng_types, 1, always=True)
        if "batch_sampler" in arguments:
            arguments["batch_sampler"] = whole = BatchSamplerShard(arguments["batch_sampler"])
            whole.spread, whole.multiple = True, batches.size
        elif dataloader.drop_last:
            arguments["dataset"] = IterableDatasetShard(arguments["dataset"], batches.batch_size, drop_last=True)
            arguments["dataset"].multiple = batches.size
    return arguments


def _in_global_batches(
    dataloader: DataLoader[Any], source: Source, size: int | None, count: int
) -> tuple[DataLoader[Any], GlobalBatch | None, int | None]:
    """Return a loader with batches that make up global ones of `size` samples, how, and the size if it cannot."""
    if size is None:
        return dataloader, None, None
    given = _resizable(dataloader)
    if given is None:
        warnings.warn(
            f"global_batch_size={size} (from DataLoaderConfiguration) cannot be kept by a loader whose batches have no "
            "size that could be changed: this one stays as it is, and is for evaluation only. For training, make the "
            "DataLoader with batch_size and a sampler in place of a batch sampler.",
            stacklevel=3,
        )
        return dataloader, None, size
    _check_source(dataloader, source, size, count)
    batches = plan_global_batch(size, given, count)
    return _resized(dataloader, batches.batch_size), batches, None


def _resizable(dataloader: DataLoader[Any]) -> int | None:
    """Return the batch size of a loader that can be given another one."""
    iterable = isinstance(dataloader.dataset, IterableDataset)
    return dataloader.batch_size if iterable or type(dataloader.batch_sampler) is BatchSampler else None


def _resized(dataloader: DataLoader[Any], batch_size: int) -> DataLoader[Any]:
    if batch_size == dataloader.batch_size:
        return dataloader
    arguments = loader_arguments(dataloader)
    if "batch_sampler" in arguments:
        arguments.pop("batch_sampler")
        arguments.update(sampler=dataloader.sampler, drop_last=dataloader.drop_last)
    arguments["batch_size"] = batch_size
    return make_stateful_loader(**arguments) if is_stateful(dataloader) else DataLoader(**arguments)


def _batch_size(dataloader: DataLoader[Any]) -> int | None:
    if dataloader.batch_size is not None:
        return dataloader.batch_size
    return getattr(index_sampler(dataloader), "batch_size", None)


def _data_shard(num_processes: int | None, process_index: int | None, mesh: Any) -> tuple[int, int]:
    if mesh is not None and mesh.mesh_dim_names:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise SettingError(
                explain(
                    "This process is not part of torch_device_mesh.",
                    accepted="meshes that contain every process that loads data",
                    remedy="Build the mesh over all ranks, or prepare the loader on its members only.",
                )
            )
        return mesh_data_shard(mesh.mesh_dim_names, tuple(mesh.mesh.shape), coordinate)
    process = state.current_or_single().process
    index = process.rank if process_index is None else process_index
    count = process.world_size if num_processes is None else num_processes
    ShardPlan(index=index, count=count).check()
    return index, count


def _make_seedable(dataloader: DataLoader[Any], data_seed: int | None) -> None:
    sampler = get_sampler(dataloader)
    if type(sampler) is not RandomSampler:
        if not isinstance(dataloader.dataset, IterableDataset) and not isinstance(
            sampler, (SequentialSampler, SeedableRandomSampler)
        ):
            warnings.warn(
                f"use_seedable_sampler=True has no effect on {type(sampler).__name__}: only torch's own RandomSampler "
                "(shuffle=True) is replaced. Seed this sampler yourself where its order must not depend on what else "
                "draws random numbers.",
                stacklevel=3,
            )
        return
    seedable = SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )
    replace_innermost_sampler(dataloader, seedable)


def _without_generator(rng_types: Sequence[str | RNGType] | None) -> list[str | RNGType] | None:
    if rng_types is None:
        return None
    return [kind for kind in rng_types if check_rng_type(kind) is not RNGType.GENERATOR]


def _shared_generator(
    dataloader: DataLoader[Any], rng_types: Sequence[str | RNGType] | None, count: int, *, always: bool
) -> tuple[torch.Generator | None, Sequence[str | RNGType] | None]:
    """Return the generator that decides the order of samples, and the types of generators to synchronise.

    A sampler without a generator gets one, seeded from torch's global one, so that what else a rank draws from
    that does not change its order. It stays without one when ranks are asked to share the global one itself, and,
    unless `always`, where there is one process, which then draws what a loop without this library draws.
    """
    if count == 1 and not always:
        return None, _without_generator(rng_types)
    kinds = [check_rng_type(kind) for kind in rng_types or ()]
    source: Any = dataloader.dataset if isinstance(dataloader.dataset, IterableDataset) else get_sampler(dataloader)
    generator = getattr(source, "generator", None)
    if (
        generator is None
        and source is not dataloader.dataset
        and hasattr(source, "generator")
        and (RNGType.TORCH not in kinds or RNGType.GENERATOR in kinds)
    ):
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        source.generator = generator
    if count == 1 or not isinstance(generator, torch.Generator):
        return None, None if rng_types is None else [kind for kind in kinds if kind is not RNGType.GENERATOR]
    return generator, rng_types
