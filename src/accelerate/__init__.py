"""The same PyTorch training loop on one CPU, one GPU, eight GPUs or a cluster, by adding four lines.

The folders beside this file are the architecture, lowest first: `core`, `settings` and `hardware`, `topology`,
`collectives`, `runtime`, then `data`, `precision`, `stepping`, `checkpoint` and `launch`, then `parallel`, `session`
and `commands`. The files beside it are faces: historical import paths that hold only imports; except
`accelerator.py`, the façade.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core import last_words
from .core.lazy import lazy_names
from .core.versions import __version__
from .settings import env

_HOMES = {
    "Accelerator": "accelerator",
    "AutocastKwargs": "settings.options.handlers",
    "DDPCommunicationHookType": "core.enums",
    "DataLoaderConfiguration": "settings.options.data",
    "DeepSpeedPlugin": "settings.options.absent",
    "DistributedDataParallelKwargs": "settings.options.handlers",
    "DistributedType": "core.enums",
    "FullyShardedDataParallelPlugin": "settings.options.absent",
    "GradScalerKwargs": "settings.options.handlers",
    "InitProcessGroupKwargs": "settings.options.handlers",
    "ParallelismConfig": "settings.options.absent",
    "PartialState": "runtime.partial_state",
    "ProfileKwargs": "settings.options.handlers",
    "debug_launcher": "launch.functions",
    "find_executable_batch_size": "runtime.memory",
    "is_rich_available": "core.available",
    "load_checkpoint_in_model": "session.in_model",
    "notebook_launcher": "launch.functions",
    "skip_first_batches": "data.resume",
    "synchronize_rng_states": "runtime.rng",
}

_MODULES = (
    "accelerator",
    "big_modeling",
    "checkpointing",
    "data_loader",
    "launchers",
    "logging",
    "memory_utils",
    "optimizer",
    "scheduler",
    "state",
    "utils",
)

if TYPE_CHECKING:
    from .accelerator import Accelerator as Accelerator
    from .core.available import is_rich_available as is_rich_available
    from .core.enums import DDPCommunicationHookType as DDPCommunicationHookType
    from .core.enums import DistributedType as DistributedType
    from .data.resume import skip_first_batches as skip_first_batches
    from .launch.functions import debug_launcher as debug_launcher
    from .launch.functions import notebook_launcher as notebook_launcher
    from .runtime.memory import find_executable_batch_size as find_executable_batch_size
    from .runtime.partial_state import PartialState as PartialState
    from .runtime.rng import synchronize_rng_states as synchronize_rng_states
    from .session.in_model import load_checkpoint_in_model as load_checkpoint_in_model
    from .settings.options.absent import DeepSpeedPlugin as DeepSpeedPlugin
    from .settings.options.absent import (
        FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin,
    )
    from .settings.options.absent import ParallelismConfig as ParallelismConfig
    from .settings.options.data import (
        DataLoaderConfiguration as DataLoaderConfiguration,
    )
    from .settings.options.handlers import AutocastKwargs as AutocastKwargs
    from .settings.options.handlers import (
        DistributedDataParallelKwargs as DistributedDataParallelKwargs,
    )
    from .settings.options.handlers import GradScalerKwargs as GradScalerKwargs
    from .settings.options.handlers import (
        InitProcessGroupKwargs as InitProcessGroupKwargs,
    )
    from .settings.options.handlers import ProfileKwargs as ProfileKwargs

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals(), _MODULES)

last_words.begin(env.read())  # an exception may end the script before it has made an Accelerator
del last_words, env
