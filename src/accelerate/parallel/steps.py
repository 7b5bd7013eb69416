"""The steps that strategies put together in their recipes.

A step takes the plan and the job, and changes results in place. It asks nothing about the kind of strategy.
"""

from __future__ import annotations

from ..core.seam import seam
from ..data.prepare import prepare_data_loader
from ..stepping.optimizer import AcceleratedOptimizer
from ..stepping.scheduler import AcceleratedScheduler
from .compile import compile_model
from .job import Job, Slot
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
        )


def wrap_schedulers(plan: ParallelPlan, job: Job) -> None:
    """Let schedulers follow their optimizer."""
    optimizers = [*job.earlier_optimizers, *(slot.result for slot in job.optimizers)]
    for slot in job.fresh(job.schedulers):
        slot.result = AcceleratedScheduler(
            slot.result,
            _optimizers_of(slot, optimizers),
            step_with_optimizer=plan.settings.step_scheduler_with_optimizer,
            split_batches=plan.settings.data.split_batches,
        )


def _optimizers_of(slot: Slot, optimizers: list[AcceleratedOptimizer]) -> list[AcceleratedOptimizer]:
    wanted = getattr(slot.given, "optimizer", None)
    own = [item for item in optimizers if wanted is item or wanted is getattr(item, "optimizer", None)]
    return own[:1] or optimizers
