"""One read of the dispatcher, cut into a piece for each data shard.

Owns joining, slicing and topping up, and who gets how many rows. Never talks to other ranks.

A tensor with dimensions has rows, and so has a list of other things, or a tuple of texts, that is as long as the
batch: that is how collate functions return names or raw records. Everything else (numbers, texts, tensors without
dimensions) belongs to the batch as a whole and goes to every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from operator import itemgetter
from typing import Any

import torch

from ..core.errors import SettingError, explain
from ..core.tree import honor_type, is_namedtuple, rebuild_mapping, tree_leaves
from .shards import Padding


def count_rows(batch: Any) -> int | None:
    """Return the size of the first tensor with rows; `None` if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.size(0) if batch.dim() else None  # a nested tensor has no shape
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.size(0)
    return None


@dataclass(frozen=True)
class Shares:
    """How many rows of a step each data shard gets, and how many were handed out in all."""

    rows: tuple[int, ...]
    """-1 for a piece that has no rows, or where the user's own slicing gave none."""

    handed_out: int

    def padding(self, observed: int, full: int | None = None) -> Padding | None:
        """Return what is padding where `observed` of the rows handed out are samples, and come first.

        Args:
            observed: Rows that were read.
            full: How many each shard gets in a full step, where that has to be known.

        Returns:
            `None` if all shards have the same number of rows, `full` where given, all of them samples. Where the user's
            own slicing does not let one tell, samples are -1 each.
        """
        rows = self.rows
        if observed >= self.handed_out:
            alike = len(set(rows)) == 1 and full in (None, rows[0])
            return None if alike or min(rows) < 0 else Padding(rows, rows)
        if sum(rows) != self.handed_out:
            return Padding(rows, (-1,) * len(rows))
        starts = [0, *accumulate(rows[:-1])]
        real = tuple([min(max(0, observed - start), size) for start, size in zip(starts, rows, strict=True)])
        return Padding(rows, real)


@dataclass(frozen=True)
class Cut:
    """A step: a piece for each data shard."""

    pieces: list[Any]
    shares: Shares
    observed: int
    """Rows that were read for it: the first ones of what was handed out, unless rows are dropped."""


class Cutter:
    """Cuts the reads of one pass.

    Args:
        count: Number of data shards.
        split: Whether a read is one batch, or one for each shard.
        drop_last: Leave out rows that cannot be shared evenly, in place of topping them up.
        slice_fn: The user's own slicing.
        spread: Share rows that do not suffice for all out as evenly as they go, in place of topping them up.
    """

    def __init__(
        self,
        *,
        count: int,
        split: bool,
        drop_last: bool,
        slice_fn: Callable[..., Any] | None,
        spread: bool = False,
    ) -> None:
        self.spread = spread
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

    def cut(self, batches: list[Any]) -> Cut | None:
        """Return a piece for each shard; `None` if there are too few rows for all shards and rows are dropped.

        Batches are joined and cut evenly. Where they cannot be joined, each is one shard's piece, as it was read.

        Raises:
            SettingError: (a `ValueError`) if a batch has no rows, or tensors of different numbers of rows, or if
                batches that cannot be joined have to be sliced by the user's own function.
        """
        sizes = [self._rows(batch) for batch in batches]
        as_read = self.slice_fn is None and not self.split
        # One batch for each shard, all of one size, is the common case. Of other sizes, cutting evenly would drop rows.
        if as_read and len(batches) == self.count and min(sizes) and (len(set(sizes)) == 1 or self.drop_last):
            return Cut(batches, Shares(tuple(sizes), sum(sizes)), sum(sizes))
        try:
            return self._cut_evenly(batches, sizes)
        except _UnjoinableError:
            if not as_read:
                raise
            return self._hand_out(batches, sizes)

    def _cut_evenly(self, batches: list[Any], sizes: list[int]) -> Cut | None:
        whole, rows = _join_nodes(batches, sizes), sum(sizes)
        share = rows // self.count if self.drop_last else -(-rows // self.count)
        if share == 0:
            return None
        total = share * self.count
        if total > rows and self.spread and self.slice_fn is None:
            return self._spread_out(whole, rows)
        if total > rows:
            whole = self._top_up(whole, rows, total)
        pieces = [self._piece(whole, index, share) for index in range(self.count)]
        if self.slice_fn is None:
            return Cut(pieces, Shares((share,) * self.count, total), rows)
        return Cut(pieces, Shares(tuple([count_rows(piece) or -1 for piece in pieces]), total), rows)

    def _spread_out(self, whole: Any, rows: int) -> Cut:
        share, more = divmod(rows, self.count)
        sizes = [max(1, share + (index < more)) for index in range(self.count)]
        if sum(sizes) > rows:  # fewer rows than shards: those that come too late get one that is padding
            whole = self._top_up(whole, rows, sum(sizes))
        starts = [0, *accumulate(sizes)]
        mine = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        pieces = [_map_rows(whole, sum(sizes), itemgetter(part)) for part in mine]
        return Cut(pieces, Shares(tuple(sizes), sum(sizes)), rows)

    def _hand_out(self, batches: list[Any], sizes: list[int]) -> Cut | None:
        """Give each shard a whole batch, of whatever size; where there are too few, copies of the first one."""
        given = [(batch, rows) for batch, rows in zip(batches, sizes, strict=True) if rows]
        observed = sum(sizes)
        if len(given) < self.count and (self.drop_last or not given):
            return None
        given += given[:1] * (self.count - len(given))
        rows = tuple([rows for _, rows in given])
        return Cut([batch for batch, _ in given], Shares(rows, sum(rows)), observed)

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

    def _piece(self, whole: Any, index: int, share: int) -> Any:
        mine = slice(index * share, (index + 1) * share)
        if self.slice_fn is not None:
            return self.slice_fn(whole, mine, process_index=index, num_processes=self.count)
        return _map_rows(whole, share * self.count, lambda data: data[mine])

    def _top_up(self, whole: Any, rows: int, target: int) -> Any:
        try:
            return _extend(whole, rows, target, self._opening)
        except _UnjoinableError:  # the pass began with batches of another width
            return _extend(whole, rows, target, [(whole, rows)])


def _extend(whole: Any, rows: int, target: int, filling: list[tuple[Any, int]]) -> Any:
    parts, sizes, missing = [whole], [rows], target - rows
    for part, size in cycle(filling):  # not empty: rows were read, and none are dropped
        kept = list(range(min(size, missing)))
        parts.append(_map_rows(part, size, partial(_take, places=kept)))
        sizes.append(len(kept))
        missing -= len(kept)
        if not missing:
            break
    return _join_nodes(parts, sizes)


class _UnjoinableError(SettingError):
    """Batches differ in more than their number of rows."""


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


def _join_nodes(nodes: list[Any], sizes: list[int]) -> Any:
    first = nodes[0]
    if len(nodes) == 1:
        return first
    with_rows = [_has_rows(node, rows) for node, rows in zip(nodes, sizes, strict=True)]
    if all(with_rows):
        if not isinstance(first, torch.Tensor):
            return type(first)([item for node in nodes for item in node])
        if any(tensor.shape[1:] != first.shape[1:] for tensor in nodes):
            raise _unjoinable(nodes)
        return torch.cat(nodes)
    if isinstance(first, (list, tuple)):
        if not all(isinstance(node, (list, tuple)) and len(node) == len(first) for node in nodes):
            raise _unjoinable(nodes)
        return honor_type(first, [_join_nodes(list(items), sizes) for items in zip(*nodes, strict=True)])
    if isinstance(first, Mapping):
        if not all(isinstance(node, Mapping) and node.keys() == first.keys() for node in nodes):
            raise _unjoinable(nodes)
        return rebuild_mapping(first, {key: _join_nodes([node[key] for node in nodes], sizes) for key in first})
    if any(with_rows):
        raise _unjoinable(nodes)
    return first


def _unjoinable(nodes: list[Any]) -> _UnjoinableError:
    described = [str(tuple(node.shape)) if isinstance(node, torch.Tensor) else type(node).__name__ for node in nodes]
    return _UnjoinableError(
        explain(
            "A step has to be cut from more than one batch by slice_fn_for_dispatch, and these cannot be joined, as they "
            f"differ in more than the number of rows: {', '.join(described)} (from the loader).",
            accepted="tensors that differ in dimension 0 only, or batches of the same size in every step",
            remedy="Pad all batches to one width, leave out the last batches with drop_last=True, or pass "
            "dispatch_batches=False.",
        )
    )


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
