"""Means that were repeated to the length of a full batch, as metrics know them in the short batch that ends a pass.

Owns how such a mean is told from results with several entries for each row. What is cut of it is in `session.metrics`.

[Note: a mean that was spread]
`loss.repeat(batch_size)` with the configured batch size is longer than a short batch. It counts once for each real row:
so the mean over an epoch weighs every sample alike. It is told by its length and its one value, but `k` entries for each
row may have that length too, and may all be equal. What the same call brought in the full steps of the pass tells them
apart: the mean was as long there, and the entries were more. Where there were no full steps the entries are meant, and
nothing is lost if it was a mean: there is no other step to weigh it against. Where a call brought now the one and now
the other it is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..core.errors import SettingError, explain

_CALLS = 64
"""From which call of a batch on they are remembered together, or what never ends would be remembered for ever."""

Seen = defaultdict[int, set[int]]
"""For each tensor of a call, by its number: how many entries for each row it had in full steps of the pass."""


@dataclass
class _Pass:
    """What the calls in the batches of a pass brought, by the number of the call in its batch."""

    began: int
    batch: int = -1
    call: int = 0
    calls: defaultdict[int, Seen] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))


_passes: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()


def seen_by_call(loader: Any) -> Seen:
    """Count a call in the loader's batch; return what calls of this number brought in batches before, to be added to."""
    began: int | None = getattr(loader, "pass_began", None)
    if began is None:  # outside of a loop, or over a loader that is none of ours
        return defaultdict(set)
    found = _passes.get(loader)
    if found is None or found.began != began:
        found = _passes[loader] = _Pass(began)
    found.call = min(found.call + 1, _CALLS) if found.batch == loader.steps_given else 0
    found.batch = loader.steps_given
    return found.calls[found.call]


def may_be_spread(leaf: torch.Tensor) -> bool:
    """Tell whether a tensor is of the kind that spread means are."""
    return leaf.dim() == 1 and leaf.is_floating_point()


def note_full(seen: set[int], full: int, leaf: torch.Tensor, lengths: Sequence[int]) -> None:
    """Take note of a tensor in a full step.

    Args:
        seen: What to add to.
        full: Samples in a batch.
        leaf: The tensor.
        lengths: How long it is on each rank.
    """
    if may_be_spread(leaf) and lengths.count(lengths[0]) == len(lengths) and lengths[0] % full == 0:
        seen.add(lengths[0] // full)


def times_spread(rows: Sequence[int], full: int, pieces: Sequence[torch.Tensor], seen: set[int]) -> int | None:
    """Return how often each row counts in a mean that was spread; `None` if this is no such mean.

    Args:
        rows: Samples in the batch of each rank, of which at least one is short.
        full: Samples in a full one.
        pieces: What each rank has.
        seen: How many entries for each row there were in full steps.

    Raises:
        SettingError: (a `ValueError`) if it may be either. See [Note: a mean that was spread].
    """
    length = len(pieces[0])
    times, rest = divmod(length, full)  # several, where the script repeats by a batch size that is split
    if rest or not times or any(len(piece) != length for piece in pieces):
        return None
    if not all(may_be_spread(piece) and _is_one_value(piece) for piece in pieces):
        return None
    if length % rows[0] or any(other != rows[0] for other in rows):
        return times
    if {times, length // rows[0]} <= seen:
        raise _either(rows[0], full, length)
    return times if times in seen else None


def _is_one_value(piece: torch.Tensor) -> bool:
    return bool((piece == piece[0]).all() or piece.isnan().all())


def _either(rows: int, full: int, length: int) -> SettingError:
    return SettingError(
        explain(
            f"gather_for_metrics got {length} equal numbers for a batch of {rows} rows, where full ones have {full}: a mean "
            f"repeated to the length of a full batch, or {length // rows} numbers for each row. In the steps before, this "
            "call brought now the one and now the other.",
            accepted="in each step the same calls in the same order; means without dimensions; numbers of shape (rows, k)",
            remedy="Pass the mean itself in place of mean.repeat(batch_size), or do not flatten the numbers.",
        )
    )
