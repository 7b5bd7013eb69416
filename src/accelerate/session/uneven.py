"""Ranks that run out of batches at different times.

Owns what is done about it before ranks talk to each other. Which rank has a batch in which step is known to the loaders
(`Padding` in `data.shards`), how ranks end together where nobody knows it in advance is in `data.agreement`.

[Note: a step without all ranks]
With `even_batches=False` the last step over a loader may be one in which some ranks have no batch. These have left the
loop, and do not come to what the others do together in it: averaging gradients, say, would wait for them until the
group's timeout, or meet something else that they do after the loop. So once a loader is prepared that may end so, the
collectives ask here first, by their guard, whichever way they were called; it raises at once. `backward`, in which
DDP talks by itself, and the wrapping of models ask too. Evaluation, which needs nothing from the other ranks, goes
on: `gather_for_metrics` names the ranks that it talks among. Inside `join_uneven_inputs`, ranks that are done stand in
for themselves in backward, and in nothing else. Runs without such loaders pay one comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..core.errors import AccelerateError, explain
from ..data.agreement import settle_left
from ..data.dispatcher import shards_of_ranks
from ..runtime import state
from ..runtime.accumulation import GradientState
from ..stepping.optimizer import move_to_device
from .session import Session


class UnevenStepError(AccelerateError, RuntimeError):
    """Something collective was begun in a step in which not every rank has a batch."""


def watch(session: Session) -> None:
    """Note which prepared loaders may end at different times. Called after each `prepare`."""
    if session.plan.runtime.process.world_size > 1:
        session.uneven = tuple(loader for loader in session.dataloaders if _may_be_uneven(loader))
        if session.uneven:
            session.plan.runtime.collectives.guard = refuse_absent  # for good: another session may need it still
        if any(_sampler_of(loader) is not None for loader in session.uneven):
            session.strategy.keep_forward_local(session.prepared_models, partial(_is_alone, session))


def _is_alone(session: Session) -> bool:
    return bool(session.uneven) and not session.joining and bool(ranks_without_batch())


def refuse_absent(operation: str, ranks: Sequence[int] | None = None) -> None:
    """Refuse what would wait for ranks that have no batch in this step. See [Note: a step without all ranks].

    Called on all ranks before they talk; collective only where a loop was broken off over a loader whose ranks end by
    agreement, see `settle_left`.

    Args:
        operation: What follows, for the message.
        ranks: Who takes part, if not all do.

    Raises:
        UnevenStepError: (a `RuntimeError`) if some of the ranks have no batch in this step.
        AgreementError: (a `RuntimeError`) if ranks left a loop at different steps.
    """
    settle_left(GradientState())
    absent = ranks_without_batch()
    if ranks is not None and absent:
        absent = tuple(rank for rank in absent if rank in ranks)
    if absent:
        raise UnevenStepError(_told(operation, absent))


def check_backward(session: Session, *, joinable: bool) -> None:
    """Do what `refuse_absent` does before gradients are averaged, which is no matter of the collectives.

    Args:
        session: Has loaders that may end unevenly.
        joinable: Whether ranks that are done take part inside `join_uneven_inputs`.
    """
    if joinable and session.joining:
        settle_left(GradientState())
    else:
        refuse_absent("backward")


def ranks_without_batch() -> tuple[int, ...]:
    """Return the ranks that have no batch in this step of any loop that runs."""
    absent: set[int] = set()
    for loader in GradientState().dataloader_references:
        padding = getattr(loader, "padding", None)  # clients register loaders of their own too
        if padding is not None and 0 in padding.rows:
            shard_of = shards_of_ranks(state.current().process.world_size, getattr(loader, "torch_device_mesh", None))
            absent.update(rank for rank, shard in enumerate(shard_of) if not padding.rows[shard])
    return tuple(sorted(absent))


@contextmanager
def join_uneven_inputs(session: Session, joinables: Sequence[Any], even_batches: bool | None) -> Iterator[None]:
    """Train on inputs of uneven length; see `Accelerator.join_uneven_inputs`.

    Called on all ranks; collective at its end, after which all ranks have the same models, moments and learning rates.
    """
    session.joining += 1
    try:
        with _even_batches(session, even_batches), _same_progress(session), session.strategy.join(joinables):
            yield
    finally:
        session.joining -= 1


@contextmanager
def _same_progress(session: Session) -> Iterator[None]:
    """Give ranks that were done earlier what the others have by then. Collective at the end of the region.

    The strategy sees to the parameters. But a rank that was done has stepped less often, and moments, learning rate and
    loss scale that differ between ranks would drive their models apart from the next step on.
    """
    if session.plan.runtime.process.world_size == 1:
        yield
        return
    before, steps = _batches_given(session), [0] * len(session.optimizers)
    hooks = [
        optimizer.optimizer.register_step_post_hook(partial(_count, steps, place))
        for place, optimizer in enumerate(session.optimizers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    progress = session.plan.runtime.collectives.all_gather_object((_batches_given(session) - before, steps))
    if any(rank != progress[0] for rank in progress):
        _take_over(session, progress.index(max(progress)))


def _batches_given(session: Session) -> int:
    return sum(getattr(loader, "steps_given", 0) for loader in session.dataloaders)


def _count(steps: list[int], place: int, *_: Any) -> None:
    steps[place] += 1


def _take_over(session: Session, donor: int) -> None:
    """Load the state of rank `donor` into everything that steps. Collective."""
    stepping = [*session.optimizers, *(item for item in session.schedulers if hasattr(item, "state_dict"))]
    if session.scaling is not None:
        stepping.append(session.scaling.scaler)
    process, collectives = session.plan.runtime.process, session.plan.runtime.collectives
    mine = (
        [move_to_device(item.state_dict(), torch.device("cpu")) for item in stepping] if process.rank == donor else None
    )
    states = collectives.broadcast_object(mine, src=donor)
    if process.rank != donor:
        for item, state in zip(stepping, states, strict=True):
            item.load_state_dict(state)


@contextmanager
def _even_batches(session: Session, value: bool | None) -> Iterator[None]:
    changed: list[tuple[Any, bool]] = []
    if value is not None and session.plan.runtime.process.world_size > 1:
        for loader in session.dataloaders:
            sampler: Any = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "even_batches"):
                changed.append((sampler, sampler.even_batches))
                sampler.even_batches = value
            else:
                warnings.warn(
                    f"even_batches={value} has no meaning for {type(loader).__name__} over an iterable dataset; it keeps "
                    "its own way of ending.",
                    stacklevel=5,
                )
    if changed:
        watch(session)
    try:
        yield
    finally:
        for sampler, before in changed:
            sampler.even_batches = before
        if changed:
            watch(session)


def _may_be_uneven(loader: Any) -> bool:
    return getattr(loader, "agreement", None) is not None or _sampler_of(loader) is not None


def _sampler_of(loader: Any) -> Any:
    """Return the sampler that gives ranks different numbers of batches, or `None`."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while sampler is not None and not hasattr(sampler, "even_batches"):
        sampler = getattr(sampler, "batch_sampler", None)
    return None if sampler is None or sampler.even_batches or sampler.drop_last else sampler


def _told(operation: str, absent: tuple[int, ...]) -> str:
    who = f"rank {absent[0]} has" if len(absent) == 1 else f"ranks {', '.join(map(str, absent))} have"
    remedy = (
        "train inside `with accelerator.join_uneven_inputs([model]):`"
        if operation == "backward"
        else "evaluate with gather_for_metrics over that loader alone, which works among the ranks that have a batch"
    )
    return explain(
        f"{operation} was called in a step in which {who} no batch (even_batches=False): it would wait for ever.",
        accepted=f"{operation} in steps in which every rank has a batch, or after the loop",
        remedy=f"Keep even_batches=True, the default, or pass drop_last=True to the loader, or {remedy}.",
    )
