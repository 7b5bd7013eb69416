"""The format in which one rank holds everything: whole weights, whole optimizer.

Owns saving and loading one model and one optimizer in a folder. Other ways to lay them out, such as shards per
rank, are further modules with the same four functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, explain
from . import layout
from .train_state import read_state, write_state
from .weights import complete_tied, load_weights, write_weights


def save_model(state: Mapping[str, torch.Tensor], folder: Path, index: int, safe_serialization: bool = True) -> None:
    """Write the weights of model `index`. Called on the ranks that write to a disk for the others."""
    write_weights(state, folder / layout.model_file(index, safe_serialization))


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
    try:
        model.load_state_dict(weights, **kwargs)
    except RuntimeError as error:
        # Torch lists names as they stand in the file; `explain` takes out of them what a terminal would obey.
        raise CheckpointError(
            explain(f"The weights in {folder} do not fit: {error}", remedy="Build the model as it was for the save.")
        ) from None


def save_optimizer(optimizer: Any, folder: Path, index: int) -> None:
    """Write the state of optimizer `index`. Called on the ranks that write to a disk for the others."""
    write_state(folder, layout.numbered(layout.OPTIMIZER_NAME, index), optimizer.state_dict())


def load_optimizer(optimizer: Any, folder: Path, index: int) -> None:
    """Read the state of optimizer `index`; it moves to where the parameters are. Called on all ranks."""
    optimizer.load_state_dict(read_state(folder, layout.numbered(layout.OPTIMIZER_NAME, index)))
