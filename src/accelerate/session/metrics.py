"""Gather results of all ranks without the samples that were added to make batches even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import WrongTypeError, explain
from ..core.tree import tree_leaves
from ..runtime import ops, state
from ..runtime.accumulation import GradientState


def gather_for_metrics(gradient_state: GradientState, input_data: Any, use_gather_object: bool) -> Any:
    """Return the data of all ranks, cut to the real samples on a loader's last batch. Collective.

    Args:
        gradient_state: Knows the loader being iterated.
        input_data: Nested tensors, or a list of objects, which travel pickled, with one entry for each sample.
        use_gather_object: Send a tensor's rows as objects too, for shapes that differ.

    Raises:
        WrongTypeError: (a `TypeError`) with several processes, for a mapping that has to travel as objects.
    """
    leaves = list(tree_leaves(input_data))
    # Nothing at all counts as objects: another rank's objects must meet it in the same operation.
    as_objects = use_gather_object or not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if state.current_or_single().process.world_size == 1:
        return input_data
    if as_objects and isinstance(input_data, Mapping):
        raise WrongTypeError(
            explain(
                f"gather_for_metrics got a {type(input_data).__name__} that has to travel as objects, with the keys "
                f"{list(input_data)!r:.80}: which of its parts belong to one sample cannot be told.",
                accepted="nested tensors, or a list with one object for each sample",
                remedy="Gather its values one after the other.",
            )
        )
    data = ops.gather_object(input_data) if as_objects else ops.gather(input_data)
    real = gradient_state.remainder
    if not gradient_state.end_of_dataloader or real <= 0:
        return data
    return data[:real] if as_objects else ops.slice_tensors(data, slice(0, real))
