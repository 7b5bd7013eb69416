"""Run the steps of `prepare`."""

from __future__ import annotations

import warnings
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
    for item in objects:
        _tell_foreign_loader(item)
    return sort(
        objects,
        placement,
        session.plan.settings.device_placement,
        is_prepared=session.is_prepared,
        earlier_models=session.models,
        earlier_optimizers=session.optimizers,
        earlier_loaders=session.dataloaders,
    )


def _tell_foreign_loader(item: Any) -> None:
    """Say that a loader of a kind that is known, and is none of torch's, passes through as it is."""
    if any(kind.__name__ == "WebLoader" and kind.__module__.startswith("webdataset") for kind in type(item).__mro__):
        warnings.warn(
            f"{type(item).__name__} is no torch DataLoader, and prepare gives it back as it is: its batches stay on the CPU, "
            "and processes share nothing out and need not end together. Pass the dataset in a torch DataLoader: "
            "DataLoader(dataset, batch_size=...), or batch_size=None for one that makes batches itself.",
            stacklevel=5,
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
