"""What rank 0 and the other ranks of a dispatched loader tell each other besides batches.

Owns the words of the protocol and the errors that come of them. See [Note: the protocol] in `data.dispatcher`.

[Note: breaking out]
A loop that is broken off leaves the pass open. The next pass over the same loader closes it first: what would have
come next, a buffer or an announcement, then says so and carries the number of steps taken. A rank that took more or
fewer finds something else than it waits for, and raises in place of hanging.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from ..core.errors import AccelerateError, explain
from ..runtime.state import Runtime
from .cutting import Shares
from .packing import Layout

SAME, ANNOUNCED, LAST, FAILED, CLOSED = range(5)
"""What a header says comes next: the first three after a batch, the others without one."""


class DispatchError(AccelerateError, RuntimeError):
    """Rank 0 could not read or send the next batch: raised on all ranks, at the same step.

    Also raised on a rank that left a loop at another step than rank 0.
    """


@dataclass(frozen=True)
class Announcement:
    """What the messages to come look like."""

    layouts: list[Layout]
    """By rank, on the way to other ranks; by data shard on rank 0."""

    shares: Shares


@dataclass(frozen=True)
class Failure:
    """An error on rank 0, on its way to the others."""

    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Take the text of an error, with where it was raised."""
        return cls("".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Closed:
    """A pass that was broken off on rank 0, on its way to the others."""

    step: int


@dataclass
class Pass:
    """How far a pass has come. See [Note: breaking out]."""

    next_comes: int = LAST
    size: int = 0
    step: int = 0

    def advance(self, next_comes: int, size: int) -> None:
        """Count a step, whose message had `size` bytes."""
        self.next_comes, self.size = next_comes, size
        self.step += 1


def announce(runtime: Runtime, coming: Announcement, shard_of: list[int]) -> Exception | None:
    """Tell all ranks the layouts of their messages; return why nothing could be told.

    Args:
        runtime: This process.
        coming: With the layouts by data shard.
        shard_of: For each rank, its data shard.
    """
    try:
        runtime.collectives.broadcast_object(Announcement([coming.layouts[shard] for shard in shard_of], coming.shares))
    except Exception as error:  # noqa: BLE001 - a leaf that cannot be pickled may raise anything, before anything is sent
        return error
    return None


def out_of_step(rank: int, mine: int, theirs: int | None) -> DispatchError:
    """Return the error of a rank that took another number of steps than rank 0; `None` where rank 0 goes on."""
    other = "more steps" if theirs is None else f"{theirs} steps"
    return DispatchError(
        explain(
            f"Rank {rank} left the loop over a dispatched loader after {mine} steps, or is still in it, and rank 0 took "
            f"{other} (dispatch_batches is on).",
            accepted="loops that all ranks leave at the same step",
            remedy="Decide on all ranks alike, with accelerator.set_trigger and check_trigger for example, or let each "
            "rank read for itself with dispatch_batches=False.",
        )
    )


def dispatch_error(failure: Failure) -> DispatchError:
    """Return what every rank raises for an error of rank 0."""
    return DispatchError(
        explain(
            "Rank 0 could not read or send the next batch for all ranks (dispatch_batches is on). What it raised:\n"
            + failure.text.rstrip(),
            remedy="Correct the dataset or collate_fn, or let each rank read for itself with dispatch_batches=False.",
        )
    )
