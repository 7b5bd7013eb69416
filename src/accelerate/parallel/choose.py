"""Settings and machine -> the strategy: the one place that decides."""

from __future__ import annotations

from .base import Strategy
from .ddp import DataParallel
from .plan import ParallelPlan


def choose(plan: ParallelPlan) -> Strategy:
    """Return the strategy for this plan. A new one takes a row here."""
    if plan.runtime.process.world_size > 1:
        return DataParallel(plan)
    return Strategy(plan)
