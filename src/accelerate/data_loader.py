"""Face of `accelerate.data_loader`. The code lives in `accelerate.data`."""

from .core.available import (
    is_datasets_available,
    is_torchdata_stateful_dataloader_available,
)
from .core.enums import DistributedType, RNGType
from .data.dispatcher import DataLoaderDispatcher
from .data.iterables import IterableDatasetShard
from .data.loader import DataLoaderAdapter, DataLoaderShard, DataLoaderStateMixin
from .data.prepare import get_sampler, prepare_data_loader
from .data.resume import SkipDataLoader, skip_first_batches
from .data.samplers import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from .runtime.accumulation import GradientState
from .runtime.log import get_logger
from .runtime.ops import (
    broadcast,
    broadcast_object_list,
    concatenate,
    find_batch_size,
    send_to_device,
    slice_tensors,
)
from .runtime.partial_state import PartialState
from .runtime.rng import synchronize_rng_states

__all__ = [
    "BatchSamplerShard",
    "DataLoaderAdapter",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "DistributedType",
    "GradientState",
    "IterableDatasetShard",
    "PartialState",
    "RNGType",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "find_batch_size",
    "get_logger",
    "get_sampler",
    "is_datasets_available",
    "is_torchdata_stateful_dataloader_available",
    "prepare_data_loader",
    "send_to_device",
    "skip_first_batches",
    "slice_tensors",
    "synchronize_rng_states",
]
