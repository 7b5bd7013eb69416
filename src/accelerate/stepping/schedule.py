"""How long a schedule is, and whether that fits what its steps are.

Owns reading the length off schedulers of torch and of transformers, and comparing it with a loader. Never steps
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any


def length_of(scheduler: Any) -> int | None:
    """Return after how many steps a schedule is over, or has its last change; `None` if it does not say."""
    stages = getattr(scheduler, "_schedulers", None)
    if stages:  # one after the other, or all at once
        lengths = [length for stage in stages if (length := length_of(stage)) is not None]
        changes = getattr(scheduler, "_milestones", None)
        if changes:
            last = length_of(stages[-1])
            return None if last is None else changes[-1] + last
        return max(lengths, default=None)
    for name in ("total_steps", "T_max", "total_iters"):
        if type(value := getattr(scheduler, name, None)) is int:
            return value
    milestones = getattr(scheduler, "milestones", None)
    if milestones:
        return max(milestones)
    return _steps_of_partials(scheduler)


def end_of(scheduler: Any, *, raises: bool = False) -> int | None:
    """Return after how many steps a schedule has no rates left; `None` if it does not say, or goes on with its last.

    Args:
        scheduler: The schedule.
        raises: Count only ends after which one more step raises, as `OneCycleLR` does.
    """
    stages, changes = getattr(scheduler, "_schedulers", None), getattr(scheduler, "_milestones", None)
    if stages and changes:  # one after the other
        last = end_of(stages[-1], raises=raises)
        return None if last is None else changes[-1] + last
    if stages:  # all at once
        return min((end for stage in stages if (end := end_of(stage, raises=raises)) is not None), default=None)
    for name in ("total_steps",) if raises else ("total_steps", "T_max"):
        if type(value := getattr(scheduler, name, None)) is int:
            return value
    return None if raises else _steps_of_partials(scheduler)


def steps_taken(scheduler: Any) -> int | None:
    """Return how many steps a schedule has taken; `None` if it does not say, as one of the user's own may not."""
    stages = getattr(scheduler, "_schedulers", None)
    if stages and not hasattr(scheduler, "last_epoch"):  # all at once
        return steps_taken(stages[0])
    taken = getattr(scheduler, "last_epoch", None)
    return taken if isinstance(taken, int) else None


def _steps_of_partials(scheduler: Any) -> int | None:
    # As transformers' schedules are made: LambdaLR over functools.partial(function, num_training_steps=...).
    found = [
        steps
        for function in getattr(scheduler, "lr_lambdas", None) or ()
        if isinstance(function, partial) and type(steps := function.keywords.get("num_training_steps")) is int
    ]
    return max(found, default=None)


@dataclass(frozen=True, slots=True)
class Pass:
    """Optimizer steps in one pass over a loader."""

    taken: int
    """As this run takes them."""

    alone: int
    """As a single process would take them."""

    also_right: frozenset[int] = frozenset()
    """Other numbers of which a schedule made for a single process may be a multiple."""


def pass_over(loader: Any, shards: int, num_steps: int, given_length: int | None = None) -> Pass | None:
    """Count the optimizer steps of a pass over a prepared loader; `None` if it has no length.

    Args:
        loader: The prepared loader.
        shards: Number of data shards.
        num_steps: Length of a window of accumulation.
        given_length: The length it had before it was prepared, if known.
    """
    batches = length_of_loader(loader)
    if not batches:
        return None
    total, samples = _ask(lambda: loader.total_batch_size), _ask(lambda: loader.total_dataset_length)
    alone = given_length or (-(-samples // (total // shards)) if total and samples and total >= shards else None)
    alone = alone or batches * shards
    taken = -(-batches // num_steps)
    right = {alone, alone // num_steps, taken * shards, (batches * shards) // num_steps} - {0}
    return Pass(taken, -(-alone // num_steps), frozenset(right))


def length_of_loader(loader: Any) -> int | None:
    """Return the number of batches of a loader; `None` if it has no length."""
    return _ask(lambda: len(loader))


def _ask(question: Any) -> int | None:
    try:
        return question()
    except (TypeError, ValueError, AttributeError, NotImplementedError):  # how loaders say that they do not know
        return None


def fits_taken_steps(length: int, one_pass: Pass) -> bool:
    """Tell whether a schedule of this length was made for the steps this run takes, and not for a single process."""
    if one_pass.taken < 2 or length < one_pass.taken or one_pass.taken == one_pass.alone:
        return False
    return not length % one_pass.taken and all(length % right for right in {one_pass.alone, *one_pass.also_right})
