"""The learning-rate scheduler that `prepare` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime import state
from ..runtime.accumulation import GradientState


class AcceleratedScheduler:
    """Steps a scheduler when the optimizer really stepped, as often as a single process would have.

    A scheduler written for one process counts that process's batches. With several, one step consumes as many
    batches as there are processes, so it is stepped that many times; not if batches are split, since the total batch
    is then the given one.

    Args:
        scheduler: The scheduler to step.
        optimizers: The prepared optimizer or optimizers it belongs to.
        step_with_optimizer: `False` steps the scheduler once at each call, whatever the optimizer did.
        split_batches: Whether each batch of the loader was split over the processes.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: Sequence[Any] = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
        self.split_batches = split_batches
        self.step_with_optimizer = step_with_optimizer
        self.gradient_state = GradientState()
        self._repeats = 1 if split_batches else state.current_or_single().process.world_size
        self._is_bounded = hasattr(scheduler, "total_steps")
        self._may_skip = any(getattr(optimizer, "scaler", None) is not None for optimizer in self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, unless this batch only accumulates or the optimizer skipped its step."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            return
        if self._may_skip and any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(self._repeats):
            # Rounding up to whole global steps may pass the end of a schedule that has one, where torch raises.
            if self._is_bounded and self.scheduler._step_count > self.scheduler.total_steps:
                return
            self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[Any]:
        """Return the last rates, one for each group."""
        return self.scheduler.get_last_lr()

    def get_lr(self) -> list[Any]:
        """Return the rates the scheduler computes now."""
        return self.scheduler.get_lr()

    def print_lr(self, *args: Any, **kwargs: Any) -> None:
        """Print the rates, for schedulers that do."""
        return self.scheduler.print_lr(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner scheduler's state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the inner scheduler."""
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)
