"""The arguments of one `prepare` call: sorted, and back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..core.errors import SettingError, explain
from ..stepping.optimizer import AcceleratedOptimizer
from ..stepping.scheduler import AcceleratedScheduler


@dataclass
class Slot:
    """One argument, on its way through the steps."""

    given: Any
    result: Any
    place: bool
    is_prepared: bool = False
    evaluation_only: bool = False
    slice_fn: Any = None


@dataclass
class Job:
    """What one `prepare` call works on; each step changes results in place."""

    slots: list[Slot]
    models: list[Slot] = field(default_factory=list)
    optimizers: list[Slot] = field(default_factory=list)
    loaders: list[Slot] = field(default_factory=list)
    schedulers: list[Slot] = field(default_factory=list)
    earlier_models: Sequence[torch.nn.Module] = ()
    earlier_optimizers: Sequence[AcceleratedOptimizer] = ()
    earlier_loaders: Sequence[Any] = ()

    def in_order(self) -> Any:
        """Return the results as `prepare` gives them back: one object alone, several as a tuple."""
        results = tuple(slot.result for slot in self.slots)
        return results[0] if len(results) == 1 else results

    def fresh(self, slots: list[Slot]) -> Iterator[Slot]:
        """Yield those not prepared before."""
        return (slot for slot in slots if not slot.is_prepared)


def is_marked(item: Any) -> bool:
    """Tell whether `prepare` has left its mark on an object."""
    return bool(getattr(item, "_is_accelerate_prepared", False))


def sort(
    objects: Sequence[Any],
    placement: Sequence[bool | None] | None,
    default_placement: bool,
    *,
    is_prepared: Callable[[Any], bool] = is_marked,
    earlier_models: Sequence[torch.nn.Module] = (),
    earlier_optimizers: Sequence[AcceleratedOptimizer] = (),
    earlier_loaders: Sequence[Any] = (),
) -> Job:
    """Sort the arguments of a `prepare` call by kind. Objects of no known kind pass through.

    Raises:
        IndexError: If there is nothing to prepare.
        SettingError: (a `ValueError`) if there are not as many placements as objects.
    """
    if not objects:
        raise IndexError(
            explain(
                "prepare() was called without anything to prepare.",
                remedy="Pass your model.",
            )
        )
    if placement is not None and len(placement) != len(objects):
        raise SettingError(
            explain(
                f"device_placement has {len(placement)} entries for {len(objects)} objects.",
                accepted="one entry for each object: True, False or None",
                remedy="Leave device_placement out to place everything.",
            )
        )
    choices = placement or [None] * len(objects)
    slots = [
        Slot(
            given=item,
            result=item,
            place=default_placement if choice is None else choice,
            is_prepared=is_prepared(item),
        )
        for item, choice in zip(objects, choices, strict=True)
    ]
    job = Job(
        slots, earlier_models=earlier_models, earlier_optimizers=earlier_optimizers, earlier_loaders=earlier_loaders
    )
    for slot in slots:
        if isinstance(slot.given, torch.utils.data.DataLoader):
            job.loaders.append(slot)
        elif isinstance(slot.given, torch.nn.Module):
            job.models.append(slot)
        elif isinstance(slot.given, torch.optim.Optimizer):
            job.optimizers.append(slot)
        elif isinstance(slot.given, (LRScheduler, AcceleratedScheduler)):
            job.schedulers.append(slot)
    return job


def check_belonging(job: Job) -> None:
    """Refuse an optimizer that was made from another copy of its model.

    Raises:
        SettingError: (a `ValueError`) if an optimizer holds no parameter of any prepared model, while a model of the
            same call has parameters of the same shapes that no optimizer holds: training would change nothing.
    """
    fresh = list(job.fresh(job.optimizers))
    models = [slot.given for slot in job.fresh(job.models) if not slot.evaluation_only]
    if not fresh or not models:
        return
    held = [_parameters_of(slot.given) for slot in fresh] + [_parameters_of(item) for item in job.earlier_optimizers]
    everything = set[int]().union(*held)
    all_models = [*models, *job.earlier_models]
    known = {id(parameter) for model in all_models for parameter in model.parameters()}
    orphans = [
        model
        for model in models
        if (trainable := {id(p) for p in model.parameters() if p.requires_grad}) and not trainable & everything
    ]
    for slot, parameters in zip(fresh, held, strict=False):
        twin = next((model for model in orphans if _shapes(model.parameters()) == _shapes_of(slot.given)), None)
        if twin is not None and not parameters & known:
            raise SettingError(
                explain(
                    f"prepare() got the optimizer {type(slot.given).__name__}, which holds no parameter of any prepared "
                    f"model, and the model {type(twin).__name__} with parameters of the same shapes, which no optimizer "
                    "holds.",
                    accepted="an optimizer made from the parameters of the model that is trained",
                    remedy="Make the optimizer after the last line that makes, copies or replaces the model: "
                    "optimizer = Optimizer(model.parameters(), ...).",
                )
            )


def _shapes(parameters: Iterable[torch.Tensor]) -> list[torch.Size]:
    return sorted(parameter.shape for parameter in parameters if parameter.requires_grad)


def _shapes_of(optimizer: torch.optim.Optimizer) -> list[torch.Size]:
    return _shapes(parameter for group in optimizer.param_groups for parameter in group["params"])


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
