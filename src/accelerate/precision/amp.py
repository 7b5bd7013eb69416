"""Mixed precision over `torch.autocast`: bfloat16, and float16 with a loss scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from ..settings.options.handlers import AutocastKwargs
from .autocast import wrap_forward
from .base import Precision


class _Autocast(Precision):
    uses_autocast = True
    dtype: torch.dtype

    def __init__(self, device_type: str, options: AutocastKwargs | None = None) -> None:
        self._device_type = device_type
        self._options = options or AutocastKwargs()

    def wrap(self, model: torch.nn.Module) -> None:
        wrap_forward(model, self.autocast, outputs_to_fp32=self._options.outputs_to_fp32)

    def set_options(self, options: AutocastKwargs | None) -> None:
        self._options = options or AutocastKwargs()

    def autocast(self, options: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        chosen = options or self._options
        return torch.autocast(
            self._device_type,
            dtype=self.dtype,
            enabled=chosen.enabled,
            cache_enabled=chosen.cache_enabled,
        )


class BFloat16(_Autocast):
    """bfloat16 where autocast says so. It has the range of float32, so nothing is scaled."""

    name = "bf16"
    dtype = torch.bfloat16


class Float16(_Autocast):
    """float16 where autocast says so, with the loss scaled so that small gradients do not vanish."""

    name = "fp16"
    dtype = torch.float16

    def __init__(
        self,
        device_type: str,
        scaler: torch.amp.GradScaler,
        options: AutocastKwargs | None = None,
    ) -> None:
        super().__init__(device_type, options)
        self.scaler = scaler
