"""What the user asked for, as one frozen object that remembers where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.enums import PrecisionType, RNGType
from .options.accumulation import GradientAccumulationPlugin
from .options.compile import TorchDynamoPlugin
from .options.data import DataLoaderConfiguration
from .options.handlers import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from .options.project import ProjectConfiguration


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """The option objects a user passed in `kwargs_handlers`, at most one of each class."""

    autocast: AutocastKwargs | None = None
    ddp: DistributedDataParallelKwargs | None = None
    scaler: GradScalerKwargs | None = None
    init: InitProcessGroupKwargs | None = None
    profile: ProfileKwargs | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything `Accelerator(...)` and the environment said. Option objects stay the ones the user passed."""

    cpu: bool = False
    device_placement: bool = True
    mixed_precision: PrecisionType | None = None
    accumulation: GradientAccumulationPlugin = field(default_factory=lambda: GradientAccumulationPlugin(num_steps=1))
    data: DataLoaderConfiguration = field(default_factory=DataLoaderConfiguration)
    project: ProjectConfiguration = field(default_factory=ProjectConfiguration)
    compile: TorchDynamoPlugin = field(default_factory=TorchDynamoPlugin)
    handlers: Handlers = field(default_factory=Handlers)
    rng_types: tuple[RNGType, ...] = (RNGType.GENERATOR,)
    step_scheduler_with_optimizer: bool = True
    scheduler_units: Literal["samples", "optimizer_steps"] | None = None
    save_on_signals: tuple[str, ...] = ()
    """Names of signals on which the run saves itself and ends."""
    resume: str | None = None
    """What the launch asked to continue: `auto`, a folder, or nothing."""
    origin: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Setting -> who gave it, for error messages: `"from ACCELERATE_MIXED_PRECISION"`."""
