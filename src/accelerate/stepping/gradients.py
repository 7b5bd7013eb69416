"""Gradients that have been accumulated: multiply them, leave a loss out of them, take them along and put them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..core.errors import CheckpointError, explain


def rescale(parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply the gradients of these parameters in place; those without one are left out."""
    held = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if isinstance(factor, torch.Tensor):
        for gradient in held:
            gradient.mul_(factor.to(gradient.device))
        return
    short = [gradient for gradient in held if gradient.element_size() < 4]
    for gradient in short:  # torch would round the factor to their precision first
        gradient.copy_(gradient.float().mul_(factor))
    if len(short) < len(held):
        others = [gradient for gradient in held if gradient.element_size() >= 4]
        torch._foreach_mul_(others, factor)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def left_out(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Run a backward that adds exact zeros to the gradients of these parameters, whatever the loss is.

    Multiplying a loss that is not finite by zero would not do. The backward itself must run: other ranks wait in it.
    """
    handles = [p.register_hook(torch.zeros_like) for p in parameters if p.requires_grad and p.is_leaf]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pack(gradient: torch.Tensor) -> Any:
    """Return a gradient as a checkpoint can hold it."""
    if not gradient.is_sparse:
        return gradient
    gradient = gradient.coalesce()
    return {"indices": gradient.indices(), "values": gradient.values(), "size": list(gradient.shape)}


def unpack(packed: Any) -> torch.Tensor:
    """Return the gradient that `pack` was given."""
    if isinstance(packed, torch.Tensor):
        return packed
    return torch.sparse_coo_tensor(packed["indices"], packed["values"], packed["size"], check_invariants=True)


def put_back(named: Mapping[str, torch.Tensor], packed: Mapping[str, Any], owner: str) -> None:
    """Give parameters the gradients that were saved under their names.

    Raises:
        CheckpointError: If there is a gradient for a parameter that is not here, or of another shape.
    """
    for name, saved in packed.items():
        gradient, parameter = unpack(saved), named.get(name)
        if parameter is None or parameter.shape != gradient.shape:
            found = "does not exist" if parameter is None else f"has the shape {tuple(parameter.shape)}"
            raise CheckpointError(
                explain(
                    f"The checkpoint holds a gradient of shape {tuple(gradient.shape)} for parameter {name!r} of {owner}, "
                    f"which {found} here.",
                    remedy="Prepare what was prepared for the save, in the same order.",
                )
            )
        parameter.grad = gradient.to(device=parameter.device, dtype=parameter.dtype)
