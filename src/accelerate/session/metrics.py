"""Gather results of all ranks without the samples that were added to make batches even."""

from __future__ import annotations

from typing import Any

import torch

from ..core.tree import tree_leaves
from ..runtime import ops, state
from ..runtime.accumulation import GradientState


def gather_for_metrics(gradient_state: GradientState, input_data: Any, use_gather_object: bool) -> Any:
    """Return the data of all ranks, cut to the real samples on a loader's last batch. Collective.

    Args:
        gradient_state: Knows the loader being iterated.
        input_data: Nested tensors, or any objects, which travel pickled.
        use_gather_object: Send tensors as objects too, for shapes that differ.
    """
    as_objects = use_gather_object or not all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(input_data))
    data = ops.gather_object(input_data) if as_objects else ops.gather(input_data)
    if not gradient_state.end_of_dataloader:
        return data
    real = gradient_state.remainder
    if real <= 0 or state.current_or_single().process.world_size == 1:
        return data
    return data[:real] if as_objects else ops.slice_tensors(data, slice(0, real))
