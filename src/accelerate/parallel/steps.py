"""The steps that strategies put together in their recipes.

A step takes the plan and the job, and changes results in place. It asks nothing about the kind of strategy.
"""

from __future__ import annotations

import sys
from typing import Any

from ..core.seam import seam
from ..data.global_batch import check_combination, describe
from ..data.prepare import prepare_data_loader
from ..runtime.accumulation import GradientState
from ..stepping.optimizer import AcceleratedOptimizer
from ..stepping.schedule import Pass, length_of_loader, pass_over
from ..stepping.scheduler import AcceleratedScheduler, own_optimizer
from .compile import compile_model
from .job import Job
from .plan import ParallelPlan
from .unwrap import extract_model_from_parallel, is_compiled_module


def place_models(plan: ParallelPlan, job: Job) -> None:
    """Move models to this process's device. Parameters keep their identity, so optimizers stay right."""
    for slot in job.fresh(job.models):
        if slot.place and getattr(slot.result, "hf_device_map", None) is None:
            slot.result = slot.result.to(plan.runtime.device)


def wrap_precision(plan: ParallelPlan, job: Job) -> None:
    """Let models compute in the run's precision."""
    for slot in job.fresh(job.models):
        # Inside a wrapper that the user made: there its precision is taken off again, and set but once.
        plan.precision.wrap(
            slot.result if is_compiled_module(slot.result) else extract_model_from_parallel(slot.result)
        )


def compile_models(plan: ParallelPlan, job: Job) -> None:
    """Compile models, if asked for."""
    for slot in job.fresh(job.models):
        slot.result = compile_model(slot.result, plan.settings.compile)


def wrap_optimizers(plan: ParallelPlan, job: Job) -> None:
    """Let optimizers step at the end of a window of accumulation, in the run's precision."""
    for slot in job.fresh(job.optimizers):
        if not isinstance(slot.result, AcceleratedOptimizer):
            slot.result = AcceleratedOptimizer(slot.result, device_placement=slot.place, scaler=plan.precision.scaler)


def shard_loaders(plan: ParallelPlan, job: Job) -> None:
    """Give each process its share of the data."""
    data = plan.settings.data
    if data.global_batch_size is not None:
        check_combination(
            data.global_batch_size,
            accumulation_steps=_accumulation_steps(),
            split_batches=data.split_batches,
        )
    prepare = seam("accelerate.data_loader", "prepare_data_loader", prepare_data_loader)
    for slot in job.fresh(job.loaders):
        slot.result = prepare(
            slot.result,
            plan.runtime.device,
            num_processes=plan.runtime.process.world_size,
            process_index=plan.runtime.process.rank,
            split_batches=data.split_batches,
            put_on_device=slot.place,
            rng_types=[kind.value for kind in plan.settings.rng_types],
            dispatch_batches=data.dispatch_batches,
            even_batches=data.even_batches,
            slice_fn_for_dispatch=slot.slice_fn,
            use_seedable_sampler=data.use_seedable_sampler,
            data_seed=data.data_seed,
            non_blocking=data.non_blocking,
            use_stateful_dataloader=data.use_stateful_dataloader,
            global_batch_size=data.global_batch_size,
            prefetch=data.prefetch,
        )
    if data.global_batch_size is not None and plan.runtime.process.rank == 0:
        _tell_global_batch(plan, [slot.result for slot in job.fresh(job.loaders)])


def _tell_global_batch(plan: ParallelPlan, loaders: list[Any]) -> None:
    """Say how a global batch comes about; of several loaders for the longest, which is the one for training."""
    told = [(length_of_loader(loader), loader.global_batch) for loader in loaders if loader.global_batch is not None]
    if told:
        length, batches = max(told, key=lambda one: one[0] or 0)
        print(describe(batches, batches=length, lr_unit="optimizer step"), file=sys.stderr, flush=True)


def wrap_schedulers(plan: ParallelPlan, job: Job) -> None:
    """Let schedulers follow their optimizer, in the unit that the settings say or imply."""
    shards = _schedule_shards(plan)
    known = [*job.earlier_optimizers, *(slot.result for slot in job.optimizers)]
    for slot in job.fresh(job.schedulers):
        slot.result = AcceleratedScheduler(
            slot.result,
            own_optimizer(slot.result, known) or job.earlier_optimizers,  # which grows: it may be prepared later
            step_with_optimizer=plan.settings.step_scheduler_with_optimizer,
            split_batches=plan.settings.data.split_batches,
            shards=shards,
            units=plan.settings.scheduler_units,
            one_pass=_longest_pass(plan, job, shards),
        )


def _schedule_shards(plan: ParallelPlan) -> int:
    # A global batch size makes the optimizer step of a single process out of any number of ranks.
    return 1 if plan.settings.data.global_batch_size is not None else plan.data_shards


def _longest_pass(plan: ParallelPlan, job: Job, shards: int) -> Pass | None:
    """Return the optimizer steps of a pass over the longest loader there is, which is the one for training."""
    steps = _accumulation_steps()
    given = {id(slot.result): slot.given for slot in job.fresh(job.loaders)}
    found = [
        pass_over(loader, shards, steps, length_of_loader(given.get(id(loader))))
        for loader in [*job.earlier_loaders, *(slot.result for slot in job.loaders)]
    ]
    return max((one for one in found if one is not None), key=lambda one: one.alone, default=None)


def _accumulation_steps() -> int:
    # Not the plan's, since `accelerator.gradient_accumulation_steps` can be set; nor a loader's, which may be running.
    return GradientState().plugin_kwargs.get("num_steps", 1)
