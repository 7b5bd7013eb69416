"""What is under a loader: its share, and the datasets that it reads from."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from .iterables import IterableDatasetShard
from .samplers import BatchSamplerShard, SkipBatchSampler


def shard_of(dataset: Any, sampler: Any) -> tuple[int, int]:
    """Return which data shard a loader over these reads, and of how many."""
    while type(sampler) is SkipBatchSampler:
        sampler = sampler.batch_sampler
    for holder in (dataset, sampler):
        if isinstance(holder, (IterableDatasetShard, BatchSamplerShard)):
            return holder.process_index, holder.num_processes
    return 0, 1


def datasets_under(dataset: Any) -> list[Any]:
    """Return a dataset, without shares, and those that it reads from, as far as attributes tell."""
    while isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    found: list[Any] = []
    waiting = [dataset]
    while waiting:
        node = waiting.pop(0)
        if any(node is known for known in found):
            continue
        found.append(node)
        for value in getattr(node, "__dict__", {}).values():
            inner = value if isinstance(value, (list, tuple)) else [value]
            waiting += [item for item in inner if isinstance(item, Dataset)]
    return found


class Own:
    """The generator that a loader was given, in the shape of a sampler's."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
