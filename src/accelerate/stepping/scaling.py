"""The loss scale of fp16, over one `torch.amp.GradScaler` and any number of optimizers.

[Note: when the scale is updated] `GradScaler.update` forgets what each optimizer found, and may change the scale
while the gradients of another optimizer still carry the old one. So with several optimizers the update waits for the
next `scale`, when all of them have stepped; with one it follows the step at once. Gradients in the middle of a window
of accumulation, which no step has used yet, are brought to the new scale.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018 (dynamic loss scaling, section 3.2).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .gradients import rescale

_SCALINGS: weakref.WeakKeyDictionary[torch.amp.GradScaler, LossScaling] = weakref.WeakKeyDictionary()


class LossScaling:
    """Scales losses, unscales gradients once for each step, and steps where nothing overflowed."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = weakref.ref(scaler)
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._unscaled: set[int] = set()
        self._update_waits = False
        self.pending: Callable[[], list[torch.Tensor]] | None = None
        """Returns the parameters with gradients that go on being accumulated while optimizers of others step."""

    @staticmethod
    def of(scaler: torch.amp.GradScaler) -> LossScaling:
        """Return the one scaling over this scaler."""
        found = _SCALINGS.get(scaler)
        if found is None:
            found = _SCALINGS[scaler] = LossScaling(scaler)
        return found

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """The scaler, which belongs to the session."""
        scaler = self._scaler()
        if scaler is None:
            raise RuntimeError("The loss scaler was deleted while an optimizer still steps with it.")
        return scaler

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss as it goes into `backward`."""
        self.update_if_waiting()
        return self.scaler.scale(loss)

    def unscale(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Bring the gradients of these optimizers to their true size, once for each step."""
        for optimizer in optimizers:
            if id(optimizer) not in self._unscaled:
                self.scaler.unscale_(optimizer)
                self._unscaled.add(id(optimizer))

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimizer among those that step with this scale."""
        self._optimizers.add(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool | Callable[[], bool]:
        """Step unless gradients overflowed.

        Returns:
            Whether the step was skipped: a boolean, or a function that finds out, since asking the device makes
            the caller wait.
        """
        if closure is None:
            self.scaler.step(optimizer)
        else:
            self.scaler.step(optimizer, closure=closure)
        self._unscaled.discard(id(optimizer))
        skipped = self._skipped(optimizer)
        self._update_waits = True
        if len(self._optimizers) <= 1:
            self.update_if_waiting()
        return skipped

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop what is known of gradients that are thrown away: they were unscaled, and no step followed."""
        if id(optimizer) in self._unscaled:
            self._unscaled.discard(id(optimizer))
            self.scaler._per_optimizer_states.pop(id(optimizer), None)

    def update_if_waiting(self) -> None:
        """Update the scale if a step has been taken since; see [Note: when the scale is updated]."""
        if self._update_waits:
            self._update_waits = False
            self._unscaled.clear()
            held = [] if self.pending is None else self.pending()
            before = self.scaler._scale.clone() if held and self.scaler._scale is not None else None
            self.scaler.update()
            if before is not None and self.scaler._scale is not None:
                rescale(held, self.scaler._scale / before)

    def _skipped(self, optimizer: torch.optim.Optimizer) -> bool | Callable[[], bool]:
        # The scaler's own finding: it also tells of fused optimizers, which skip inside their kernel.
        if not self.scaler.is_enabled():
            return False
        found = list(self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())
        return lambda: any(bool(flag.item()) for flag in found)
