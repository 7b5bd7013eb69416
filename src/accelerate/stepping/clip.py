"""Clip gradients by norm and by value, at their true size whatever the loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .scaling import LossScaling


def owners(
    parameters: Sequence[torch.Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that own any of the parameters; a single one is taken to."""
    optimizers = list(optimizers)
    if len(optimizers) == 1:
        return optimizers
    wanted = {id(parameter) for parameter in parameters}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"])
    ]


def remaining_scale(
    scaling: LossScaling,
    parameters: Sequence[torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    *,
    sync_gradients: bool,
) -> float:
    """Prepare scaled gradients for clipping, and return by how much they are still scaled.

    Before the window of accumulation ends, gradients must keep their scale, since further scaled ones are added;
    limits are scaled in place of them. At its end they are unscaled, which happens once.
    """
    if not sync_gradients:
        return scaling.scaler.get_scale()
    scaling.unscale(owners(parameters, optimizers))
    return 1.0


def clip_norm(
    parameters: Sequence[torch.Tensor],
    max_norm: float,
    norm_type: float,
    scale: float = 1.0,
) -> torch.Tensor:
    """Clip the norm of all gradients together; return the norm they had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm * scale, norm_type=norm_type)
    return norm if scale == 1.0 else norm / scale


def clip_value(parameters: Sequence[torch.Tensor], value: float, scale: float = 1.0) -> None:
    """Clip each element of the gradients."""
    torch.nn.utils.clip_grad_value_(parameters, value * scale)
