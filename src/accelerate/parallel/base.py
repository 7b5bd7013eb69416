"""What every strategy offers. The base class is training in a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import steps
from .job import Job, check_belonging
from .plan import ParallelPlan

Step = Callable[[ParallelPlan, Job], None]

_NOTHING = nullcontext()


class Strategy:
    """Training in a single process; others say only what differs."""

    def __init__(self, plan: ParallelPlan) -> None:
        self.plan = plan

    def check(self, job: Job) -> None:
        """Refuse what cannot work, before anything is touched."""
        check_belonging(job)

    def steps(self) -> tuple[Step, ...]:
        """Return the recipe of `prepare`, in order."""
        return (
            steps.place_models,
            steps.wrap_precision,
            steps.compile_models,  # after precision: the compiled graph contains the casts
            steps.wrap_optimizers,
            steps.shard_loaders,
            steps.wrap_schedulers,  # last: needs the wrapped optimizers
        )

    def is_complete(self, model: torch.nn.Module) -> bool:
        """Tell whether a model that was prepared before needs nothing further to be trained."""
        return True

    def no_sync(self, models: Sequence[torch.nn.Module]) -> AbstractContextManager[Any]:
        """Return a region in which backward keeps gradients local."""
        return _NOTHING

    def join(self, joinables: Sequence[Any]) -> AbstractContextManager[Any]:
        """Return a region in which ranks may run out of batches at different times."""
        return _NOTHING

    def keep_forward_local(self, models: Sequence[torch.nn.Module], alone: Callable[[], bool]) -> None:
        """Let forward talk to no other rank while `alone()`, which is asked in each forward from now on."""
        return None

    def check_first_backward(self, models: Sequence[torch.nn.Module]) -> None:
        """Refuse a first loss that cannot have come from the prepared models."""
        return None
