"""How many samples of the dataset the batch stands for that a loader has just given."""

from __future__ import annotations

from typing import Any


def samples_of_step(loader: Any, batch_size: int, shards: int) -> tuple[int, int]:
    """Return the real samples of this rank's batch, and of the batches of all shards in the same step.

    Args:
        loader: A prepared loader in a pass.
        batch_size: Samples of a full batch of one shard.
        shards: Number of data shards.
    """
    padding = loader.padding
    if padding is not None:
        return padding.real[loader.shard_index], sum(padding.real)
    # No padding means as many for each shard, which may be fewer than in a full batch when it is the last one.
    everyone = loader.remainder if loader.end_of_dataloader and loader.remainder > 0 else batch_size * shards
    return everyone // shards, everyone


def filled_shards(loader: Any, shards: int) -> int:
    """Return how many data shards had a real sample in the step that a loader has just given; all if unknown."""
    padding = getattr(loader, "padding", None)
    return shards if padding is None else sum(1 for real in padding.real if real)
