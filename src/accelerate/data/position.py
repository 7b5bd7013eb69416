"""Where a prepared loader is: what a checkpoint needs to continue in the middle of a pass.

Owns the place itself, and the state from which a pass can be drawn again. Never iterates anything.

[Note: drawing again]
Saved is not the order but what it was drawn from, when the pass began: the global random generators, and what the
samplers keep in attributes. To continue, all of it is put back, the order drawn again, and entered at the place
where it was left; then the global generators go back to where the run had them. What is put back of a sampler: its
own `state_dict()` if it has one; else random generators among its attributes, and numbers and texts among them that
have changed since it was prepared, such as a count of passes.

Kept too is what samplers were in the middle of the pass: another loader may share a generator and have drawn from it
since, and a pass that is given up must not leave them at its beginning.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..core.errors import CheckpointError, explain
from .feed import Check, Feed
from .shards import Padding
from .streams import Snapshot
from .trail import Trail

_ALWAYS = ("epoch", "initial_seed")
"""What is kept of a sampler although it has not changed, for it may be set otherwise in another process."""

_GENERATOR = "generator"
"""Where torch's samplers have their generator; without one they draw from the global one."""

_ordinals = itertools.count()


@dataclass(frozen=True)
class Position:
    """Where outer loops over a loader start.

    Example:
        ```python
        accelerator.load_state(folder)
        start = loader.position
        for epoch in range(start.epoch, epochs):
            for step, batch in enumerate(loader, start=loader.position.step):
                ...
        ```
    """

    epoch: int
    """The pass that comes next, or in the middle of which the loader is."""

    step: int
    """How many batches of that pass are done; 0 between passes."""

    samples: int | None
    """How many samples of it all processes together have read; `None` where batches have no fixed size."""


@dataclass
class Place:
    """A pass that has begun: how to draw its order again, and how far it has come."""

    opening: dict[str, Any]
    """What the order was drawn from: `random` and `samplers`. See [Note: drawing again]."""

    done: int = 0
    """Units of the source (samples; batches if they have no fixed size) that were read before this run of the pass."""

    unit: str = "samples"
    """What `done` counts."""

    size: int | None = None
    """How many units the source has, if known."""

    check: Check | None = None
    """Something that was read before."""

    per_step: int = 1
    """Units that all shards together read in one step."""

    step: int = 0
    """Steps before this run of the pass, counted as this run counts them."""

    workers: int = 0
    """How many worker processes read."""

    makes_workers: bool = True
    """Whether torch drew a seed for them when the pass began; workers that last are made once."""

    shards: int = 0
    """Among how many ranks the dataset shares its samples out by itself; 0 if it leaves that to us."""

    snapshot: dict[str, Any] | None = None
    """A state of the dataset itself, at `snapshot["done"]` units."""

    per_batch: int = 0
    """Samples that all shards together read for one batch of a stream; 0 where there are indices."""

    own_batch: int | None = None
    """Samples in one batch of this shard, where batches are made of samples."""

    starts: list[int] | None = None
    """Samples that each worker process had read of a stream where this run began to read batches."""

    started: int = 0
    """How many all of them had read there."""

    by_worker: list[int] | None = None
    """How many each has read in all."""

    seen: list[Any] | None = None
    """A few values of the last batch of a stream."""

    is_finished: bool = False
    """Whether the sampler was left as it is at the end of the pass, since the whole order had been handed out."""

    now: list[dict[str, Any]] | None = None
    """What samplers and datasets were in the middle of the pass, for what comes after it."""

    def to_state(self) -> dict[str, Any]:
        """Return it as plain values and tensors."""
        check = None if self.check is None else {"at": self.check.at, "rows": self.check.rows, "is": self.check.digest}
        return {**self.__dict__, "check": check}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Place:
        """Return what `to_state` was called on."""
        check = state["check"]
        return cls(**{**state, "check": None if check is None else Check(check["at"], check["rows"], check["is"])})


class Bookmark:
    """How far a prepared loader has come; the copies that `skip_first_batches` makes of it share it."""

    def __init__(self) -> None:
        self.iteration = 0
        self.ordinal = next(_ordinals)
        """Tells loaders of one run apart, so that they do not seed their batches alike."""
        self.pending: Place | None = None
        """Where the next pass continues."""
        self.place: Place | None = None
        """The pass that runs, or was broken off."""
        self.given = 0
        """Batches that this run of the pass has given."""
        self.finished = False
        """Whether the batch given last is the last of the pass."""
        self.feed: Feed | None = None
        self.trail: Trail | None = None
        self.snapshots: deque[dict[str, Any]] = deque()
        """States that the dataset had in this pass; it may read ahead of the loop."""
        self.padding: Padding | None = None
        self.steps_given = 0
        self.continues = False
        """Whether the pass began at a place that was restored."""
        self.loads = 0
        """How often a place was restored."""
        self.read_by = 0
        """The `id` of the loader that reads the pass: this one, or one that `skip_first_batches` made of it."""
        self.has_workers = False
        """Whether worker processes were made that last until the end of the run."""
        self.trains = False
        """Whether loops over the loader are known to train; see `data.borders`, as for the next three."""
        self.work = 0
        """How much had been trained in the run when the last batch was given."""
        self.work_before = 0
        """How much had been when the pass began."""
        self.left_idle = False
        """Whether the last pass was broken off, and nothing had been trained in it."""

    def open(self, place: Place, feed: Feed | None = None, trail: Trail | None = None) -> None:
        """Begin a pass, or go on with one, whose indices come from `feed`, or whose batches are noted in `trail`."""
        self.place, self.given, self.finished, self.pending = place, 0, False, None
        self.feed, self.trail = feed, trail

    def close(self) -> None:
        """End a pass that was read to its end."""
        self.place, self.given, self.finished = None, 0, False
        self.iteration += 1

    def now(self) -> tuple[int, Place | None, int]:
        """Return the pass to save or show, its place if it has begun, and the units of it that are done."""
        if self.pending is not None:
            return self.iteration, self.pending, self.pending.done
        place = self.place
        if place is None:
            return self.iteration, None, 0
        if self.finished:
            return self.iteration + 1, None, 0
        return self.iteration, place, place.done + self.given * place.per_step


def capture(nodes: Sequence[Any], baseline: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return what there is to keep of samplers and datasets. See [Note: drawing again].

    Args:
        nodes: The objects.
        baseline: Their `plain_values` when they were prepared.
    """
    found = []
    for number, node in enumerate(nodes):
        before = baseline[number] if baseline is not None and number < len(baseline) else {}
        # A dataset's own state says where it was left, not where a pass begins.
        if not isinstance(node, IterableDataset) and all(
            callable(getattr(node, name, None)) for name in ("state_dict", "load_state_dict")
        ):
            found.append({"own": node.state_dict()})
            continue
        values = plain_values(node)
        found.append(
            {
                "generators": {
                    name: state
                    for name, value in _attributes(node)
                    if (state := _generator_state(value)) is not None or (value is None and name == _GENERATOR)
                },
                "values": {
                    name: value
                    for name, value in values.items()
                    if name in _ALWAYS or (baseline is not None and before.get(name, value) != value)
                },
            }
        )
    return found


def put_back(
    nodes: Sequence[Any], states: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]] | None = None
) -> None:
    """Give samplers and datasets what `capture` returned of ones like them.

    Args:
        nodes: The objects.
        states: What was captured.
        baseline: Their `plain_values` when they were prepared, for values that had not changed.

    Raises:
        CheckpointError: If they are not like them.
    """
    if len(nodes) != len(states):
        raise CheckpointError(
            explain(
                f"The loader has {len(nodes)} samplers above each other, and {len(states)} when it was saved.",
                remedy="Make the loader as it was made for the save.",
            )
        )
    for number, (node, state) in enumerate(zip(nodes, states, strict=True)):
        if "own" in state:
            _load_own(node, state["own"])
            continue
        unchanged = {} if baseline is None else baseline[number]
        for name, value in {**unchanged, **state["values"]}.items():
            if hasattr(node, name):
                setattr(node, name, value)
        for name, value in state["generators"].items():
            generator = getattr(node, name, None)
            if generator is None and name == _GENERATOR and isinstance(value, torch.Tensor):
                # On several ranks samplers get a generator when they are prepared; the run had several.
                generator = torch.Generator()
                setattr(node, name, generator)
            if value is None:
                # It drew from the global one, since the run had one process; so it goes on.
                setattr(node, name, None)
            else:
                _set_generator(generator, value)


def _load_own(node: Any, state: Any) -> None:
    load = getattr(node, "load_state_dict", None)
    if not callable(load):
        raise CheckpointError(
            explain(
                f"{type(node).__name__} has no load_state_dict(), and the checkpoint holds a state for it.",
                remedy="Make the loader as it was made for the save.",
            )
        )
    load(state)


def plain_values(node: Any) -> dict[str, Any]:
    """Return the numbers and texts among an object's attributes."""
    return {name: value for name, value in _attributes(node) if type(value) in (int, float, str, bool)}


def _attributes(node: Any) -> list[tuple[str, Any]]:
    return list(getattr(node, "__dict__", {}).items())


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return None


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)


def opening(nodes: Sequence[Any], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the order of a pass that begins now is drawn from."""
    return {"random": Snapshot().states, "samplers": capture(nodes, baseline)}


def reopen(nodes: Sequence[Any], kept: dict[str, Any], baseline: Sequence[dict[str, Any]]) -> None:
    """Put back what `opening` returned; the caller puts the global generators back to where they are now."""
    put_back(nodes, kept["samplers"], baseline)
    Snapshot(kept["random"]).restore()
