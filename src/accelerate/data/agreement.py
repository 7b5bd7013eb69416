"""Loaders of which no rank knows how much the others have, and that end together all the same.

Owns what such ranks tell each other at each step. Used by `data.loader` for sources that are shared out where they are
read, see `data.sources`; never reads a dataset itself, and places nothing on devices.

[Note: ending by agreement]
Before a rank gives out a batch, it has read the next one. All ranks then exchange four numbers: whether there is a
next batch, in which pass and at which step, and how many samples it has. That one small `all_gather` of numbers on the
CPU is the whole cost of a step. A rank that has run out while another one has not gets a copy of its last batch, all of
it padding, until every rank is done; with `drop_last` all ranks stop as soon as one has nothing more, since a round to
which not every rank contributes is what `drop_last` leaves out. A rank that has no batch at all gets its copy from the
first rank that has one. In no case does a rank end its loop while another one goes on, so nothing has to be joined.

[Note: leaving early]
A loop that is broken off leaves the pass open, and talks to nobody at that moment: Python may close a loop long after it
was left, or while an exception ends the process. Instead, `settle_left`, which is called before ranks talk about
anything else (the next pass over any loader, `gather`, a barrier), makes the exchange that a next step would have made,
and says that this rank has left. Where all left at the same step, that is all. Where one did not, every rank finds out and raises.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from ..core.errors import AccelerateError, explain
from ..runtime import state
from ..runtime.accumulation import GradientState
from ..runtime.state import Runtime
from .cutting import count_rows
from .shards import Padding

_NOTHING: Any = object()
_READY, _DONE, _FAILED, _LEFT = range(4)


class AgreementError(AccelerateError, RuntimeError):
    """A rank could not read its next batch, or left the loop at another step than the others: raised on all ranks."""


class Measured(NamedTuple):
    """A batch, and how much of it there is."""

    batch: Any
    rows: int
    real: int


class TopUp:
    """A `collate_fn` around another one, that makes all batches of a pass the same size and says how much is real.

    Topping up the samples before they are collated asks nothing of their form: ragged ones are padded together by
    the collate function as always, and nothing is concatenated.

    Args:
        collate_fn: Makes a batch of a list of samples.
        batch_size: How many samples a batch shall have. A shorter list is continued with its own first samples.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], batch_size: int) -> None:
        self.collate_fn = collate_fn.collate_fn if isinstance(collate_fn, TopUp) else collate_fn
        self.batch_size = batch_size

    def __call__(self, samples: list[Any]) -> Measured:
        """Return the batch with its counts."""
        real = len(samples)
        filled = samples if real >= self.batch_size else list(islice(cycle(samples), self.batch_size))
        return Measured(self.collate_fn(filled), len(filled), real)


@dataclass(frozen=True, slots=True)
class _Row:
    """What one rank told about its next batch."""

    kind: int
    number: int
    step: int
    rows: int
    real: int


class Agreement:
    """What the ranks of one loader have told each other. Lives as long as the loader, over all its passes.

    Args:
        shard_of: Which data shard each rank reads; by default each its own.
        drop_last: Stop all ranks when the first one has no further batch, in place of topping up those that are done.
    """

    def __init__(self, *, shard_of: Sequence[int] | None = None, drop_last: bool = False) -> None:
        self.shard_of = None if shard_of is None else tuple(shard_of)
        self.drop_last = drop_last
        self.left = False
        """Whether this rank broke a pass off and the others do not know yet."""
        self._passes = 0
        self._step = 0
        self._open = False

    def walk(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Padding | None, bool]]:
        """Yield each batch, what of it is padding on which shard, and whether it is the last one. Collective.

        Called on all ranks, which take the same number of steps. The batches are read one ahead.

        Args:
            batches: This rank's batches: as `TopUp` makes them, or of any kind, whose rows are then counted.

        Raises:
            AgreementError: On all ranks, if one could not read its next batch, or left the loop while others did not.
        """
        runtime = state.current_or_single()
        if runtime.process.world_size == 1:
            yield from _walk_alone(iter(batches))
            return
        self.settle()
        self._passes, self._step, self._open, self.left = self._passes + 1, 0, True, False
        reader = _Reader(iter(batches))
        try:
            table, failure = self._advance(runtime, reader)
            if failure is None and not self._is_over(table):
                table = _provide_spare(runtime, reader, table)
            while failure is None and not self._is_over(table):
                padding, batch = self._padding(table), reader.current()
                table, failure = self._advance(runtime, reader)
                last = self._is_over(table)
                self._open = not last and failure is None
                yield batch, padding, last and failure is None
        except GeneratorExit:
            self.left = self._open
            raise
        except BaseException:
            self._open = False  # what all ranks raise, or what ends this process
            raise
        self._open = False
        if failure is not None:
            raise failure from reader.error

    def settle(self) -> None:
        """Tell the others that this rank broke its pass off, if it did. Collective, and then only.

        Raises:
            AgreementError: On all ranks, if one of them did not leave at this step.
        """
        if self.left:
            self.left = self._open = False
            self._exchange(state.current_or_single(), _LEFT)

    def _advance(self, runtime: Runtime, reader: _Reader) -> tuple[list[_Row], AgreementError | None]:
        """Read the next batch and hear what the others have; also why the pass cannot go on, if so."""
        kind = reader.read(spare=not self.drop_last)
        table = self._exchange(runtime, kind, reader.rows, reader.real)
        if all(row.kind != _FAILED for row in table):
            return table, None
        texts = runtime.collectives.all_gather_object(None if reader.error is None else _text_of(reader.error))
        error = AgreementError(_cannot_read(texts))
        error.arose_on = tuple(rank for rank, text in enumerate(texts) if text is not None)
        return table, error

    def _exchange(self, runtime: Runtime, kind: int, rows: int = 0, real: int = 0) -> list[_Row]:
        """Tell all ranks about this one's next batch, and return what each of them told."""
        told = torch.tensor([[kind, self._passes, self._step, rows, real]], device=_device_of_words(runtime))
        table = [_Row(*row) for row in runtime.collectives.all_gather(told).tolist()]
        self._step += 1
        if len({(row.kind == _LEFT, row.number, row.step) for row in table}) > 1:
            raise AgreementError(_out_of_step(table))
        return table

    def _is_over(self, table: list[_Row]) -> bool:
        done = [row.kind == _DONE for row in table]
        return any(done) if self.drop_last else all(done)

    def _padding(self, table: list[_Row]) -> Padding | None:
        shards = range(len(table)) if self.shard_of is None else self.shard_of
        of_shard = dict(zip(shards, table, strict=True))
        ordered = [of_shard[shard] for shard in sorted(of_shard)]
        rows, real = tuple(row.rows for row in ordered), tuple(row.real for row in ordered)
        return None if rows == real and len(set(rows)) == 1 else Padding(rows, real)


def settle_left(gradient_state: GradientState) -> None:
    """Settle all loaders whose loops were broken off. Called on all ranks before they talk; collective if there are any.

    Raises:
        AgreementError: On all ranks, if one of them did not leave at the same step.
    """
    for loader in gradient_state.dataloader_references:
        agreement = getattr(loader, "agreement", None)  # clients register loaders of their own too
        if agreement is not None:
            agreement.settle()


class _Reader:
    """Reads this rank's batches one ahead, and repeats the last one when there is none."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.error: Exception | None = None
        self.following: Measured | None = None
        self.spare: Measured | None = None
        self._source = source
        self._is_done = False

    @property
    def rows(self) -> int:
        """Rows of what this rank gives out next."""
        given = self.following or self.spare
        return 0 if given is None else given.rows

    @property
    def real(self) -> int:
        """How many of them are samples."""
        return 0 if self.following is None else self.following.real

    def current(self) -> Any:
        """Return the batch that was read, or another copy of the last one."""
        if self.following is not None:
            return self.following.batch
        assert self.spare is not None  # a pass is over where no rank has anything
        return _copy_of(self.spare.batch)

    def read(self, *, spare: bool) -> int:
        """Read on, and return what came of it. At the end the batch before is kept, if `spare`."""
        before, self.following = self.following, None
        if self._is_done:
            return _DONE
        try:
            batch = next(self._source, _NOTHING)
        except Exception as error:  # noqa: BLE001 - told to all ranks, which wait for this one, then raised on each
            self.error, self._is_done = error, True
            return _FAILED
        if batch is not _NOTHING:
            self.following = _measured(batch)
            return _READY
        self._is_done = True
        if spare and before is not None:
            # Copied before the loop can change it.
            self.spare = Measured(_copy_of(before.batch), before.rows, 0)
        return _DONE


def _provide_spare(runtime: Runtime, reader: _Reader, table: list[_Row]) -> list[_Row]:
    """Give ranks without any batch the first batch of another one. Collective if there are such ranks."""
    if all(row.kind == _READY for row in table):
        return table
    donor = next(rank for rank, row in enumerate(table) if row.kind == _READY)
    given = reader.following if runtime.process.rank == donor else None
    problem: Exception | None = None
    try:
        received = runtime.collectives.broadcast_object(given, src=donor)
    except Exception as error:  # what cannot be pickled may raise anything, before anything is sent
        if given is None:
            raise
        problem = error
        received = runtime.collectives.broadcast_object(_text_of(error), src=donor)
    if isinstance(received, str):
        empty = [rank for rank, row in enumerate(table) if row.kind == _DONE]
        raise AgreementError(_cannot_lend(empty, donor, received)) from problem
    if reader.following is None:
        reader.spare = received
    lent = table[donor].rows
    return [row if row.kind == _READY else replace(row, rows=lent) for row in table]


def _walk_alone(batches: Iterator[Any]) -> Iterator[tuple[Any, Padding | None, bool]]:
    current = next(batches, _NOTHING)
    while current is not _NOTHING:
        following = next(batches, _NOTHING)
        yield _measured(current).batch, None, following is _NOTHING
        current = following


def _measured(batch: Any) -> Measured:
    if isinstance(batch, Measured):
        return batch
    rows = count_rows(batch)
    rows = 1 if rows is None else rows
    return Measured(batch, rows, rows)


def _copy_of(batch: Any) -> Any:
    try:
        return copy.deepcopy(batch)
    except (TypeError, RuntimeError, copy.Error):  # something in it cannot be copied; then it is given out as it is
        return batch


def _device_of_words(runtime: Runtime) -> torch.device:
    # A group that this library made carries words between CPUs, which wait for no device; one of the user's need not.
    attached = runtime.process.source == "attached" and "gloo" not in (runtime.backend or "")
    return runtime.device if attached else torch.device("cpu")


# Errors ----------------------------------------------------------------------------------------------------------------


def _text_of(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _cannot_read(texts: list[str | None]) -> str:
    failed = {rank: text for rank, text in enumerate(texts) if text is not None}
    return explain(
        f"{_ranks(failed)} could not read the next batch; all ranks stop at this step. What was raised there:\n"
        + "\n".join(f"[rank {rank}] {text}" for rank, text in failed.items()),
        remedy="Correct the dataset or collate_fn.",
    )


def _cannot_lend(empty: list[int], donor: int, text: str) -> str:
    return explain(
        f"{_ranks(empty)} got no batch at all (from a dataset that is shared out where it is read), and cannot get a copy of "
        f"rank {donor}'s, which cannot be sent:\n{text}",
        accepted="data of which every rank gets some, or batches that can be pickled",
        remedy="Write more and smaller shards, start fewer processes, or pass drop_last=True.",
    )


def _out_of_step(table: list[_Row]) -> str:
    left = [rank for rank, row in enumerate(table) if row.kind == _LEFT]
    # A row tells of a batch ahead: what was done is one less than its step.
    where = ", ".join(
        f"rank {rank} {'left' if row.kind == _LEFT else 'is'} in pass {row.number} after {max(0, row.step - 1)} steps"
        for rank, row in enumerate(table)
    )
    who = f"{_ranks(left)} left" if left else "Some ranks left"
    return explain(
        f"{who} the loop over a loader at another step than the others: {where}.",
        accepted="loops that all ranks leave at the same step",
        remedy="Decide on all ranks alike, with accelerator.set_trigger and check_trigger for example.",
    )


def _ranks(ranks: Iterable[int]) -> str:
    listed = [str(rank) for rank in ranks]
    return f"Rank {listed[0]}" if len(listed) == 1 else f"Ranks {', '.join(listed[:-1])} and {listed[-1]}"
