"""How gradients are accumulated."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from ...core.errors import SettingError, explain
from ..bag import KwargsHandler


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """Options of gradient accumulation."""

    num_steps: int | None = None
    """Number of batches whose gradients are summed for one optimizer step."""

    adjust_scheduler: bool = True
    """Kept for compatibility. Schedulers that `prepare` returns count optimizer steps with either value, so `False` gets
    a warning; to step them in every batch, pass `step_scheduler_with_optimizer=False` to `Accelerator`."""

    sync_with_dataloader: bool = True
    """End a window of accumulation with the last batch of a prepared loader."""

    sync_each_batch: bool = False
    """Reduce gradients over processes after every batch: more communication, less memory under sharding."""

    def __post_init__(self) -> None:
        given = self.num_steps
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise SettingError(
                explain(
                    f"GradientAccumulationPlugin(num_steps={self.num_steps!r}) is not a number of batches.",
                    accepted="an integer >= 1",
                    remedy="Pass num_steps=1 for no accumulation.",
                )
            )
        if not self.adjust_scheduler:
            warnings.warn(
                "GradientAccumulationPlugin(adjust_scheduler=False) changes nothing: prepared schedulers count optimizer "
                "steps with either value. To step them in every batch, pass step_scheduler_with_optimizer=False to "
                "Accelerator.",
                stacklevel=3,
            )
