"""The optimizer that `prepare` returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..core.tree import tree_map
from ..runtime import preemption
from ..runtime.accumulation import GradientState
from ..runtime.partial_state import PartialState
from .scaling import LossScaling


def move_to_device(data: Any, device: torch.device) -> Any:
    """Return nested data with its tensors on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, data)


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Steps an optimizer when gradients are synchronised, in the run's precision.

    Everything else is the given optimizer's: its state, groups and defaults are the same objects.

    Args:
        optimizer: The optimizer to step.
        device_placement: Move its state to the run's device.
        scaler: A loss scaler to step with, for use without an `Accelerator`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device_placement: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        # No super().__init__: the groups, state and hooks are the inner optimizer's.
        self.optimizer = optimizer
        self.scaler = scaler
        self.gradient_state = GradientState()
        self.device_placement = device_placement
        self._skipped: bool | Callable[[], bool] = False
        self.stepped_in_loop = False
        """Whether the last step was taken in a loop over a prepared loader."""
        self.before_first_step: Callable[[], None] | None = None
        """Called once, when the first step through this wrapper begins."""
        self._scaling = None if scaler is None else LossScaling.of(scaler)
        if self._scaling is not None:
            self._scaling.add(optimizer)
        if device_placement and optimizer.state:
            # Torch moves each state to its parameter, and leaves on the CPU what belongs there (step counters).
            optimizer.load_state_dict(optimizer.state_dict())

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def accelerator_state(self) -> PartialState:
        """Who this process is."""
        return PartialState()

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.state = state

    @property
    def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> Any:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the inner optimizer, on the run's device."""
        self.optimizer.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state."""
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clear gradients, unless this batch only accumulates."""
        if not self.gradient_state.sync_gradients:
            return
        if self._scaling is not None:
            self._scaling.forget(self.optimizer)
        if set_to_none is None:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=set_to_none)

    def train(self) -> Any:
        """Switch to training, for optimizers that tell it from evaluation."""
        switch = getattr(self.optimizer, "train", None)
        return switch() if callable(switch) else None

    def eval(self) -> Any:
        """Switch to evaluation, for optimizers that tell it from training."""
        switch = getattr(self.optimizer, "eval", None)
        return switch() if callable(switch) else None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step, unless this batch only accumulates.

        Args:
            closure: As for the inner optimizer; fp16 refuses one, as torch's scaler does.

        Returns:
            What the inner optimizer returns: the closure's loss, if there is one.
        """
        if not self.gradient_state.sync_gradients:
            return None
        if self.before_first_step is not None:
            self.before_first_step()
            self.before_first_step = None
        self.stepped_in_loop = self.gradient_state.is_in_loop
        preemption.note_work()
        if self._scaling is not None:
            self._skipped = self._scaling.step(self.optimizer, closure)
            return None
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` changed nothing because gradients had overflowed."""
        if not isinstance(self._skipped, bool):
            self._skipped = self._skipped()
        return self._skipped

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratedOptimizer:
        """Return a wrapper of a copy, which steps with the same scaler in the same run."""
        copied = AcceleratedOptimizer.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__, optimizer=copy.deepcopy(self.optimizer, memo), before_first_step=None)
        if self._scaling is not None:
            self._scaling.add(copied.optimizer)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_scaling", "_skipped", "before_first_step", "gradient_state", "scaler")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state,
            gradient_state=GradientState(),
            scaler=None,
            _scaling=None,
            _skipped=False,
            before_first_step=None,
        )

    def __repr__(self) -> str:
        return f"AcceleratedOptimizer({self.optimizer!r})"
