"""What every precision offers. The base class computes in the numbers the model has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..settings.options.handlers import AutocastKwargs
from .autocast import unwrap_forward


class Precision:
    """Computes in the model's own numbers."""

    name = "no"
    uses_autocast = False

    scaler: torch.amp.GradScaler | None = None
    """Keeps small gradients from vanishing; `None` where the numbers have range enough."""

    def wrap(self, model: torch.nn.Module) -> None:
        """Make the model's forward compute in this precision, and no longer in one it was wrapped in before."""
        unwrap_forward(model)

    def set_options(self, options: AutocastKwargs | None) -> None:
        """Take other options of autocast from now on."""
        return None

    def autocast(self, options: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Return a region in which operations choose their precision."""
        return nullcontext()


class FullPrecision(Precision):
    """The model's own numbers; the null object."""
