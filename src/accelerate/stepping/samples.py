"""How many samples of the dataset the batch stands for that a loader has just given."""

from __future__ import annotations

from typing import Any


def samples_of_step(loader: Any, batch_size: int, shards: int) -> tuple[int, int]:
    """Return the real samples of this rank's batch, and of the batches of all shards in the same step.

    A loader that keeps a global batch size gives a `Padding` with each step that is not full, on one shard too.

    Args:
        loader: A prepared loader in a pass.
        batch_size: Samples of a full batch of one shard.
        shards: Number of data shards.
    """
    padding = loader.padding
    if padding is None:
        return batch_size, batch_size * shards
    return padding.real[loader.shard_index], sum(padding.real)


def filled_shards(loader: Any, shards: int) -> int:
    """Return how many data shards had a real sample in the step that a loader has just given; all if unknown."""
    padding = getattr(loader, "padding", None)
    return shards if padding is None else sum(1 for real in padding.real if real)
