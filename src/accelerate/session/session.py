"""What one run has prepared so far.

Owns the live lists, which clients read and change: `accelerator._models` and its like are these objects.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import commit
from ..core.errors import SettingError, UnsupportedCombination, explain
from ..parallel.base import Strategy
from ..parallel.job import Job, is_marked
from ..parallel.plan import ParallelPlan
from ..parallel.unwrap import extract_model_from_parallel
from ..runtime.accumulation import GradientState
from ..settings.settings import Settings
from ..stepping.accumulate import Windows
from ..stepping.optimizer import AcceleratedOptimizer
from ..stepping.scaling import LossScaling
from ..stepping.schedule import length_of_loader
from .save import Contents, Saving


class Session:
    """The plan of a run, its strategy and its objects."""

    def __init__(self, plan: ParallelPlan, strategy: Strategy) -> None:
        self.plan = plan
        self.strategy = strategy
        self.models: list[torch.nn.Module] = []
        """The models without wrappers, whose names are those in checkpoints."""
        self.prepared_models: list[torch.nn.Module] = []
        """The same models as `prepare` returned them."""
        self.optimizers: list[AcceleratedOptimizer] = []
        self.schedulers: list[Any] = []
        self.dataloaders: list[Any] = []
        self.custom_objects: list[Any] = []
        self.save_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.load_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.saving = Saving(plan.runtime)
        self.loaded_from: Path | str | None = None
        """The checkpoint that was loaded last."""
        self.uneven: tuple[Any, ...] = ()
        """Those of the loaders whose ranks may end at different times."""
        self.joining = 0
        """How many regions of `join_uneven_inputs` run."""
        scaler = plan.precision.scaler
        self.scaling = None if scaler is None else LossScaling.of(scaler)
        self.windows = Windows(
            plan.runtime, self.models, self.optimizers, self.scaling, no_sync=self._no_sync, inner=_inner
        )

    @property
    def accumulation_steps(self) -> int:
        """Batches for each optimizer step; with a global batch size in the loop that runs, or over the longest loader."""
        state = GradientState()
        kept = [loader for loader in self.dataloaders if getattr(loader, "global_batch", None) is not None]
        if not kept or getattr(state.active_dataloader, "global_batch", None) is not None:
            return state.num_steps
        return max(kept, key=lambda loader: length_of_loader(loader) or 0).global_batch.accumulation

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        size = self.plan.settings.data.global_batch_size
        if size is not None and steps != self.accumulation_steps:
            raise UnsupportedCombination(
                explain(
                    f"gradient_accumulation_steps was set to {steps}, and global_batch_size={size} (from "
                    f"DataLoaderConfiguration) decides it: {self.accumulation_steps}.",
                    accepted="one of the two",
                    remedy="Leave the assignment out, or choose another global_batch_size.",
                )
            )
        GradientState().plugin_kwargs.update(num_steps=steps)

    def change(self, settings: Settings) -> None:
        """Take other settings from now on; what was prepared stays as it is."""
        self.plan = dataclasses.replace(self.plan, settings=settings)
        self.strategy.plan = self.plan

    def is_prepared(self, item: Any) -> bool:
        """Tell whether nothing is left to prepare on an object.

        Models are known by identity: marks on them travel, into wrappers that forward attributes, into copies and
        through files, where they would leave a model unwrapped.
        """
        if isinstance(item, torch.nn.Module):
            return any(item is model for model in self.prepared_models) and self.strategy.is_complete(item)
        return is_marked(item)

    def remember(self, job: Job) -> None:
        """Keep what a `prepare` call gave; objects kept before are not kept twice."""
        for slot in job.models:
            _keep(
                self.models,
                extract_model_from_parallel(slot.result, keep_torch_compile=False),
            )
            if slot.result is not slot.given:  # prepared for evaluation before, and for training now
                self.prepared_models[:] = [item for item in self.prepared_models if item is not slot.given]
            _keep(self.prepared_models, slot.result)
        for slots, kept in (
            (job.optimizers, self.optimizers),
            (job.schedulers, self.schedulers),
            (job.loaders, self.dataloaders),
        ):
            for slot in slots:
                _keep(kept, slot.result)
        for slot in (*job.models, *job.optimizers, *job.schedulers, *job.loaders):
            slot.result._is_accelerate_prepared = True

    @property
    def contents(self) -> Contents:
        """What checkpoints of this run hold."""
        return Contents(
            models=self.models,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
            dataloaders=self.dataloaders,
            scaler=self.plan.precision.scaler,
            custom_objects=self.custom_objects,
        )

    def restore_windows(self, windows: Any, step: int) -> None:
        """Continue windows of accumulation that a checkpoint holds. Called on all ranks; collective.

        Raises:
            CheckpointError: On all ranks, if a gradient does not fit a parameter on one.
        """
        with commit.together(self.plan.runtime.collectives, "The gradients in the checkpoint were not put back"):
            self.windows.load_state_dict(windows, step)

    def forget(self) -> None:
        """Drop everything that was prepared."""
        for kept in (
            self.models,
            self.prepared_models,
            self.optimizers,
            self.schedulers,
            self.dataloaders,
        ):
            kept.clear()
        self.uneven = ()
        self.windows.forget()
        self.saving.release()

    def _no_sync(self, models: tuple[Any, ...]) -> AbstractContextManager[Any]:
        self.check_is_prepared(models, "accumulate")
        return self.strategy.no_sync(models)

    def check_is_prepared(self, models: tuple[Any, ...], caller: str) -> None:
        """Refuse a model of which `prepare` made another one, which is the one to use.

        Raises:
            SettingError: (a `ValueError`) if a model is the inside of a prepared wrapper.
        """
        for model in models:
            if not any(model is item for item in self.prepared_models) and any(model is item for item in self.models):
                raise SettingError(
                    explain(
                        f"{caller}({type(model).__name__}) got the model as it was before prepare(), which made a "
                        "wrapper of it.",
                        accepted="the model that prepare() returned",
                        remedy="Assign the result: model = accelerator.prepare(model).",
                    )
                )


def _inner(model: Any) -> Any:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _keep(kept: list[Any], item: Any) -> None:
    if not any(item is other for other in kept):
        kept.append(item)
