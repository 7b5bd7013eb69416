"""Which parameters the losses of a window of accumulation reach.

[Note: whose gradients]
A window's losses may reach models that nobody passed to `accumulate`: of two models trained by one loss many loops pass
one. So to a window belong the parameters of its models, those that an optimizer steps with them, and all others that
are not another window's. Others count that are beside it: open, or with a batch since it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .tally import Window

Parameters = dict[int, torch.Tensor]
"""Parameters by identity."""


def everything(models: Iterable[Any], optimizers: Iterable[torch.optim.Optimizer]) -> Parameters:
    """Return the parameters of all models and all optimizers."""
    found = _of_models(models)
    for optimizer in optimizers:
        found.update(_of_optimizer(optimizer))
    return found


def reached(
    window: Window,
    windows: Iterable[Window],
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[torch.Tensor]:
    """Return the parameters that a window's losses reach; see [Note: whose gradients].

    Args:
        window: The window. Without models it takes what no other one has.
        windows: All windows, it among them.
        models: All prepared models.
        optimizers: All prepared optimizers.
    """
    beside = [other for other in windows if other is not window and (other.is_pending or other.used > window.began)]
    mine = _of_models(window.models or ())
    theirs = {key for other in beside for key in _of_models(other.models or ())} - mine.keys()
    stepped_with_mine, stepped_with_theirs = dict(mine), set(theirs)
    for optimizer in optimizers:
        held = _of_optimizer(optimizer)
        if held.keys() & mine.keys():
            stepped_with_mine.update((key, item) for key, item in held.items() if key not in theirs)
        elif held.keys() & theirs:
            stepped_with_theirs.update(held)
    if any(other.models is None for other in beside):
        return list(stepped_with_mine.values())  # what is left has a window outside of regions
    left = {key: item for key, item in everything(models, optimizers).items() if key not in stepped_with_theirs}
    return list({**left, **stepped_with_mine}.values())


def _of_models(models: Iterable[Any]) -> Parameters:
    modules = [model for model in models if isinstance(model, torch.nn.Module)]
    return {id(parameter): parameter for model in modules for parameter in model.parameters()}


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Parameters:
    return {id(item): item for group in optimizer.param_groups for item in group["params"]}
