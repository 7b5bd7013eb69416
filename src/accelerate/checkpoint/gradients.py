"""The windows of accumulation that are open when a run is saved, with the gradients accumulated so far.

Owns one state for each rank, since gradients differ between ranks until a window ends; and what becomes of them when
another number of ranks goes on. What the state of a window means is explained in `stepping.window`, whose names it uses.

[Note: other ranks]
A run that goes on with other ranks cannot give each its own gradients back. Rank 0 takes the sum of all, brought to one
reference, and the others begin with none: what counts is the mean over ranks at the end of the window. Where batches
count alike, the sum over m ranks is multiplied by n / m, so that its mean over n ranks is what it was over m. Where
samples or items are counted it is not: the reference is a mean over ranks too, and changes with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import explain
from . import layout
from .files import File
from .train_state import has_state, plan_state, read_state


def plan_windows(rank: int, windows: Any) -> list[File]:
    """Return the files of the windows of `rank`: none where no window is open. Called on all ranks."""
    return [] if windows is None else plan_state(layout.windows_stem(rank), windows)


def read_windows(folder: Path, rank: int, world_size: int, saved_ranks: int | None) -> list[dict[str, Any]] | None:
    """Read the windows that `rank` goes on with; `None` where none were saved. Called on all ranks.

    Args:
        folder: The checkpoint.
        rank: Who goes on.
        world_size: With how many ranks.
        saved_ranks: How many have saved; `None` if that is not known, as in checkpoints of Accelerate 1.x.

    Raises:
        MissingFile: If the windows of some ranks are there, and those of others are not.
    """
    needed = range(saved_ranks or 0) if world_size != saved_ranks else [rank]
    lacking = [other for other in needed if not has_state(folder, layout.windows_stem(other))]
    if lacking and not any(has_state(folder, layout.windows_stem(other)) for other in range(saved_ranks or 0)):
        return None
    if lacking:
        raise layout.MissingFile(
            explain(
                f"{folder} was saved in the middle of a window of accumulation, and the gradients of rank {lacking[0]} "
                "are not there.",
                remedy="Continue with as many ranks as saved, or copy the files of all nodes into the folder, and pass "
                "verify='off' to load_state, since each node's manifest knows its own files.",
            )
        )
    states = [read_state(folder, layout.windows_stem(other)) for other in needed]
    if not states:
        return None
    return states[0] if world_size == saved_ranks else hand_over(states, rank, world_size)


def hand_over(states: Sequence[list[dict[str, Any]]], rank: int, world_size: int) -> list[dict[str, Any]]:
    """Return the windows that `rank` of `world_size` goes on with, where other ranks saved. See [Note: other ranks]."""
    found = []
    for saved in zip(*states, strict=True):
        window = {**saved[0], "is_moved": True}
        references = [other["reference"] for other in saved if other["reference"] is not None]
        window["reference"] = references[0] if references else None
        window["own"] = sum(other["own"] for other in saved) if rank == 0 else 0
        if rank != 0:
            window["gradients"] = {}
        elif references:
            factors = [(other["reference"] or 0.0) / references[0] for other in saved]
            if window["measure"] == "batches":
                factors = [factor * world_size / len(saved) for factor in factors]
            window["gradients"] = _sum([other["gradients"] for other in saved], factors)
        found.append(window)
    return found


def _sum(gradients: Sequence[Mapping[str, Mapping[str, Any]]], factors: Sequence[float]) -> dict[str, dict[str, Any]]:
    total: dict[str, dict[str, Any]] = {}
    for owners, factor in zip(gradients, factors, strict=True):
        for owner, named in owners.items():
            kept = total.setdefault(owner, {})
            for name, gradient in named.items():
                kept[name] = _add(kept.get(name), gradient, factor)
    return total


def _add(before: Any, gradient: Any, factor: float) -> Any:
    if isinstance(gradient, torch.Tensor):
        return gradient * factor if before is None else before + gradient * factor
    values = gradient["values"] * factor  # a sparse one: rows are joined, which adds them
    if before is None:
        return {**gradient, "values": values}
    joined = torch.sparse_coo_tensor(
        torch.cat([before["indices"], gradient["indices"]], dim=1),
        torch.cat([before["values"], values]),
        gradient["size"],
        check_invariants=True,
    ).coalesce()
    return {"indices": joined.indices(), "values": joined.values(), "size": gradient["size"]}
