"""The model inside the wrappers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..precision.autocast import unwrap_forward

_WRAPPERS = (DistributedDataParallel, DataParallel)


def is_compiled_module(module: Any) -> bool:
    """Tell whether `torch.compile` returned this module."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) if _dynamo_is_loaded() else False


def has_compiled_regions(module: torch.nn.Module) -> bool:
    """Tell whether parts of this module were compiled in place."""
    return any(child._compiled_call_impl is not None or is_compiled_module(child) for child in module.modules())


def unwrap_compiled(model: Any) -> Any:
    """Return the module `torch.compile` was given."""
    return model._orig_mod if is_compiled_module(model) else model


def extract_model_from_parallel(
    model: torch.nn.Module,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> torch.nn.Module:
    """Return the model inside the wrappers of `prepare`.

    Args:
        model: Any model; one without wrappers comes back as it is.
        keep_fp32_wrapper: `False` takes the run's precision off the model, in place.
        keep_torch_compile: Return a compiled model compiled.
        recursive: Take wrappers off modules inside too, in place.
    """
    inner = unwrap_compiled(model)
    unwrapped = inner
    while isinstance(unwrapped, _WRAPPERS):
        unwrapped = unwrap_compiled(unwrapped.module)
    if recursive:
        _unwrap_children(unwrapped)
    if not keep_fp32_wrapper:
        for layer in (model, inner, unwrapped):  # a model compiled before prepare has it outside
            unwrap_forward(layer)
    if not keep_torch_compile or not is_compiled_module(model):
        return unwrapped
    if unwrapped is inner:
        return model
    # A new compiled view: the wrapped one stays as it is for training.
    return torch._dynamo.eval_frame.OptimizedModule(unwrapped, model.dynamo_ctx)  # pyright: ignore[reportArgumentType]


def _unwrap_children(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        while isinstance(child, _WRAPPERS):
            child = child.module
            setattr(module, name, child)
        _unwrap_children(child)


def _dynamo_is_loaded() -> bool:
    # Asking the class would import the compiler, which takes seconds; nothing is compiled before it is loaded.
    return "torch._dynamo.eval_frame" in sys.modules
