"""Data parallelism: each process holds the whole model, and gradients are averaged in backward.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import SettingError, explain
from ..settings import env
from ..settings.options.handlers import DistributedDataParallelKwargs
from . import steps
from .base import Step, Strategy
from .job import Job
from .plan import ParallelPlan
from .unwrap import unwrap_compiled


class DataParallel(Strategy):
    """Torch's `DistributedDataParallel`, on any device with a backend."""

    def check(self, job: Job) -> None:
        super().check(job)
        for slot in job.fresh(job.models):
            _refuse_spread(slot.given)

    def steps(self) -> tuple[Step, ...]:
        return (
            steps.place_models,
            steps.wrap_precision,
            self.wrap_models,  # after precision: the wrapper must see the forward that really runs
            steps.compile_models,  # after wrapping: the compiler then places its graph breaks at bucket borders
            steps.wrap_optimizers,
            steps.shard_loaders,
            steps.wrap_schedulers,
        )

    def wrap_models(self, plan: ParallelPlan, job: Job) -> None:
        """Wrap models that have something to train. Collective: parameters are copied from rank 0."""
        options = plan.settings.handlers.ddp or DistributedDataParallelKwargs()
        for slot in job.fresh(job.models):
            if isinstance(slot.result, DistributedDataParallel):  # by the user, or by an Accelerator before this
                _note_first_run(slot.result)
                continue
            if slot.evaluation_only:
                continue
            if any(parameter.requires_grad for parameter in slot.result.parameters()):
                plan.runtime.collectives.check("prepare", None)  # torch's wrapper talks by itself
                slot.result = _wrap(slot.result, plan, options, placed=slot.place)

    def is_complete(self, model: torch.nn.Module) -> bool:
        return _wrapper_of(model) is not None or not any(p.requires_grad for p in model.parameters())

    def no_sync(self, models: Sequence[torch.nn.Module]) -> AbstractContextManager[Any]:
        inner = [found for model in models if (found := _wrapper_of(model)) is not None]
        if len(inner) == 1:
            return inner[0].no_sync()
        stack = ExitStack()
        for wrapper in inner:
            stack.enter_context(wrapper.no_sync())
        return stack

    def join(self, joinables: Sequence[Any]) -> AbstractContextManager[Any]:
        members: list[Any] = [_wrapper_of(item) or item for item in joinables]
        others = [type(item).__name__ for item in members if not isinstance(item, Joinable)]
        if others:
            raise SettingError(
                explain(
                    f"join_uneven_inputs got objects that cannot be joined: {', '.join(others)}.",
                    accepted="models that prepare() returned",
                    remedy="Pass [model] with the prepared model.",
                )
            )
        return Join(members)

    def keep_forward_local(self, models: Sequence[torch.nn.Module], alone: Callable[[], bool]) -> None:
        # Forward is collective too: it sends buffers, and in the second step how gradients are bundled.
        for model in models:
            wrapper = _wrapper_of(model)
            if wrapper is None:
                continue
            if not isinstance(wrapper.forward, _LocalForward):
                wrapper.forward = _LocalForward(wrapper)
            wrapper.forward.alone = alone

    def check_first_backward(self, models: Sequence[torch.nn.Module]) -> None:
        wrappers = [found for model in models if (found := _wrapper_of(model)) is not None]
        if wrappers and not any(wrapper._accelerate_ran for wrapper in wrappers):
            name = type(wrappers[0].module).__name__
            raise SettingError(
                explain(
                    f"backward() was called before the prepared {name} ran: the loss comes from a model that prepare() "
                    "did not return, so its gradients would not be averaged over the "
                    f"{self.plan.runtime.process.world_size} processes.",
                    accepted="a loss computed with what prepare() returned",
                    remedy="Assign the result: model, optimizer = accelerator.prepare(model, optimizer).",
                )
            )


def verify_device_map(model: torch.nn.Module) -> bool:
    """Tell whether a model is spread over several devices of one process."""
    return any(len(getattr(module, "hf_device_map", None) or ()) > 1 for module in model.modules())


def _refuse_spread(model: torch.nn.Module) -> None:
    if verify_device_map(model) and env.get("ACCELERATE_BYPASS_DEVICE_MAP") != "true":
        raise SettingError(
            explain(
                f"{type(model).__name__} was loaded with a device_map over several devices.",
                accepted="a whole model on one device for each process",
                remedy="Load it without device_map='auto', or start the script with one process: "
                "accelerate launch --num_processes 1 script.py",
            )
        )


def _wrap(
    model: torch.nn.Module,
    plan: ParallelPlan,
    options: DistributedDataParallelKwargs,
    *,
    placed: bool,
) -> DistributedDataParallel:
    kwargs = {key: value for key, value in options.to_kwargs().items() if key in options.to_dict()}
    device = plan.runtime.device
    if placed and plan.runtime.hardware.needs_placement and not verify_device_map(model):
        kwargs.update(device_ids=[device.index], output_device=device.index)
    wrapper = DistributedDataParallel(model, **kwargs)
    options.register_comm_hook(wrapper)
    _note_first_run(wrapper)
    return wrapper


def _note_first_run(wrapper: DistributedDataParallel) -> None:
    wrapper._accelerate_ran = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def note_and_remove(module: torch.nn.Module, args: Any) -> None:
        module._accelerate_ran = True  # pyright: ignore[reportArgumentType]
        hook.remove()

    hook = wrapper.register_forward_pre_hook(note_and_remove)


class _LocalForward:
    """The forward of a wrapper that may leave the other ranks alone. A copy of the wrapper has torch's again."""

    alone: Callable[[], bool]

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = wrapper
        self._with_others = wrapper.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper.module(*args, **kwargs) if self.alone() else self._with_others(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward_of, (self._wrapper,)


def _forward_of(wrapper: DistributedDataParallel) -> Any:
    return MethodType(type(wrapper).forward, wrapper)


def _wrapper_of(model: Any) -> DistributedDataParallel | None:
    model = unwrap_compiled(model)
    return model if isinstance(model, DistributedDataParallel) else None


@contextmanager
def sync_in_backward(model: torch.nn.Module) -> Iterator[None]:
    """Run the body, whose backward synchronises although the forward ran under `no_sync`.

    Raises:
        SettingError: (a `ValueError`) if the model was wrapped with `find_unused_parameters=True`.
    """
    wrapper = _wrapper_of(model)
    if wrapper is None:
        yield
        return
    if wrapper.find_unused_parameters:
        raise SettingError(
            explain(
                "trigger_sync_in_backward cannot serve a model with find_unused_parameters=True: which parameters were "
                "used is found out in a forward that synchronises.",
                remedy="Run the last forward of the window outside no_sync.",
            )
        )
    before = wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync
    # What the forward would have done, had it not run under no_sync.
    wrapper.require_backward_grad_sync = True
    wrapper.require_forward_param_sync = True
    wrapper.reducer.prepare_for_backward([])
    try:
        yield
    finally:
        wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = before
