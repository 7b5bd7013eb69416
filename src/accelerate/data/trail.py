"""How a pass over a stream of samples is taken up again, and what is noted of it for that while it is read.

Owns the decision from where to read on, and the record of what each worker process gave. A stream has no indices:
whether it gives the same samples again is told by a few values of the last batch, noted before the loop can change
it. Never reads anything.

[Note: workers]
Worker processes take turns, one batch each; one whose part of the data is exhausted is left out. So which samples were
read follows from how many batches each worker gave, and not from their sum.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..core.errors import explain
from ..core.tree import tree_leaves

_RECENT = 256
"""How many batches the reading may be ahead of the loop."""

_LEAVES, _VALUES = 8, 16

_INTEGERS = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
_READABLE = frozenset((*_INTEGERS, *_FLOATS))
"""Of which dtypes torch gives the values; others, such as packed bits, it only stores."""


@dataclass(frozen=True)
class Way:
    """How to get to the batch that a pass continues with: past samples first, then past batches."""

    starts: int | list[int] = 0
    """Samples to read without making batches of them: in this process, or in each worker process."""

    batches: int = 0
    """Batches to read after that, and to leave out."""

    started: int = 0
    """Samples that all shards together had read where batches begin."""


@dataclass(frozen=True)
class Left:
    """Where a pass was left: what of a restored place matters here."""

    done: int
    """Samples that all shards together had read."""

    per_step: int
    """How many they read in one step."""

    per_batch: int
    """How many for one batch of each shard."""

    workers: int

    is_comparable: bool = False
    """Whether something was noted of the last batch, which is made of the same samples now."""

    starts: list[int] | None = None
    """`Way.starts` of the run that was left, if workers had any."""

    started: int = 0

    by_worker: list[int] | None = None
    """Samples that each worker had read; `None` if that was not noted."""


def find_way(left: Left, per_batch: int, per_step: int, workers: int, *, reads_alone: bool, counts: bool) -> Way | None:
    """Return how to get to a place, or `None` if it cannot be found.

    Args:
        left: The place.
        per_batch: Samples that all shards together read now for one batch of each shard.
        per_step: And for one step.
        workers: Worker processes now.
        reads_alone: Whether one rank reads for all: then the number of ranks does not change what a batch is.
        counts: Whether batches have to be read in any case, for a loader that counts them.
    """
    if workers != left.workers:
        return None
    alike = left.per_batch == per_batch if reads_alone else left.per_step == per_step
    if workers == 0:
        if counts and alike:
            return Way(0, left.done // per_batch)
        again = per_batch if alike and left.is_comparable and left.done >= per_batch else 0
        return Way(left.done - again, int(again > 0), left.done - again)
    if alike:
        return Way(left.starts or 0, (left.done - left.started) // per_batch, left.started)
    return None if left.by_worker is None else Way(left.by_worker, 0, left.done)


class Trail:
    """What was read in a pass over a stream, a few batches back.

    Args:
        begun: Samples that each worker process had read where batches begin; 0 for all; `None` if unknown.
        workers: How many there are.
        per_batch: Samples that all shards together read for one batch.
    """

    def __init__(self, begun: int | list[int] | None, workers: int, per_batch: int) -> None:
        self.per_batch = per_batch
        self._by_worker = list(begun) if isinstance(begun, list) else [0] * workers
        self._recent: deque[tuple[int | None, int, list[Any]]] = deque(maxlen=_RECENT)
        self._read = 0
        self._known = workers > 0 and begun is not None

    def begin(self) -> None:
        """Count batches from here on."""
        self._read = 0
        self._recent.clear()

    def note(self, batch: Any, worker: int | None, samples: int) -> None:
        """Take note of a batch that was read, before it is handed on.

        Args:
            batch: It.
            worker: Which process made it, if that is known.
            samples: How many samples all shards together read for it.
        """
        self._read += 1
        if worker is None:
            self._known = False
        else:
            self._by_worker[worker] += samples
        self._recent.append((worker, samples, glimpse(batch)))

    def by_worker(self, given: int) -> list[int] | None:
        """Return how many samples each worker read for the first `given` batches noted; `None` if unknown."""
        ahead = self._read - given
        if not self._known or not 0 <= ahead <= len(self._recent):
            return None
        counts = list(self._by_worker)
        for worker, samples, _ in islice(reversed(self._recent), ahead):
            counts[worker or 0] -= samples
        return counts

    def seen(self, given: int) -> list[Any] | None:
        """Return what was noted of batch `given`, counted from 1; `None` if that is too long ago."""
        place = len(self._recent) - 1 - (self._read - given)
        return self._recent[place][2] if 0 <= place < len(self._recent) else None


def glimpse(batch: Any) -> list[Any]:
    """Return a few values of a batch, as texts and numbers: enough to tell it from another one."""
    return [_glimpse(leaf) for leaf in islice(tree_leaves(batch), _LEAVES)]


def _glimpse(leaf: Any) -> Any:
    # Taken inside of the loop, so it must never raise: what may not be readable is told by its type alone.
    if isinstance(leaf, torch.Tensor):
        if type(leaf) is not torch.Tensor or leaf.is_nested or leaf.is_quantized or leaf.dtype not in _READABLE:
            return type(leaf).__name__
        if leaf.layout is not torch.strided or not leaf.is_cpu:  # looking at others would wait for the device
            return ["tensor", list(leaf.shape)]
        flat = leaf.detach().reshape(-1)
        few = flat[:: max(1, -(-len(flat) // _VALUES))].tolist()
        return [str(leaf.dtype), list(leaf.shape), *(repr(value) for value in few)]
    if isinstance(leaf, np.ndarray):
        flat = leaf.reshape(-1)
        few = flat[:: max(1, -(-flat.size // _VALUES))].tolist()
        return ["array", list(leaf.shape), *(_plain(value) if leaf.dtype.hasobject else repr(value) for value in few)]
    return _plain(leaf)


def _plain(value: Any) -> str:
    # The `repr` of other objects may hold their place in memory.
    return repr(value)[:64] if isinstance(value, (int, float, str, bytes, bool)) else type(value).__name__


def same(one: Any, other: Any) -> bool:
    """Tell whether two glimpses are of the same batch; numbers may differ as they do between machines."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    try:
        return "." in f"{one}{other}" and math.isclose(float(one), float(other), rel_tol=1e-3, abs_tol=1e-4)
    except (TypeError, ValueError):
        return False


def another_batch(seen: list[Any] | None, found: Any, dataset: Any, done: int) -> str | None:
    """Return why a pass cannot go on if the batch before its place is not the one that was noted there."""
    if seen is None or same(seen, now := glimpse(found)):
        return None
    return explain(
        f"{type(dataset).__name__} does not give the samples again that it gave before the checkpoint: the batch before "
        f"sample {done} holds {now!r:.160}, and held {seen!r:.160}. Going on would repeat some samples and lose others.",
        accepted="datasets whose order follows from the global random generators, from generators and numbers among "
        "their attributes, from the epoch given to set_epoch(), or from their own state_dict() and load_state_dict()",
        remedy="Shuffle from such a source, or call set_epoch() on the loader to begin a pass anew.",
    )
