"""The random numbers that reading data draws, kept apart from those that training draws.

Owns snapshots of the global generators, private streams beside them, and the seeds of batches that are read in
worker processes. Never decides what is read.

[Note: streams of random numbers]
Python, numpy and torch have one global generator each, and everybody draws from it: samplers, datasets, dropout. An
order that depends on when training drew cannot be drawn again. So:
- What decides the order is drawn from the global generators when a pass begins, as in a loop without this library;
  their state at that time is kept. A sampler of a kind that we do not know may draw later too: from its second item
  on it draws from a private stream, which begins from the state after the first.
- A dataset that is read in order, one that is iterable, draws from a private stream from its first sample on.
- Each batch that a worker process reads is seeded for itself, by epoch, data shard and number of the batch. So ranks
  and workers do not draw the same augmentation, and no state of a worker has to be saved.
- With several ranks, a dataset that draws in the main process is seeded for each batch in the same way. With one it
  draws from the global generators, as in a loop without this library, and these are saved with the run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch

_WORD = 2**64 - 1


def derive(*parts: Any) -> int:
    """Return a number of 64 bits that depends on all the parts, and says nothing about any of them."""
    text = repr(tuple(part.hex() if isinstance(part, bytes) else part for part in parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def numbered(base: int, number: int) -> int:
    """Return the seed of batch `number` in a pass with the seed `base` (splitmix64, Steele et al. 2014)."""
    mixed = (base + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return mixed ^ (mixed >> 31)


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch's CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class Snapshot:
    """The state of the global generators of Python, numpy and torch's CPU at one time."""

    def __init__(self, states: dict[str, Any] | None = None) -> None:
        self.states = states or {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }

    def restore(self) -> None:
        """Set the generators to it."""
        random.setstate(self.states["python"])
        np.random.set_state(self.states["numpy"])
        torch.set_rng_state(self.states["torch"])

    def seeds(self, *parts: Any) -> tuple[int, int, int]:
        """Return seeds for Python, numpy and torch, each from its own state and `parts`.

        So what is drawn from a generator that the script seeded does not depend on one that it did not.
        """
        version, words, _ = self.states["python"]
        name, keys, position, *_ = self.states["numpy"]
        return (
            _seed_of(repr(version).encode() + np.asarray(words).tobytes(), *parts),
            _seed_of(repr((name, position)).encode() + np.asarray(keys).tobytes(), *parts),
            self.torch_seed(*parts),
        )

    def torch_seed(self, *parts: Any) -> int:
        """Return a seed that depends on torch's state, as those of torch's worker processes do, and on `parts`."""
        return _seed_of(self.states["torch"].numpy().tobytes(), *parts)


def _seed_of(state: bytes, *parts: Any) -> int:
    return derive(hashlib.blake2b(state, digest_size=16).digest(), *parts)


class PrivateStream:
    """A stream of random numbers that code draws from, inside `with`, in place of the global ones.

    Args:
        seed: Where the stream begins; or three, for Python, numpy and torch.
    """

    def __init__(self, seed: int | tuple[int, int, int]) -> None:
        python, of_numpy, of_torch = seed if isinstance(seed, tuple) else (seed, seed, seed)
        numpy = np.random.MT19937()
        numpy._legacy_seeding(of_numpy & 0xFFFFFFFF)  # as `seed_globals` does
        self._numpy = numpy
        self._python = random.Random(python).getstate()  # noqa: S311 - shuffling, not secrets
        self._torch = torch.Generator().manual_seed(of_torch).get_state()

    def __enter__(self) -> Self:
        outer = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        self._outer = random.getstate(), outer, torch.get_rng_state()
        random.setstate(self._python)
        # Exchanging numpy's generator takes a fraction of the time of copying its state.
        np.random.set_bit_generator(self._numpy)  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_rng_state(self._torch)
        return self

    def __exit__(self, *_: object) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        python, numpy, state = self._outer
        random.setstate(python)
        np.random.set_bit_generator(numpy)  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_rng_state(state)

    def state(self) -> dict[str, Any]:
        """Return how far the stream has come."""
        return {"python": self._python, "numpy": self._numpy.state, "torch": self._torch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` returned."""
        self._python, self._torch = state["python"], state["torch"]
        self._numpy.state = state["numpy"]


class Seeds:
    """The global generators, inside `with`, seeded anew; afterwards they are what they were before.

    Args:
        seed: By what; or three, for Python, numpy and torch.
    """

    _numpy = np.random.MT19937(0)  # one for all: making one takes longer than all else here, and seeding it does not

    def __init__(self, seed: int | tuple[int, int, int]) -> None:
        self._seeds = seed if isinstance(seed, tuple) else (seed, seed, seed)

    def __enter__(self) -> None:
        outer = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        self._outer = random.getstate(), outer, torch.get_rng_state()
        if outer is self._numpy:  # inside another one
            self._numpy = np.random.MT19937(0)
        np.random.set_bit_generator(self._numpy)  # pyright: ignore[reportAttributeAccessIssue]
        python, of_numpy, of_torch = self._seeds
        random.seed(python)
        np.random.seed(of_numpy & 0xFFFFFFFF)
        torch.default_generator.manual_seed(of_torch)

    def __exit__(self, *_: object) -> None:
        python, numpy, state = self._outer
        random.setstate(python)
        np.random.set_bit_generator(numpy)  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_rng_state(state)


class Seeded:
    """An index on its way to a worker process, which is seeded when the index arrives there.

    The dataset, `collate_fn` and `worker_init_fn` see what they would see without it: torch's worker takes the index
    out of its queue in the same process and thread that then reads the batch.
    """

    def __init__(self, index: Any, seed: int, epoch: int | None = None) -> None:
        self.index = index
        self.seed = seed
        self.epoch = epoch
        """Which epoch to tell the worker's dataset, if any."""

    def __reduce__(self) -> tuple[Any, tuple[Any, int, int | None]]:
        return _arrive, (self.index, self.seed, self.epoch)


def _arrive(index: Any, seed: int, epoch: int | None) -> Any:
    info = torch.utils.data.get_worker_info()
    if info is not None:
        seed_globals(seed)
        dataset: Any = info.dataset
        if epoch is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
    return index


_END = object()


def private(source: Iterator[Any], stream: PrivateStream) -> Iterator[Any]:
    """Yield what `source` does, which draws from `stream`."""
    while True:
        with stream:
            item = next(source, _END)
        if item is _END:
            return
        yield item


def seeded_reads(source: Iterator[Any], base: int, number: int) -> Iterator[Any]:
    """Yield the batches of a source that draws, for each of them, from a stream of its own.

    Args:
        source: Gives batches.
        base: The seed of the pass.
        number: Which batch of the pass comes first.
    """
    while True:
        with Seeds(numbered(base, number)):
            item = next(source, _END)
        if item is _END:
            return
        yield item
        number += 1
