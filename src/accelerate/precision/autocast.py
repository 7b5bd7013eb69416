"""A model's forward under autocast, with outputs in float32; undoable.

[Note: the instance's forward] The wrapper is a method bound to the model, and calls the original as a plain
function. So a deep copy of the model computes with its own parameters: copying rebinds methods, while a closure
over the model would keep computing with the old one's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch

from ..core.tree import honor_type, rebuild_mapping

_HALF = (torch.float16, torch.bfloat16)


def to_float32(data: Any) -> Any:
    """Return nested data with its half-precision tensors in float32; the rest is the same objects."""
    if isinstance(data, torch.Tensor):
        return data.float() if data.dtype in _HALF else data
    kind = type(data)
    if kind is tuple or kind is list:
        return kind([to_float32(item) for item in data])
    if kind is dict:
        return {key: to_float32(item) for key, item in data.items()}
    if isinstance(data, (tuple, list)):
        return honor_type(data, [to_float32(item) for item in data])
    if hasattr(data, "items") and hasattr(data, "keys"):
        return rebuild_mapping(data, {key: to_float32(item) for key, item in data.items()})
    return data


class ConvertOutputsToFp32:
    """Calls a function and returns its half-precision outputs in float32."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        functools.update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return to_float32(self.model_forward(*args, **kwargs))


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward to return its half-precision outputs in float32."""
    converting = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return converting(*args, **kwargs)

    forward.__wrapped__ = model_forward  # type: ignore[attr-defined]
    return forward


def wrap_forward(
    model: torch.nn.Module,
    region: Callable[[], AbstractContextManager[Any]],
    *,
    outputs_to_fp32: bool,
) -> None:
    """Make `model.forward` run inside `region()`; see [Note: the instance's forward].

    Args:
        model: Changed in place; a wrapper from before, which may be of another precision, is replaced.
        region: Makes a fresh context for each call.
        outputs_to_fp32: Return half-precision outputs in float32.
    """
    unwrap_forward(model)
    bound: Any = model.forward
    own = isinstance(bound, MethodType) and bound.__self__ is model
    original = bound.__func__ if own else bound

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with region():
            output = original(*args, **kwargs)
        return to_float32(output) if outputs_to_fp32 else output

    model.__dict__["_original_forward"] = model.__dict__.get("forward")
    model.forward = MethodType(forward, model) if own else forward


def unwrap_forward(model: torch.nn.Module) -> None:
    """Give the model its own forward back; does nothing if it was not wrapped."""
    if "_original_forward" not in model.__dict__:
        return
    original = model.__dict__.pop("_original_forward")
    if original is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = original
