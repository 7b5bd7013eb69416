"""One read of the dispatcher, cut into a piece for each data shard.

Owns joining, slicing and topping up. Never talks to other ranks.

A tensor with dimensions has rows, and so has a list of other things, or a tuple of texts, that is as long as the
batch: that is how collate functions return names or raw records. Everything else (numbers, texts, tensors without
dimensions) belongs to the batch as a whole and goes to every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from typing import Any

import torch

from ..core.errors import SettingError, explain
from ..core.tree import honor_type, is_namedtuple, rebuild_mapping, tree_leaves


def count_rows(batch: Any) -> int | None:
    """Return the size of the first tensor with rows; `None` if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else None
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return None


class Cutter:
    """Cuts the reads of one pass.

    Args:
        count: Number of data shards.
        split: Whether a read is one batch, or one for each shard.
        drop_last: Leave out rows that cannot be shared evenly, in place of topping them up.
        slice_fn: The user's own slicing.
    """

    def __init__(
        self,
        *,
        count: int,
        split: bool,
        drop_last: bool,
        slice_fn: Callable[..., Any] | None,
    ) -> None:
        self.count = count
        self.split = split
        self.drop_last = drop_last
        self.slice_fn = slice_fn
        self._opening: list[tuple[Any, int]] = []

    def remember_opening(self, batches: list[Any]) -> None:
        """Keep the first rows of a pass's first read; short reads are topped up with them.

        They stay apart until they are needed: batches that were padded to different widths cannot be joined.
        """
        if self._opening or self.drop_last or self.count == 1:
            return
        missing = self.count - 1
        for batch in batches:
            rows = self._rows(batch)
            kept = list(range(min(rows, missing)))
            if kept:
                self._opening.append((_map_rows(batch, rows, partial(_take, places=kept)), len(kept)))
                missing -= len(kept)

    def cut(self, batches: list[Any]) -> tuple[list[Any], int]:
        """Return a piece for each shard, and the number of rows before topping up.

        Returns:
            No pieces if there are too few rows for all shards and rows are dropped.

        Raises:
            SettingError: (a `ValueError`) if the batch has no rows, or tensors of different numbers of rows.
        """
        if self.slice_fn is None and not self.split and len(batches) == self.count:
            sizes = [self._rows(batch) for batch in batches]
            if len(set(sizes)) == 1:  # the common case: each shard's piece is one batch as it was read
                return batches, sum(sizes)
        whole, rows = self._join(batches)
        share = rows // self.count if self.drop_last else -(-rows // self.count)
        if share == 0:
            return [], rows
        if share * self.count > rows:
            whole = self._top_up(whole, rows, share * self.count)
        return [self._piece(whole, index, share) for index in range(self.count)], rows

    def _rows(self, batch: Any) -> int:
        rows = count_rows(batch)
        if rows is None:
            raise SettingError(
                explain(
                    "dispatch_batches=True (the default for iterable datasets) slices batches by rows, and this batch of "
                    f"type {type(batch).__name__} (from the loader) has no tensor with rows.",
                    accepted="tensors, and lists, tuples and mappings that hold at least one",
                    remedy="Return tensors from collate_fn, or pass dispatch_batches=False.",
                )
            )
        if self.slice_fn is None and not isinstance(
            batch, torch.Tensor
        ):  # the user's own slicing knows what to do with the others
            _check_same_rows(batch, rows)
        return rows

    def _join(self, batches: list[Any]) -> tuple[Any, int]:
        sizes = [self._rows(batch) for batch in batches]
        return _join_nodes(batches, sizes), sum(sizes)

    def _piece(self, whole: Any, index: int, share: int) -> Any:
        mine = slice(index * share, (index + 1) * share)
        if self.slice_fn is not None:
            return self.slice_fn(whole, mine, process_index=index, num_processes=self.count)
        return _map_rows(whole, share * self.count, lambda data: data[mine])

    def _top_up(self, whole: Any, rows: int, target: int) -> Any:
        parts, sizes, missing = [whole], [rows], target - rows
        for part, size in cycle(self._opening):  # not empty: rows were read, and none are dropped
            kept = list(range(min(size, missing)))
            parts.append(_map_rows(part, size, partial(_take, places=kept)))
            sizes.append(len(kept))
            missing -= len(kept)
            if not missing:
                break
        return _join_nodes(parts, sizes)


def _take(data: Any, places: list[int]) -> Any:
    return (
        data[torch.tensor(places, device=data.device)] if isinstance(data, torch.Tensor) else [data[i] for i in places]
    )


def _check_same_rows(batch: Any, rows: int) -> None:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] != rows:
            raise SettingError(
                explain(
                    f"A batch cannot be sliced by rows: its first tensor has {rows}, another one has the shape "
                    f"{tuple(leaf.shape)} (from the loader, with dispatch_batches on).",
                    accepted="tensors whose dimension 0 is the sample, or that have no dimension",
                    remedy="Pass slice_fn_for_dispatch with your own slicing, or dispatch_batches=False.",
                )
            )


def _has_rows(data: Any, rows: int) -> bool:
    if isinstance(data, torch.Tensor):
        return data.dim() > 0
    if not isinstance(data, (list, tuple)) or is_namedtuple(data) or len(data) != rows:
        return False
    if isinstance(data, tuple):
        return all(isinstance(item, (str, bytes)) for item in data)
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(data))


def _join_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    if any(tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
        raise SettingError(
            explain(
                "A step has to be cut from more than one batch, and their tensors have different shapes: "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} (from the loader, with dispatch_batches on).",
                accepted="tensors that differ in dimension 0 only, or batches of the same size in every step",
                remedy="Pad all batches to one width, leave out the last batches with drop_last=True, or pass "
                "dispatch_batches=False.",
            )
        )
    return torch.cat(tensors)


def _join_nodes(nodes: list[Any], sizes: list[int]) -> Any:
    first = nodes[0]
    if len(nodes) == 1:
        return first
    if all(_has_rows(node, rows) for node, rows in zip(nodes, sizes, strict=True)):
        if isinstance(first, torch.Tensor):
            return _join_tensors(nodes)
        return type(first)([item for node in nodes for item in node])
    if isinstance(first, (list, tuple)):
        return honor_type(
            first,
            [_join_nodes(list(items), sizes) for items in zip(*nodes, strict=True)],
        )
    if isinstance(first, Mapping):
        return rebuild_mapping(
            first,
            {key: _join_nodes([node[key] for node in nodes], sizes) for key in first},
        )
    return first


def _map_rows(data: Any, rows: int, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to everything in `data` that has rows."""
    if _has_rows(data, rows):
        found = function(data)
        return found if isinstance(data, torch.Tensor) else type(data)(found)
    if isinstance(data, (list, tuple)):
        return honor_type(data, [_map_rows(item, rows, function) for item in data])
    if isinstance(data, Mapping):
        return rebuild_mapping(data, {key: _map_rows(item, rows, function) for key, item in data.items()})
    return data
