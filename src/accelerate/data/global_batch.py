"""How a global batch size becomes batches and accumulation.

Owns the arithmetic and the sentence that tells about it. Never touches loaders, models or process groups: `prepare`
finds out the numbers, and carries the plan out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from ..core.errors import SettingError, UnsupportedCombination, explain


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, as `count` data shards share them: size = count * batch_size * accumulation."""

    size: int
    """Samples of all shards in one optimizer step."""

    batch_size: int
    """Samples in a batch of one shard."""

    accumulation: int
    """Batches each shard takes for one optimizer step."""

    count: int
    """Number of data shards; ranks that work on the same batch are one of them."""


def plan_global_batch(size: int, given_batch_size: int, count: int) -> GlobalBatch:
    """Share `size` samples out among `count` shards, in batches as large as the loader's allows.

    Args:
        size: Samples in one optimizer step.
        given_batch_size: The batch size of the loader as the user made it. It says how many samples fit into memory
            at once, so no batch is larger.
        count: Number of data shards.

    Raises:
        SettingError: (a `ValueError`) if `size` cannot be shared out evenly.
    """
    origin = f"global_batch_size={size} (from DataLoaderConfiguration)"
    share, over = divmod(size, count)
    if over:
        near = [multiple for multiple in (size - over, size - over + count) if multiple > 0]
        raise SettingError(
            explain(
                f"{origin} cannot be shared out evenly over {count} processes.",
                accepted=f"multiples of {count}; the nearest are {' and '.join(map(str, near))}"
                if len(near) > 1
                else f"multiples of {count}, from {near[0]} on",
                remedy=f"Pass one of these, or start a number of processes that divides {size}.",
            )
        )
    batch_size = _largest_divisor(share, given_batch_size)
    return GlobalBatch(size=size, batch_size=batch_size, accumulation=share // batch_size, count=count)


def check_combination(size: int, *, accumulation_steps: int, split_batches: bool) -> None:
    """Refuse settings that say the same thing in another way. Dispatched batches are fine: they are cut afterwards.

    Args:
        size: Samples in one optimizer step.
        accumulation_steps: `gradient_accumulation_steps` as the user gave it; 1 when they did not.
        split_batches: Whether the loader's batch size is that of all processes together.

    Raises:
        UnsupportedCombination: (a `ValueError`) if one of them is set.
    """
    origin = f"global_batch_size={size} (from DataLoaderConfiguration)"
    if accumulation_steps != 1:
        raise UnsupportedCombination(
            explain(
                f"{origin} decides how many batches are accumulated, and "
                f"gradient_accumulation_steps={accumulation_steps} is given too.",
                accepted="one of the two",
                remedy="Leave gradient_accumulation_steps out.",
            )
        )
    if split_batches:
        raise UnsupportedCombination(
            explain(
                f"{origin} and split_batches=True both say how many samples all processes together take: with "
                "split_batches it is the batch size of the loader.",
                accepted="one of the two",
                remedy="Leave split_batches out; the loader's batch size is then the most one process takes at once.",
            )
        )


def describe(plan: GlobalBatch, *, batches: int | None, lr_unit: str) -> str:
    """Return the line that a run prints when it starts.

    Args:
        plan: What was planned.
        batches: The length of the prepared loader: batches of one shard in an epoch, `None` when it has no length.
        lr_unit: What one step of the schedule stands for, such as `"optimizer step"`.
    """
    processes = f"{plan.count} process" + ("es" if plan.count > 1 else "")
    if batches is None:
        epoch = "an unknown number of optimizer steps"
    else:
        steps = -(-batches // plan.accumulation)
        epoch = f"{steps} optimizer step" + ("s" if steps != 1 else "")
    return (
        f"Global batch {plan.size} = {processes} x batch {plan.batch_size} x accumulation {plan.accumulation}; "
        f"{epoch} in an epoch; the learning rate counts in {lr_unit}s."
    )


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is not larger than `limit`."""
    found = 1
    for small in range(1, min(isqrt(number), limit) + 1):
        large, rest = divmod(number, small)
        if not rest:
            found = max(found, large if large <= limit else small)
    return found
