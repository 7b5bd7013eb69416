"""Let ranks run out of batches at different times."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .session import Session


@contextmanager
def join_uneven_inputs(session: Session, joinables: Sequence[Any], even_batches: bool | None) -> Iterator[None]:
    """Train on inputs of uneven length. Called on all ranks; see `Accelerator.join_uneven_inputs`."""
    with _even_batches(session, even_batches), session.strategy.join(joinables):
        yield


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
    try:
        yield
    finally:
        for sampler, before in changed:
            sampler.even_batches = before
