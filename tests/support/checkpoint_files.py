"""Single files of checkpoints, as a save would write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from accelerate.checkpoint.files import TensorFile
from accelerate.checkpoint.train_state import plan_state
from accelerate.checkpoint.weights import TIED_KEY, plan_weights


def write_state(folder: Path, stem: str, state: Any) -> None:
    """Write one state."""
    for file in plan_state(stem, state):
        file.write(folder)


def write_weights(state: Mapping[str, torch.Tensor], path: Path, max_shard_bytes: int | None = None) -> None:
    """Write weights to `path`, or to shards named after it."""
    for file in plan_weights(state, path.name, max_shard_bytes):
        file.write(path.parent)


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path, tied: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, with names that share the memory of others."""
    metadata = {TIED_KEY: msgspec.json.encode(tied).decode()} if tied else {}
    TensorFile(path.name, tensors, metadata).write(path.parent)
