"""How many samples of the dataset the batch stands for that a loader has just given, and loops that would miscount them."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

from ..core.errors import SettingError, explain


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


def batch_of(loader: Any) -> tuple[Any, int] | None:
    """Return what tells the batch a loader has just given from all others; `None` if it does not count them."""
    given = getattr(loader, "steps_given", None)
    # A reference, since another loader may get the identity of one that is gone.
    return None if given is None else (weakref.ref(loader), given)


def refuse_loop(plan: Any, number: int) -> NoReturn:
    """Refuse an optimizer step after fewer or more batches than the global batch has.

    Raises:
        SettingError: (a `ValueError`) always.
    """
    raise SettingError(
        explain(
            f"backward() was called outside of accumulate() in a loop over a loader with global_batch_size={plan.size}, "
            f"of which this run takes {plan.accumulation} batches of {plan.batch_size} on each of {plan.count} "
            f"process{'es' if plan.count > 1 else ''}. The optimizer would step after {number}.",
            accepted="windows of that many batches, as accumulate() counts them",
            remedy="Put what the loop does with a batch into `with accelerator.accumulate(model):`, "
            "optimizer.zero_grad() last.",
        )
    )


def refuse_parts(plan: Any) -> NoReturn:
    """Refuse parts of a batch that each count as one.

    Raises:
        SettingError: (a `ValueError`) always.
    """
    raise SettingError(
        explain(
            "accumulate() was called twice for the same models in one batch of a loader with "
            f"global_batch_size={plan.size}, which decides that a window has {plan.accumulation} batches of "
            f"{plan.batch_size}.",
            accepted="one call for each batch of the loader, or one with num_steps=...",
            remedy="Make the loader with a smaller batch_size, so that a batch fits into memory at once.",
        )
    )
