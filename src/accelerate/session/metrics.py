"""Gather results of all ranks: each sample of the dataset once, in order, without what padded a step.

Owns which loader results belong to, and what of each rank's part is kept. What is padding comes from the loader
(`Padding` in `data.shards`); how ranks talk is in `collectives`.

[Note: what can be cut]
In a step with padding the padded rows are the last ones of a rank's batch. So a tensor, or a list of objects, with
`k` entries for each row keeps `k` times as many as the rank has real rows; `k` is the same on all ranks, or which
entry belongs to which row were a guess. Where no rank has real rows beside padded ones there is nothing to guess: all
of a rank's entries are kept, or none. A value without rows counts once for each rank that has a real row. A mean that
was spread over the configured batch size counts once for each real row, on one process too; see `session.spread_means`.
In other steps nothing is cut, and what ranks bring is joined by its length, whatever that is.

[Note: structure or one for each sample]
Tensors may be nested in any way: a container of them is a structure. What travels as objects is a list with one object
for each sample, and is not looked into. Where the one could be the other, it is refused: objects in a mapping, a tuple
of parts that have rows themselves, a list of tensors beside other things; and, in a step with padding, a list of as
many tensors as there are rows whose tensors do not have one row for each of them.

[Note: one record first]
Each rank first tells what it brings, in one record of a fixed size: whether it comes with tensors or objects, the
structure and dtypes, and the sizes. Tensors of which only sizes differ are padded to a common shape, and cut after;
where anything else differs all ranks know, and raise. The record costs one exchange of 128 bytes for each call.

[Note: who takes part]
A rank without a batch in this step has left the loop, and may wait in another collective. So where there is one, the
others talk point to point. They raise instead if that rank is missing in another loop than the one that is meant,
around it for example: what it had to bring is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from ..collectives import Collectives
from ..core.errors import DistributedOperationException, SettingError, WrongTypeError, explain
from ..core.tree import is_namedtuple, tree_leaves, tree_map
from ..data.agreement import settle_left
from ..data.dispatcher import shards_of_ranks
from ..data.shards import Padding
from ..runtime import ops, state
from ..runtime.accumulation import GradientState
from .spread_means import Seen, may_be_spread, note_full, seen_by_call, times_spread


def gather_for_metrics(
    gradient_state: GradientState,
    input_data: Any,
    use_gather_object: bool = False,
    *,
    pad_index: int = 0,
    dataloader: Any = None,
) -> Any:
    """Return the data of all ranks without padding. Collective among the ranks that have a batch in this step.

    Args:
        gradient_state: Knows the loaders being iterated.
        input_data: Nested tensors, or a list of objects, which travel pickled, with one entry for each sample.
        use_gather_object: Send a tensor's rows as objects too.
        pad_index: What fills tensors whose dimensions after the first differ between ranks.
        dataloader: The prepared loader whose batch the data comes from, where several are iterated at once.

    Raises:
        SettingError: (a `ValueError`) if it cannot be told what of the data is padding, or which loader it is from.
        WrongTypeError: (a `TypeError`) with several processes, for a mapping, or a tuple of parts with rows, that would
            have to travel as objects.
        DistributedOperationException: If ranks bring different structures, dtypes or numbers of dimensions.
        UnevenStepError: (a `RuntimeError`) if a rank has no batch in this step of another loop.
    """
    settle_left(gradient_state)
    active = [loader for loader in gradient_state.dataloader_references if loader is not None]
    if dataloader is not None and not any(loader is dataloader for loader in active):
        raise SettingError(
            explain(
                f"gather_for_metrics got dataloader={type(dataloader).__name__}, which is not being iterated: what was "
                "padding in its last batch is not known.",
                accepted="a loader that prepare() returned, inside a loop over it",
                remedy="Call it inside the loop, or leave dataloader= out: outside of loops nothing is cut.",
            )
        )
    leaves = list(tree_leaves(input_data))
    # Nothing at all counts as objects: another rank's objects must meet it in the same operation.
    as_objects = use_gather_object or not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    runtime = state.current_or_single()
    if runtime.process.world_size == 1:
        loader = next(reversed(active), None) if dataloader is None else dataloader
        return input_data if as_objects else _without_excess(loader, input_data, leaves)
    loader = choose_loader(active) if dataloader is None else dataloader
    step = step_of(loader, runtime.process.rank, runtime.process.world_size)
    talk = runtime.collectives
    if not as_objects:
        return _gather_tensors(talk, step, input_data, leaves, pad_index, seen_by_call(loader))
    kind = _kind_of_objects(input_data, by_wish=use_gather_object)
    _exchange(talk, step, kind)
    if kind != _OBJECTS:
        raise WrongTypeError(_no_rows_told(kind))
    return _gather_objects(talk, step, input_data)


# Which loader -----------------------------------------------------------------------------------------------------


def choose_loader(active: Sequence[Any]) -> Any:
    """Return the loader whose step is meant; `None` if none is iterated.

    Several at once are a loop inside a loop (evaluation inside training: the inner one is meant), or loops side by
    side, such as `zip(first, second)`; see `is_inside` of loaders.

    Args:
        active: The loaders being iterated, outermost first.

    Raises:
        SettingError: (a `ValueError`) for loops side by side whose steps are padded differently.
    """
    found = list({id(loader): loader for loader in reversed(active)}.values())  # innermost first
    # One that was left by `break` stays among them until it begins again.
    found = [loader for loader in found if not getattr(loader, "_left_early", 0)] or found[:1]
    if not found:
        return None
    inner, *outer = found
    is_inside = getattr(inner, "is_inside", None)  # clients register loaders of their own too
    beside = [loader for loader in outer if is_inside is not None and not is_inside(loader)]
    outcomes = {(_outcome(getattr(loader, "padding", None)), _mesh_of(loader)) for loader in [inner, *beside]}
    if len(outcomes) == 1:
        return inner
    raise SettingError(
        explain(
            f"gather_for_metrics cannot tell which of {1 + len(beside)} loaders that are iterated side by side its data "
            "comes from, and their steps have different padding: "
            f"{', '.join(_told(getattr(loader, 'padding', None)) for loader in [inner, *beside])}.",
            accepted="data of one loader, named where several are iterated in one loop",
            remedy="Pass dataloader=, the loader whose batch the data was computed from; one call for each loader.",
        )
    )


def _outcome(padding: Padding | None) -> Padding | None:
    alike = padding is None or (padding.rows == padding.real and len(set(padding.rows)) == 1)
    return None if alike else padding


def _mesh_of(loader: Any) -> Any:
    return getattr(loader, "torch_device_mesh", None)


def _told(padding: Padding | None) -> str:
    return "none" if padding is None else f"{padding.real} of {padding.rows} rows are real"


Shapes = list[tuple[int, ...]]
"""The shapes of one tensor, on each rank in the step."""


# What each rank brings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one rank has in a step."""

    rank: int
    rows: int
    """Samples in its batch."""

    real: int
    """How many of them, from the front, are kept."""


@dataclass(frozen=True)
class Step:
    """What the ranks have that are in the loop, in order of rank."""

    parts: tuple[Part, ...]
    cuts: bool
    """Whether anything is padding."""

    copies: frozenset[int]
    """Ranks that work on the same batch as one before them; their results are left out."""

    full: int | None = None
    """Samples in a full batch of one rank, where it is known."""

    is_short: bool = False
    """Whether it is known, and batches of this step are shorter."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who is in the loop."""
        return tuple([part.rank for part in self.parts])


def step_of(loader: Any, rank: int, world_size: int) -> Step:
    """Return what ranks have in the step whose batch `loader` gave last; outside of a loop it is `None`.

    Raises:
        SettingError: (a `ValueError`) if the loader cannot tell.
    """
    padding: Padding | None = getattr(loader, "padding", None)
    shard_of = shards_of_ranks(world_size, _mesh_of(loader))
    copies = frozenset(place for place, shard in enumerate(shard_of) if shard in shard_of[:place])
    full: int | None = getattr(loader, "full_batch_size", None)
    if padding is None:
        return Step(tuple([Part(place, 1, 1) for place in range(world_size)]), False, copies, full)
    count = len(padding.rows)
    if count != max(shard_of) + 1 or min(padding.real) < 0 or not padding.rows[shard_of[rank]]:
        problem = (
            f"rank {rank} has no batch"
            if count == max(shard_of) + 1 and min(padding.real) >= 0
            else "slice_fn_for_dispatch gave pieces that are not rows, one after the other"
            if count == max(shard_of) + 1
            else f"the loader was prepared for {count} processes or groups of them, and there are {max(shard_of) + 1}"
        )
        raise SettingError(
            explain(
                f"gather_for_metrics cannot tell which rows of this step are padding: {problem}.",
                accepted="loaders that share rows out over all processes",
                remedy="Use accelerator.gather and cut yourself, or drop_last=True, which pads nothing.",
            )
        )
    parts = [Part(place, padding.rows[shard], padding.real[shard]) for place, shard in enumerate(shard_of)]
    present = tuple([part for part in parts if part.rows])
    is_short = full is not None and any(part.rows < full for part in present)
    return Step(present, padding.rows != padding.real, copies, full, is_short)


def kept_lengths(step: Step, lengths: Sequence[int]) -> list[int] | None:
    """Return how many entries of each rank are kept, from the front. See [Note: what can be cut].

    Args:
        step: Whose rows.
        lengths: How many entries each rank has.

    Returns:
        `None` if that would be a guess.
    """
    if all(part.real in (0, part.rows) for part in step.parts):
        return [length if part.real else 0 for part, length in zip(step.parts, lengths, strict=True)]
    times = {divmod(length, part.rows) for part, length in zip(step.parts, lengths, strict=True)}
    if len(times) > 1 or (factor := times.pop())[1]:
        return None
    return [factor[0] * part.real for part in step.parts]


def _uncuttable(step: Step, kind: str, brought: Iterable[str]) -> SettingError:
    rows = ", ".join(
        f"rank {part.rank}: {text} for {part.rows} rows, of which {part.real} are real"
        for part, text in zip(step.parts, brought, strict=True)
    )
    return SettingError(
        explain(
            f"gather_for_metrics cannot tell what of {kind} belongs to the rows that pad this step ({rows}).",
            accepted="k entries for each row of the batch along dimension 0, with the same k on all ranks; values without "
            "dimensions; or a value repeated over the batch",
            remedy="Size results by the batch itself, not by the configured batch size; pass dataloader= if they come from "
            "another loader than the innermost; or use accelerator.gather for what does not belong to samples.",
        )
    )


# What ranks tell each other first ---------------------------------------------------------------------------------------

_RECORD = 16
"""Numbers in a record: what stands for the structure, and so many sizes but one; further ones follow."""


def _exchange(talk: Collectives, step: Step, brought: str, sizes: Sequence[int] = ()) -> list[list[int]]:
    """Return the sizes on each rank in the step, once all know that they bring the like. See [Note: one record first].

    Args:
        talk: How ranks talk.
        step: Who takes part.
        brought: What this rank brings, apart from sizes.
        sizes: As many on all ranks that bring the same.

    Raises:
        DistributedOperationException: On all ranks, unless all bring the same.
    """
    talk.check("gather_for_metrics", None, ranks=step.ranks)
    digest = int.from_bytes(hashlib.blake2b(brought.encode(), digest_size=7).digest(), "big")
    record = [digest, *sizes[: _RECORD - 1]]
    table = talk.gather_numbers_among(record + [0] * (_RECORD - len(record)), step.ranks)
    if any(row[0] != digest for row in table):
        raise DistributedOperationException(_different(step, talk.gather_object_among(brought, step.ranks)))
    told = [row[1:] for row in table]
    if more := sizes[_RECORD - 1 :]:
        told = [row + rest for row, rest in zip(told, talk.gather_numbers_among(more, step.ranks), strict=True)]
    return told


def _different(step: Step, brought: Sequence[str]) -> str:
    table = "\n".join(f"  - Process {rank}: {text:.300}" for rank, text in zip(step.ranks, brought, strict=True))
    return explain(
        f"gather_for_metrics cannot join what the processes brought:\n{table}",
        accepted="the same structure, dtypes and numbers of dimensions on all processes; sizes may differ",
        remedy="Look for what treats a short batch differently, such as squeeze() in place of squeeze(-1).",
    )


# Tensors --------------------------------------------------------------------------------------------------------------


def _described_tensor(leaf: torch.Tensor) -> str:
    return f"{leaf.dtype} with {leaf.dim()} dimensions"


def _gather_tensors(
    talk: Collectives, step: Step, data: Any, leaves: list[torch.Tensor], pad_index: int, seen: Seen
) -> Any:
    table = _exchange(
        talk, step, repr(tree_map(_described_tensor, data)), [size for leaf in leaves for size in leaf.shape]
    )
    shapes, start = [], 0
    for leaf in leaves:
        shapes.append([tuple(row[start : start + leaf.dim()]) for row in table])
        start += leaf.dim()
    if step.cuts:
        _refuse_lists_of_samples(step, data, iter(shapes))
    following = zip(shapes, count())

    def gather_next(leaf: torch.Tensor) -> torch.Tensor:
        on_ranks, number = next(following)
        if not leaf.dim():
            return _gather_value(talk, step, leaf)
        return _gather_rows(talk, step, _padded_to(leaf, on_ranks, pad_index), on_ranks, seen[number])

    return tree_map(gather_next, data)


def _refuse_lists_of_samples(step: Step, data: Any, shapes: Iterator[Shapes]) -> list[Shapes]:
    """Return the shapes in `data`; refuse what may hold one for each sample. See [Note: structure or one for each sample]."""
    if isinstance(data, torch.Tensor):
        return [next(shapes)]
    found: list[Shapes] = []
    for part in data.values() if isinstance(data, Mapping) else data:
        found += _refuse_lists_of_samples(step, part, shapes)
    count = len(data)
    as_many_as_rows = isinstance(data, list) and all(part.rows == count > 1 for part in step.parts)
    if as_many_as_rows and any(shape[:1] != (count,) for on_ranks in found for shape in on_ranks):
        raise SettingError(
            explain(
                f"gather_for_metrics got a list of {count} parts in a step with padding in which each rank has {count} rows, "
                f"and the shapes are {', '.join(str(on_ranks[0]) for on_ranks in found):.120}: each part may belong to one "
                "sample, or to all of them.",
                accepted="lists of tensors with one row for each sample, or of one object for each sample",
                remedy="Pass use_gather_object=True if there is one part for each sample, and a tuple if not.",
            )
        )
    return found


def _gather_value(talk: Collectives, step: Step, leaf: torch.Tensor) -> torch.Tensor:
    values = talk.gather_among(leaf, step.ranks)
    kept = [place for place, part in enumerate(step.parts) if part.real and part.rank not in step.copies]
    return values if len(kept) == len(values) else values[kept]


def _gather_rows(talk: Collectives, step: Step, padded: torch.Tensor, shapes: Shapes, seen: set[int]) -> torch.Tensor:
    lengths = [shape[0] for shape in shapes]
    if step.full and not step.is_short:
        note_full(seen, step.full, padded, lengths)
    joined = talk.gather_among(padded, step.ranks)
    if not (step.cuts or step.copies or step.is_short) and lengths.count(len(padded)) == len(lengths):
        return joined
    pieces = [piece[:length] for piece, length in zip(joined.view(len(shapes), *padded.shape), lengths, strict=True)]
    times = None
    if step.full and step.is_short:
        times = times_spread([part.rows for part in step.parts], step.full, pieces, seen)
    kept = kept_lengths(step, lengths) if times is None else [times * part.real for part in step.parts]
    if kept is None:
        raise _uncuttable(step, "a tensor", [f"shape {shape}" for shape in shapes])
    parts = zip(step.parts, pieces, kept, strict=True)
    return torch.cat([piece[:length] for part, piece, length in parts if part.rank not in step.copies])


def _padded_to(leaf: torch.Tensor, shapes: Shapes, value: int) -> torch.Tensor:
    """Return the tensor in the smallest shape that holds those of all ranks."""
    shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
    if list(leaf.shape) == shape:
        return leaf
    padded = leaf.new_full(shape, value)
    padded[tuple([slice(size) for size in leaf.shape])] = leaf
    return padded


def _without_excess(loader: Any, data: Any, leaves: list[torch.Tensor]) -> Any:
    """Return what one process has, with a mean that was spread over a full batch cut to a short last batch's rows."""
    full: int | None = getattr(loader, "full_batch_size", None)
    if full is None or not any(may_be_spread(leaf) for leaf in leaves):
        return data
    seen = seen_by_call(loader)
    if not loader.end_of_dataloader:
        for number, leaf in enumerate(leaves):
            note_full(seen[number], full, leaf, leaf.shape[:1])
        return data
    rows: int = loader.remainder
    if not 0 < rows < full:  # it is full, or not known
        return data
    numbers = count()

    def cut_next(leaf: torch.Tensor) -> torch.Tensor:
        seen_before = seen[next(numbers)]
        times = times_spread([rows], full, [leaf], seen_before) if leaf.dim() else None
        return leaf if times is None else leaf[: times * rows]

    return tree_map(cut_next, data)


# Objects --------------------------------------------------------------------------------------------------------------


_OBJECTS = "one object for each sample"


def _kind_of_objects(data: Any, *, by_wish: bool) -> str:
    """Return what has to travel as objects: `_OBJECTS`, or a description of what cannot."""
    if isinstance(data, Mapping):
        return f"a {type(data).__name__} with the keys {list(data)!r:.80}"
    if isinstance(data, (list, tuple)):
        with_rows = [ops._has_rows(item) for item in data]
        of_tensors = [isinstance(item, torch.Tensor) for item in data]
        is_structure = (
            is_namedtuple(data) or any(with_rows)
            if isinstance(data, tuple)
            else not by_wish and any(of_tensors) and not all(of_tensors)
        )
        if is_structure:
            return f"a {type(data).__name__} of {', '.join(type(item).__name__ for item in data):.80}"
    return _OBJECTS


def _no_rows_told(kind: str) -> str:
    return explain(
        f"gather_for_metrics got {kind}, which would have to travel as objects: which of its parts belong to one sample "
        "cannot be told.",
        accepted="nested tensors, or a list with one object for each sample",
        remedy="Gather its parts one after the other; pass list(data) if it has one object for each sample.",
    )


def _gather_objects(talk: Collectives, step: Step, data: Any) -> list[Any]:
    brought = talk.gather_object_among(data, step.ranks)
    items = [list(mine) if ops._has_rows(mine) else None for mine in brought]
    if any(mine is None for mine in items):
        if step.cuts and not all(mine is None for mine in items):
            raise _uncuttable(step, "objects", [_described(mine) for mine in items])
        # One object of each rank, which may be of lists on some.
        items = [
            [whole] * bool(part.real) if mine is None else mine
            for part, whole, mine in zip(step.parts, brought, items, strict=True)
        ]
    else:
        lengths = kept_lengths(step, [len(mine or ()) for mine in items])
        if lengths is None:
            raise _uncuttable(step, "objects", [_described(mine) for mine in items])
        items = [(mine or [])[:length] for mine, length in zip(items, lengths, strict=True)]
    return [item for part, mine in zip(step.parts, items, strict=True) if part.rank not in step.copies for item in mine]


def _described(items: list[Any] | None) -> str:
    return "a single object" if items is None else f"{len(items)} objects"
