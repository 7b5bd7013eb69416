"""The format in which one rank holds everything: whole weights, whole optimizer.

Owns how one model and one optimizer are written to a folder and read from it. Other ways to lay them out, such as
shards per rank, are further modules with the same four functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, explain
from . import layout, naming
from .files import File
from .train_state import plan_state, read_state
from .weights import complete_tied, load_weights, own_copies, plan_weights


def plan_model(state: Mapping[str, torch.Tensor], index: int, safe_serialization: bool = True) -> list[File]:
    """Return the files of the weights of model `index`. Called on the ranks that write to a disk for the others."""
    return plan_weights(state, layout.model_file(index, safe_serialization))


def load_model(model: torch.nn.Module, folder: Path, index: int, **kwargs: Any) -> None:
    """Read the weights of model `index` into `model`, wherever its parameters are. Called on all ranks.

    Args:
        model: The inner model, without wrappers.
        folder: The checkpoint.
        index: Which of the saved models.
        **kwargs: For `model.load_state_dict`, such as `strict=False`.

    Raises:
        CheckpointError: If the weights are damaged, or do not fit the model.
    """
    weights = complete_tied(load_weights(folder, index), model)
    if kwargs.get("assign"):
        weights = own_copies(weights)
    try:
        model.load_state_dict(weights, **kwargs)
    except RuntimeError as error:
        # Torch lists names as they stand in the file; `explain` takes out of them what a terminal would obey.
        raise CheckpointError(
            explain(f"The weights in {folder} do not fit: {error}", remedy="Build the model as it was for the save.")
        ) from None


def plan_optimizer(optimizer: Any, index: int, names: Mapping[int, str], *, allow_pickle: bool = False) -> list[File]:
    """Return the files of the state of optimizer `index`. Called on the ranks that write to a disk for the others.

    Args:
        optimizer: Anything with `state_dict()`.
        index: Which of the saved optimizers.
        names: Of parameters, by `id()`; states are kept under them.
        allow_pickle: As for `train_state.plan_state`.
    """
    state = naming.to_names(optimizer.state_dict(), naming.keys_of(optimizer, names))
    return plan_state(layout.numbered(layout.OPTIMIZER_NAME, index), state, allow_pickle=allow_pickle)


def read_optimizer(
    optimizer: Any,
    folder: Path,
    index: int,
    names: Mapping[int, str],
    *,
    groups_may_move: bool = True,
    allow_pickle: bool = False,
) -> Any:
    """Read what `optimizer.load_state_dict` takes as the state of optimizer `index`. Called on all ranks.

    Args:
        optimizer: It is only looked at.
        folder: The checkpoint.
        index: Which of the saved optimizers.
        names: Of parameters, by `id()`.
        groups_may_move: As for `naming.to_numbers`.
        allow_pickle: As for `train_state.read_state`.

    Raises:
        CheckpointError: If the optimizer has other parameters than were saved.
    """
    stem = layout.numbered(layout.OPTIMIZER_NAME, index)
    state = read_state(folder, stem, allow_pickle=allow_pickle)
    keys = naming.keys_of(optimizer, names)
    return naming.to_numbers(state, keys, str(folder / stem), groups_may_move=groups_may_move)
