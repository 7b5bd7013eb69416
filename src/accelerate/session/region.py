"""Two functions of the historical interface: an autocast region and a loss scaler, without an `Accelerator`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import precision
from ..core.enums import PrecisionType
from ..runtime import state
from ..settings.options.handlers import AutocastKwargs
from .state import AcceleratorState


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """Return an autocast region on this process's device, in the precision of the run.

    Args:
        native_amp: `False` returns a region that changes nothing.
        autocast_kwargs: Options of autocast.

    Raises:
        SettingError: (a `ValueError`) if there is no `Accelerator` yet.
    """
    if not native_amp:
        return nullcontext()
    name = PrecisionType(AcceleratorState().mixed_precision)
    return precision.choose(name, state.current().hardware).autocast(autocast_kwargs)


def get_grad_scaler(distributed_type: Any = None, **kwargs: Any) -> torch.amp.GradScaler:
    """Return the loss scaler for this process's device.

    Args:
        distributed_type: Kept for compatibility; the device decides.
        **kwargs: As for `torch.amp.GradScaler`.
    """
    return state.current_or_single().hardware.grad_scaler(**kwargs)
