"""Run the steps of `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..parallel.job import Job, sort
from .guard import guard_first_step
from .session import Session
from .uneven import watch


def prepare(session: Session, objects: Sequence[Any], placement: Sequence[bool | None] | None) -> Any:
    """Prepare objects of any kind, in any order. Called on all ranks, with the same objects; collective.

    Returns:
        One object alone, several as a tuple in the order of the arguments.
    """
    return _run(session, _sort(session, objects, placement))


def prepare_one(
    session: Session,
    item: Any,
    place: bool | None,
    *,
    evaluation_only: bool = False,
    slice_fn: Any = None,
) -> Any:
    """Prepare one object."""
    job = _sort(session, [item], [place])
    job.slots[0].evaluation_only = evaluation_only
    job.slots[0].slice_fn = slice_fn
    return _run(session, job)


def prepare_scheduler(session: Session, scheduler: Any) -> Any:
    """Prepare anything that steps like a scheduler, whatever its class."""
    job = _sort(session, [scheduler], None)
    job.schedulers = job.slots
    return _run(session, job)


def _sort(session: Session, objects: Sequence[Any], placement: Sequence[bool | None] | None) -> Job:
    return sort(
        objects,
        placement,
        session.plan.settings.device_placement,
        is_prepared=session.is_prepared,
        earlier_models=session.models,
        earlier_optimizers=session.optimizers,
        earlier_loaders=session.dataloaders,
    )


def _run(session: Session, job: Job) -> Any:
    session.strategy.check(job)
    for step in session.strategy.steps():
        step(session.plan, job)
    session.remember(job)
    watch(session)
    for slot in job.fresh(job.optimizers):
        guard_first_step(slot.result, session.plan)
    return job.in_order()
