"""The learning-rate scheduler that `prepare` returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..runtime import state
from ..runtime.accumulation import GradientState
from .samples import filled_shards
from .schedule import Pass, end_of, fits_taken_steps, length_of, steps_taken
from .window import units_of_step

Units = Literal["samples", "optimizer_steps"]


class AcceleratedScheduler:
    """Steps a scheduler when the optimizer really stepped, as often as a single process would have.

    A scheduler written for one process counts that process's batches. With several, one step consumes as many
    batches as there are data shards, so it is stepped that many times; not if batches are split, since the total batch
    is then the given one.

    Args:
        scheduler: The scheduler to step.
        optimizers: The prepared optimizer or optimizers it belongs to. Of a list the first step takes the one that the
            scheduler was made for, if it is there by then, and otherwise all.
        step_with_optimizer: `False` steps the scheduler once at each call, whatever the optimizer did.
        split_batches: Whether each batch of the loader was split over the processes.
        shards: How many ranks read different data; `None` means all.
        units: `"optimizer_steps"` steps once for each step of the optimizer. `"samples"` steps as often as a single
            process would have over the same samples, also where the last batches do not fill all shards; once at a call
            after the loop, where schedules count epochs. `None` steps once for each data shard. With a metric, or any
            other argument, a call is one step with all of them.
        one_pass: How many steps a pass over the data has, to tell a schedule that was made for other steps.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        *,
        shards: int | None = None,
        units: Units | None = None,
        one_pass: Pass | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: Sequence[Any] = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
        self.split_batches = split_batches
        self.step_with_optimizer = step_with_optimizer
        self.gradient_state = GradientState()
        process = state.current_or_single().process
        shards = process.world_size if shards is None else shards
        self._repeats = 1 if split_batches or units == "optimizer_steps" else shards
        self._counts_samples = units == "samples" and self._repeats > 1
        self._is_bounded = end_of(scheduler, raises=True) is not None
        self._may_skip: bool | None = None
        """Whether optimizers may skip steps; `None` before the first step, when it is known which ones they are."""
        self._watched: int | None = None
        """Where the schedule ends, as long as running past it would be worth a warning."""
        self._past = 0
        self._one_pass = one_pass
        self._warns = units is None and self._repeats > 1 and step_with_optimizer and process.rank == 0
        if self._warns:
            self._check_length()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, unless this batch only accumulates or the optimizer skipped its step."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            return
        if self._may_skip is None:
            self._may_skip = self._find_optimizers()
        if self._may_skip and any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(1 if self._repeats == 1 or args or kwargs else self._count()):
            # Rounding up to whole global steps may pass the end of a schedule that has one, where torch raises.
            if self._is_bounded and self._is_over():
                return
            self.scheduler.step(*args, **kwargs)

    def _find_optimizers(self) -> bool:
        """Keep the optimizer that the scheduler was made for; return whether it may skip steps."""
        self.optimizers = own_optimizer(self.scheduler, self.optimizers) or self.optimizers
        return any(getattr(optimizer, "scaler", None) is not None for optimizer in self.optimizers)

    def _is_over(self) -> bool:
        # Asked each time: loading a checkpoint may bring another end.
        end, taken = end_of(self.scheduler, raises=True), steps_taken(self.scheduler)
        return end is not None and taken is not None and taken >= end

    def _count(self) -> int:
        """Return how many steps of the scheduler this call stands for."""
        is_after_loop = not self.gradient_state.is_in_loop and any(
            getattr(optimizer, "stepped_in_loop", False) for optimizer in self.optimizers
        )
        if self._counts_samples:
            return 1 if is_after_loop else self._samples_in_steps()
        if self._warns and is_after_loop:
            self._warn_of_epochs()
        if self._watched is not None:
            self._check_end(self._watched)
        return self._repeats

    def _samples_in_steps(self) -> int:
        known = self.gradient_state
        number, num_steps = known.window or (known.num_steps, known.num_steps)
        return units_of_step(self._repeats, filled_shards(known.active_dataloader, self._repeats), number, num_steps)

    def _check_length(self) -> None:
        """Warn of a schedule that was made for the steps this run takes, and watch any other one with an end."""
        length, one_pass = length_of(self.scheduler), self._one_pass
        if length is None or one_pass is None or not fits_taken_steps(length, one_pass):
            self._watched = end_of(self.scheduler)
            return
        warnings.warn(
            f"{self._name} has {length} steps: {length // one_pass.taken} passes of the {one_pass.taken} optimizer steps "
            f"that this run takes over its loader, and no whole number of passes of the {one_pass.alone} that a single "
            f"process would take. A prepared schedule counts the latter: it is stepped {self._repeats} times at each "
            f"optimizer step, so this one is over after {-(-length // self._repeats)} of them. {_REMEDY}",
            stacklevel=2,
        )

    def _warn_of_epochs(self) -> None:
        """Warn, once, of a schedule that is stepped between passes, where a step of it is an epoch."""
        self._warns, self._watched = False, None
        warnings.warn(
            f"{self._name} is stepped after the loop over a loader: by {self._repeats} steps at each call, where a single "
            "process takes 1. If it counts epochs it runs too fast: pass Accelerator(scheduler_units='samples'), with "
            "which a call after the loop is one step. If it is right as it is, step it in the loop.",
            stacklevel=4,
        )

    def _check_end(self, end: int) -> None:
        """Warn, once, when steps go on after the end of the schedule by more than rounding explains."""
        taken = steps_taken(self.scheduler)
        if taken is None or taken < end:
            return
        one_pass = self._one_pass
        rounding = one_pass.taken * self._repeats / one_pass.alone - 1 if one_pass is not None else 0.25
        if self._past > rounding * end + self._repeats:
            self._watched = None
            warnings.warn(
                f"{self._name} has {end} steps and was over after {-(-end // self._repeats)} optimizer steps, and training "
                f"goes on: a prepared schedule is stepped {self._repeats} times at each optimizer step, as often as a "
                f"single process would have. {_REMEDY}",
                stacklevel=4,
            )
        self._past += self._repeats

    @property
    def _name(self) -> str:
        return f"The schedule {type(self.scheduler).__name__}"

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


def own_optimizer(scheduler: Any, optimizers: Iterable[Any]) -> list[Any]:
    """Return the one of these optimizers that a scheduler was made for, in a list; an empty one if it is not there."""
    wanted = getattr(scheduler, "optimizer", None)
    return [item for item in optimizers if wanted is item or wanted is getattr(item, "optimizer", item)][:1]


_REMEDY = (
    "If it was made for optimizer steps, pass Accelerator(scheduler_units='optimizer_steps'); if it is right as it is, "
    "'samples'."
)
