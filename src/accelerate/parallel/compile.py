"""Compile models with torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..core.enums import DynamoBackend
from ..settings.options.compile import TorchDynamoPlugin
from .unwrap import is_compiled_module


def compile_model(model: torch.nn.Module, options: TorchDynamoPlugin) -> torch.nn.Module:
    """Return the model compiled, or as it is if nothing was asked for or it is compiled already."""
    if options.backend == DynamoBackend.NO or is_compiled_module(model):
        return model
    kwargs = options.to_kwargs()
    blocks = list(repeated_blocks(model)) if options.use_regional_compilation else []
    if not blocks:
        return torch.compile(model, **kwargs)  # pyright: ignore[reportReturnType]
    for block in blocks:
        block.compile(**kwargs)
    return model


def repeated_blocks(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the blocks of each `ModuleList` whose members are all of one class; outermost lists only."""
    if isinstance(model, torch.nn.ModuleList) and len(model) > 1 and len({type(block) for block in model}) == 1:
        yield from model
        return
    for child in model.children():
        yield from repeated_blocks(child)
