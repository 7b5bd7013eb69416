"""Where a batch stands in its window of accumulation, and how much its loss counts.

Owns the arithmetic. Never touches tensors, models, loaders or process groups.

[Note: one sum over one number]
At any time the gradients a rank has accumulated in a window are a sum of `units * gradient`, over one number, the
reference. A batch's units are 1 where batches count alike, its real samples where a global batch size is kept, its
items where `backward(loss, num_items=n)` was called. With the loss a mean over the units, the loss is divided by
`reference / units`. The right reference is the mean over ranks of all units of the window: then the mean over ranks of
the gradients is that of one batch which holds everything. It is known when the window's last batch has come. Until
then a guess serves, and if it was wrong, what has been accumulated is multiplied by `guess / right` before the last
backward adds to it. Where the guess was right nothing is multiplied, and the numbers are those of the plain loop, bit
for bit.
"""

from __future__ import annotations

from typing import NamedTuple

from ..runtime.accumulation import plan_sync


class Place(NamedTuple):
    """Where the batch that came last stands."""

    step: int = 0
    """The counter that checkpoints keep: batches since the last end of a loader."""

    number: int = 0
    """Which batch of its window it is, from 1 on; 0 before there was one."""

    length: int = 1
    """How many batches the window will have, as far as is known."""

    is_last: bool = True
    """Whether it ends its window."""


def next_place(before: Place, num_steps: int, *, ends: bool, ahead: int | None) -> Place:
    """Return the place of the batch that follows `before`.

    Args:
        before: The batch that came last.
        num_steps: Length of a full window.
        ends: Whether the new batch ends its window early, as a loader's last one does.
        ahead: How many batches follow it until one does that; `None` if unknown, or if none will.
    """
    step, is_last = plan_sync(before.step, num_steps, end_of_dataloader=ends)
    if not before.is_last:
        return Place(step, before.number + 1, before.length, is_last)
    left = num_steps - before.step % num_steps
    return Place(step, 1, left if ahead is None else min(left, ahead + 1), is_last)


class Share(NamedTuple):
    """How one loss joins the gradients of its window. See [Note: one sum over one number]."""

    reference: float | None
    """The number the gradients are a sum over afterwards; `None` while there are none."""

    divisor: float | None
    """By what to divide the loss; `None` if it counts for nothing."""

    rescale: float = 1.0
    """By what to multiply the gradients that are there already, before."""


def share_of(units: float, reference: float | None, target: float) -> Share:
    """Return how a loss joins.

    Args:
        units: How much its batch counts.
        reference: The number the gradients are a sum over now; `None` if there are none.
        target: The number they are to be a sum over.
    """
    if not target:  # nobody has had anything yet
        return Share(reference, None)
    rescale = 1.0 if reference is None or reference == target else reference / target
    return Share(target, target / units if units else None, rescale)


def units_of_step(shards: int, filled: int, number: int, num_steps: int) -> int:
    """Count the optimizer steps one process would have taken over the samples of one optimizer step of all.

    Args:
        shards: Number of data shards.
        filled: How many of them had a real sample in the last batch of the window.
        number: Batches of the window.
        num_steps: Length of a full window.
    """
    return max(1, -(-((number - 1) * shards + filled) // num_steps))
