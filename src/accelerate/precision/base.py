"""What every precision offers. The base class computes in the numbers the model has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..settings.options.handlers import AutocastKwargs


class Precision:
    """Computes in the model's own numbers."""

    name = "no"
    uses_autocast = False

    scaler: torch.amp.GradScaler | None = None
    """Keeps small gradients from vanishing; `None` where the numbers have range enough."""

    def wrap(self, model: torch.nn.Module) -> None:
        """Make the model's forward compute in this precision. Undone by `precision.autocast.unwrap_forward`."""
        return None

    def autocast(self, options: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Return a region in which operations choose their precision."""
        return nullcontext()


class FullPrecision(Precision):
    """The model's own numbers; the null object."""
