"""`Accelerator`, the façade over everything: four lines make a training loop run anywhere.

Owns no logic: each method hands over to the layer that has it. Sections: set-up, process control, prepare, step,
gather, save, end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import torch
from torch.utils.hooks import RemovableHandle

from . import precision
from .checkpoint import weights
from .checkpoint.background import SaveHandle
from .core.enums import DistributedType, FP8BackendType, PrecisionType, RNGType
from .core.errors import AccelerateError, CheckpointError, SettingError, explain
from .data.resume import skip_first_batches
from .parallel.choose import choose
from .parallel.ddp import sync_in_backward, verify_device_map
from .parallel.plan import ParallelPlan
from .parallel.unwrap import extract_model_from_parallel
from .runtime import ops, preemption, resuming
from .runtime.accumulation import GradientState
from .runtime.log import get_logger
from .runtime.memory import clear_device_cache
from .runtime.rng import check_fit
from .runtime.state import Runtime
from .session import metrics, uneven
from .session import preempt as session_preempt
from .session import prepare as session_prepare
from .session import profile as session_profile
from .session import remote as session_remote
from .session import save as session_save
from .session.session import Session
from .session.state import AcceleratorState
from .session.views import ListView, SettingView, StepView
from .settings import env
from .settings.arguments import UNSET, resolve, rng_types_from, whole_number
from .settings.bag import KwargsHandler
from .settings.options import absent
from .settings.options.accumulation import GradientAccumulationPlugin
from .settings.options.compile import TorchDynamoPlugin
from .settings.options.data import DataLoaderConfiguration
from .settings.options.handlers import AutocastKwargs, GradScalerKwargs, InitProcessGroupKwargs, ProfileKwargs
from .settings.options.project import ProjectConfiguration
from .settings.settings import Settings
from .stepping import clip
from .stepping.optimizer import AcceleratedOptimizer
from .stepping.scheduler import AcceleratedScheduler

logger = get_logger(__name__)


class Accelerator:
    """Runs a plain PyTorch training loop on whatever it was started on.

    Creating one detects where the process runs and joins the other processes; that is collective. A further one in
    the same process shares the state of the first.

    Args:
        device_placement: Move models and batches to the device.
        split_batches: Cut each batch over the processes; the same as in `DataLoaderConfiguration`.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`; by default what ACCELERATE_MIXED_PRECISION says, or `"no"`.
        gradient_accumulation_steps: Number of batches for each optimizer step.
        cpu: Compute on the CPU although there is an accelerator.
        dataloader_config: How loaders are sharded.
        deepspeed_plugin: Needs an engine this version does not have, as do `fsdp_plugin`, `torch_tp_plugin`,
            `megatron_lm_plugin`, `deepspeed_plugins`, `parallelism_config` and `log_with`; each raises.
        rng_types: Which random generators ranks synchronise when a pass over a loader begins, as values of
            `RNGType`; `["generator"]` by default, the sampler's own.
        project_dir: Folder for what the run writes.
        project_config: Folders and naming of checkpoints.
        gradient_accumulation_plugin: Options of accumulation, in place of `gradient_accumulation_steps`.
        step_scheduler_with_optimizer: `False` steps prepared schedulers at each call, whatever the optimizer did.
        scheduler_units: What prepared schedulers count: `"optimizer_steps"`, as they are, or `"samples"`, in steps that a
            single process would take over them. `None` means samples by whole global steps, as in 1.x.
        kwargs_handlers: At most one of each of `AutocastKwargs`, `DistributedDataParallelKwargs`,
            `GradScalerKwargs`, `InitProcessGroupKwargs` and `ProfileKwargs`.
        dynamo_backend: Compile models with this back-end of `torch.compile`.
        dynamo_plugin: Options of compilation, in place of `dynamo_backend`.

    Raises:
        SettingError: (a `ValueError`) for a value that is not accepted, or two that contradict each other.
        WrongTypeError: (a `TypeError`) for an object of a wrong type.
        UnsupportedCombination: (a `ValueError`) for a setting whose engine this version does not have.

    Example:
        ```python
        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
        ```
    """

    # What clients read, and may assign before `prepare`.
    device_placement = SettingView("device_placement")
    dataloader_config = SettingView("data")
    project_configuration = SettingView("project")
    rng_types = SettingView("rng_types", read=lambda kinds: [kind.value for kind in kinds], write=rng_types_from)
    step_scheduler_with_optimizer = SettingView("step_scheduler_with_optimizer")
    ddp_handler = SettingView("handlers.ddp")
    profile_handler = SettingView("handlers.profile")
    _models = ListView("models")
    _optimizers = ListView("optimizers")
    _schedulers = ListView("schedulers")
    _dataloaders = ListView("dataloaders")
    _custom_objects = ListView("custom_objects")
    step = StepView()

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = UNSET,
        mixed_precision: PrecisionType | str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Sequence[str | RNGType] | None = None,
        log_with: Any = None,
        project_dir: str | Path | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[KwargsHandler] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
        scheduler_units: Literal["samples", "optimizer_steps"] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        settings = resolve(arguments, env.read())
        handlers = settings.handlers
        existed = bool(AcceleratorState._shared_state)
        self.state = AcceleratorState(
            # Only what this call asks for can contradict an earlier one; the variable was heard by that one already.
            mixed_precision=settings.mixed_precision if mixed_precision is not None else None,
            cpu=settings.cpu,
            dynamo_plugin=settings.compile,
            _from_accelerator=True,
            **(handlers.init.to_kwargs() if handlers.init else {}),
        )
        try:
            plan = self._plan(settings)
            self._session = Session(plan, choose(plan))
            session_preempt.watch_signals(self._session, self.save_state)
        except AccelerateError:
            if not existed:  # a call that failed must leave nothing for the next one to contradict
                AcceleratorState._reset_state()
            raise
        self._keep_public_attributes(plan)

    def _plan(self, settings: Settings) -> ParallelPlan:
        runtime: Runtime = self.state._runtime
        check_fit(settings.rng_types, runtime.hardware)
        origin = settings.origin.get("mixed_precision", "")
        chosen = precision.choose(
            PrecisionType(self.state.mixed_precision),
            runtime.hardware,
            autocast=settings.handlers.autocast,
            scaler=settings.handlers.scaler,
            origin=f" ({origin})" if origin else "",
        )
        return ParallelPlan(settings=settings, runtime=runtime, precision=chosen)

    def _keep_public_attributes(self, plan: ParallelPlan) -> None:
        self.gradient_state = GradientState(gradient_accumulation_plugin=plan.settings.accumulation)
        self.gradient_state.sync_gradients = True  # an earlier run may have been broken off inside a window
        # Defaults are left out of plugin_kwargs, yet readers expect the number of steps there.
        self.gradient_state.plugin_kwargs.setdefault("num_steps", 1)
        self._precision = plan.precision
        self.native_amp = plan.precision.uses_autocast
        self.flag_tensor: torch.Tensor | None = None
        self.trackers: list[Any] = []
        self.log_with: list[Any] = []
        self._backward_ran = plan.runtime.process.world_size == 1
        # Engines that this version does not have; clients ask for them.
        self.fp8_recipe_handler = self.te_recipe_handler = self.msamp_recipe_handler = self.ao_recipe_handler = None
        self.fp8_enabled = self.has_fp8_handler = self.has_lomo_optimizer = self.delayed_fp8_autocast = False
        self.deepspeed_engine_wrapped = None

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16; `None` in other precisions."""
        return self._precision.scaler

    @property
    def scaler_handler(self) -> GradScalerKwargs | None:
        """The options the loss scaler was made with."""
        return self._session.plan.settings.handlers.scaler

    @property
    def init_handler(self) -> InitProcessGroupKwargs | None:
        """The options the process group was made with."""
        return self._session.plan.settings.handlers.init

    @property
    def autocast_handler(self) -> AutocastKwargs | None:
        """The options of autocast; may be assigned at any time."""
        return self._session.plan.settings.handlers.autocast

    @autocast_handler.setter
    def autocast_handler(self, options: AutocastKwargs | None) -> None:
        settings = self._session.plan.settings
        handlers = dataclasses.replace(settings.handlers, autocast=options)
        self._session.change(dataclasses.replace(settings, handlers=handlers))
        self._precision.set_options(options)

    # Process control ---------------------------------------------------------------------------------------------

    @property
    def distributed_type(self) -> DistributedType:
        """How this run is distributed, as one word."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """Number of processes of the run."""
        return self.state.num_processes

    @property
    def process_index(self) -> int:
        """The rank of this process among all."""
        return self.state.process_index

    @property
    def local_process_index(self) -> int:
        """The rank of this process on its machine."""
        return self.state.local_process_index

    @property
    def device(self) -> torch.device:
        """The device this process computes on."""
        return self.state.device

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.state.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.state.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self.state.is_last_process

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.state.use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether the run uses several accelerators by plain data parallelism."""
        return (
            self.use_distributed
            and self.distributed_type.value.startswith("MULTI_")
            and self.state._runtime.hardware.needs_placement
        )

    @property
    def mixed_precision(self) -> str:
        """The precision of the run: `"no"`, `"bf16"` or `"fp16"`."""
        return self.state.mixed_precision

    def wait_for_everyone(self) -> None:
        """Return once every rank has come. Called on all ranks; collective."""
        self.state.wait_for_everyone()

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on rank 0, then on the others. Called on all ranks; collective."""
        return self.state.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on each machine's first process, then on the others. Called on all ranks; collective."""
        return self.state.local_main_process_first()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Give each rank its share of some inputs; see `PartialState.split_between_processes`."""
        return self.state.split_between_processes(inputs, apply_padding=apply_padding)

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on rank 0 only; the others get `None`."""
        return self._partial_state.on_main_process(function)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on the first process of each machine only."""
        return self._partial_state.on_local_main_process(function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run on the last rank only."""
        return self._partial_state.on_last_process(function)

    def on_process(
        self,
        function: Callable[..., Any] | None = None,
        process_index: int | None = None,
    ) -> Callable[..., Any]:
        """Decorate a function to run on one rank only."""
        return self._partial_state.on_process(function, process_index=process_index)

    def on_local_process(
        self,
        function: Callable[..., Any] | None = None,
        local_process_index: int | None = None,
    ) -> Callable[..., Any]:
        """Decorate a function to run on one process of each machine only."""
        return self._partial_state.on_local_process(function, local_process_index=local_process_index)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first process of each machine only."""
        self.state.print(*args, **kwargs)

    @property
    def _partial_state(self) -> Any:
        from .runtime.partial_state import PartialState

        return PartialState()

    # Prepare -----------------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Make models, optimizers, loaders and schedulers ready for this run, in any order and number.

        Called on all ranks, with the same objects; collective with several processes.

        Args:
            *args: What to prepare. Objects of other kinds come back as they are, prepared ones too.
            device_placement: For each object whether to move it to the device; `None` follows the `Accelerator`.

        Returns:
            The prepared objects in the order of the arguments; one alone is not in a tuple. Use these from now on.

        Raises:
            SettingError: (a `ValueError`) if the objects cannot work together.
        """
        return session_prepare.prepare(self._session, args, device_placement)

    def prepare_model(
        self,
        model: torch.nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> torch.nn.Module:
        """Prepare one model; see `prepare`.

        Args:
            model: The model.
            device_placement: Whether to move it to the device; `None` follows the `Accelerator`.
            evaluation_mode: The model will not be trained, so its gradients need not be averaged.
        """
        return session_prepare.prepare_one(self._session, model, device_placement, evaluation_only=evaluation_mode)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Prepare one optimizer; see `prepare`."""
        return session_prepare.prepare_one(self._session, optimizer, device_placement)

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare one scheduler, of any class that steps like torch's; see `prepare`."""
        return session_prepare.prepare_scheduler(self._session, scheduler)

    def prepare_data_loader(
        self,
        data_loader: torch.utils.data.DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> torch.utils.data.DataLoader[Any]:
        """Prepare one loader; see `prepare`.

        Args:
            data_loader: The loader.
            device_placement: Whether batches are moved to the device; `None` follows the `Accelerator`.
            slice_fn_for_dispatch: With `dispatch_batches`, takes the rows of one process from a batch, as
                `accelerate.utils.slice_tensors` does.
        """
        return session_prepare.prepare_one(self._session, data_loader, device_placement, slice_fn=slice_fn_for_dispatch)

    def unwrap_model(
        self,
        model: torch.nn.Module,
        keep_fp32_wrapper: bool = True,
        keep_torch_compile: bool = True,
    ) -> torch.nn.Module:
        """Return the model inside the wrappers of `prepare`, as for saving.

        Args:
            model: Any model; one without wrappers comes back as it is.
            keep_fp32_wrapper: `False` takes the run's precision off the model, in place.
            keep_torch_compile: Return a compiled model compiled.
        """
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def verify_device_map(self, model: torch.nn.Module) -> bool:
        """Tell whether the model is spread over several devices of this process."""
        return verify_device_map(model)

    def skip_first_batches(
        self, dataloader: torch.utils.data.DataLoader[Any], num_batches: int = 0
    ) -> torch.utils.data.DataLoader[Any]:
        """Return a loader over the rest of each pass, without its first `num_batches`."""
        return skip_first_batches(dataloader, num_batches=num_batches)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget what was prepared, collect garbage and give the device's cache back.

        Returns:
            As many `None` as there are arguments, to assign them to: `model, optimizer = free_memory(model, optimizer)`.

        Raises:
            CheckpointError: When all is done, if a save in the background failed and this rank has not heard of it.
        """
        count = len(objects)
        del objects  # or this frame would hold them while memory is collected
        try:
            self._session.forget()
        finally:
            self.gradient_state.sync_gradients = True
            clear_device_cache(garbage_collection=True)
        return [None] * count

    def clear(self, *objects: Any) -> list[None]:
        """The same as `free_memory`."""
        return self.free_memory(*objects)

    # Step --------------------------------------------------------------------------------------------------------

    @property
    def sync_gradients(self) -> bool:
        """Whether gradients are synchronised, and optimizers step, in this batch."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state.sync_gradients = sync_gradients

    @property
    def gradient_accumulation_steps(self) -> int:
        """Number of batches for each optimizer step; a global batch size decides it, and refuses another."""
        return self._session.accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, gradient_accumulation_steps: int) -> None:
        self._session.accumulation_steps = whole_number(gradient_accumulation_steps, "gradient_accumulation_steps")

    def accumulate(self, *models: torch.nn.Module, num_steps: int | None = None) -> AbstractContextManager[Any]:
        """Return the region for one batch; at the end of each window gradients synchronise and optimizers step.

        Args:
            *models: The prepared models that are trained in the region. Each set of models has windows of its own.
            num_steps: Batches in a window of these models; `None` means `gradient_accumulation_steps`.

        Example:
            ```python
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = loss_function(model(inputs), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            ```
        """
        return self._session.windows.begin(models, num_steps)

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a region whose backward keeps gradients on each rank; does nothing with one process."""
        self._session.check_is_prepared((model,), "no_sync")
        return self._session.strategy.no_sync((model,))

    @staticmethod
    def trigger_sync_in_backward(model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a region whose backward synchronises, although the forward ran under `no_sync`."""
        return sync_in_backward(model)

    def backward(self, loss: torch.Tensor, *, num_items: int | torch.Tensor | None = None, **kwargs: Any) -> None:
        """Compute gradients of the loss, divided by the number of batches in the window. Use in place of
        `loss.backward()`.

        Args:
            loss: The loss of this rank's batch.
            num_items: Over how many items (tokens, say) of this batch the loss is a mean. Gradients at each optimizer
                step are then those of one batch of all items of the window, on all ranks; collective at its end.
            **kwargs: As for `torch.Tensor.backward`.
        """
        session = self._session
        if not self._backward_ran:
            session.strategy.check_first_backward(session.prepared_models)
            self._backward_ran = True
        if session.uneven:
            uneven.check_backward(session, joinable=num_items is None)
        session.windows.backward(loss, num_items, **kwargs)

    def clip_grad_norm_(
        self,
        parameters: torch.Tensor | Iterator[torch.Tensor] | Sequence[torch.Tensor],
        max_norm: float,
        norm_type: float = 2,
    ) -> torch.Tensor:
        """Clip the norm of all gradients together. Use in place of `torch.nn.utils.clip_grad_norm_`.

        Clips in every batch it is called in; call it `if accelerator.sync_gradients` to clip whole windows only.

        Returns:
            The norm before clipping, a tensor without dimensions.
        """
        held, scale = self._true_size(parameters)
        return clip.clip_norm(held, max_norm, norm_type, scale)

    def clip_grad_value_(
        self,
        parameters: torch.Tensor | Iterator[torch.Tensor] | Sequence[torch.Tensor],
        clip_value: float,
    ) -> None:
        """Clip each element of the gradients. Use in place of `torch.nn.utils.clip_grad_value_`."""
        held, scale = self._true_size(parameters)
        clip.clip_value(held, clip_value, scale)

    def _true_size(self, parameters: Any) -> tuple[list[torch.Tensor], float]:
        held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        scaling = self._session.scaling
        if scaling is None:
            return held, 1.0
        optimizers = [optimizer.optimizer for optimizer in self._optimizers]
        return held, clip.remaining_scale(scaling, held, optimizers, sync_gradients=self.sync_gradients)

    def unscale_gradients(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ) -> None:
        """Bring gradients to their true size under fp16, once for each step; does nothing otherwise.

        Args:
            optimizer: One or several prepared optimizers; `None` means all.
        """
        scaling = self._session.scaling
        if scaling is None:
            return
        if not self.sync_gradients:
            raise SettingError(
                explain(
                    "unscale_gradients() was called inside a window of accumulation: the gradients to come are scaled, and "
                    "would be added to unscaled ones.",
                    accepted="a call in the last batch of the window",
                    remedy="Write: if accelerator.sync_gradients: accelerator.unscale_gradients().",
                )
            )
        chosen: Any = self._session.windows.closed(self._optimizers) if optimizer is None else optimizer
        chosen = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        scaling.unscale(getattr(item, "optimizer", item) for item in chosen)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether any optimizer's last step changed nothing because gradients had overflowed."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Return a region that computes in the run's precision, for code outside a prepared model."""
        return self._precision.autocast(autocast_handler)

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> AbstractContextManager[None]:
        """Return a region in which ranks may run out of batches at different times. Called on all ranks.

        Args:
            joinables: The prepared models that are trained in the region.
            even_batches: Override `even_batches` of all prepared loaders over map-style datasets inside it.
        """
        return uneven.join_uneven_inputs(self._session, joinables, even_batches)

    def set_trigger(self) -> None:
        """Set a flag on this rank, for `check_trigger` to see on all."""
        self.flag_tensor = torch.ones(1, device=self.device)

    def check_trigger(self) -> bool:
        """Tell whether any rank has set the flag, and clear it. Called on all ranks; collective.

        A flag that is set while the ranks talk, as a signal handler may do, counts the next time.
        """
        flag = self.flag_tensor
        if flag is None:
            flag = torch.zeros(1, device=self.device)
        else:  # not where there was none: a signal may have set it just now
            self.flag_tensor = None
        return bool(ops.reduce(flag, reduction="sum").item() >= 1)

    def profile(self, profile_handler: ProfileKwargs | None = None) -> AbstractContextManager[Any]:
        """Return a region under `torch.profiler`, which yields the profiler."""
        options = profile_handler or self.profile_handler or ProfileKwargs()
        return session_profile.profile(self.state._runtime, options)

    def check_preemption(self) -> None:
        """Let the run save itself and end here, if a signal has asked for it. Called on all ranks.

        Loops over prepared loaders do so between the batches they train on. Call it where else a resumed script goes on
        rightly: in loops without prepared loaders, or in a long evaluation, which it does not repeat then. Inside a loop
        that trains, before its batch is trained on, it does nothing: the run stops behind that batch. Costs nothing while
        no signal of `ProjectConfiguration.save_on_signals` has come; then it is collective.

        Raises:
            Preempted: (a `SystemExit`) on all ranks, when everything is saved.
        """
        session_preempt.check()

    # Gather ------------------------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Return the tensors of all ranks joined along dimension 0; see `accelerate.utils.gather`. Collective."""
        return ops.gather(tensor)

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False, *, pad_index: int = 0, dataloader: Any = None
    ) -> Any:
        """Return the data of all ranks: each sample once, in order, without what padded the step. Collective.

        It is called inside a loop over a prepared loader, on the ranks that are in the loop. Outside of one, nothing is
        cut.

        Args:
            input_data: Nested tensors with one row (or `k` rows) for each sample, or a list with as many objects, which
                travel pickled. Tensors without dimensions are one value for each rank.
            use_gather_object: Send a tensor's rows, or a list with a tensor for each sample, as objects too.
            pad_index: What fills up tensors whose dimensions after the first differ between ranks.
            dataloader: The prepared loader whose batch the data was computed from, where several are iterated side by
                side; by default the innermost.

        Raises:
            SettingError: (a `ValueError`) if it cannot be told what of the data is padding, or which loader it is from.
            WrongTypeError: (a `TypeError`) with several processes, for a mapping, or a tuple of parts with rows, that
                would have to travel as objects.
            DistributedOperationException: If ranks bring different structures, dtypes or numbers of dimensions.
            UnevenStepError: (a `RuntimeError`) if a rank has no batch in this step of another loop.
        """
        return metrics.gather_for_metrics(
            self.gradient_state, input_data, use_gather_object, pad_index=pad_index, dataloader=dataloader
        )

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Return the sum or mean over all ranks, times `scale`; see `accelerate.utils.reduce`. Collective."""
        return ops.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors to the longest of all ranks; see `accelerate.utils.pad_across_processes`. Collective."""
        return ops.pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    # Save --------------------------------------------------------------------------------------------------------

    @property
    def project_dir(self) -> str | None:
        """Folder for what the run writes."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Folder for experiment logs."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next checkpoint."""
        return self.project_configuration.iteration

    @property
    def should_save_model(self) -> bool:
        """Whether this process writes what all share."""
        return session_save.leads_on_disk(self.state._runtime, self.project_configuration)

    def save(self, obj: Any, f: str | Path, safe_serialization: bool = False) -> None:
        """Write an object on the main process only, or on each machine's if the project says so.

        Args:
            obj: Anything `torch.save` takes, or tensors by name with `safe_serialization`.
            f: The file.
            safe_serialization: Write safetensors in place of torch's pickle-based format.
        """
        weights.save(obj, f, self.project_configuration.save_on_each_node, safe_serialization)

    def save_model(
        self,
        model: torch.nn.Module,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights, in the form that other tools read. Called on all ranks; collective.

        Args:
            model: The model, prepared or not.
            save_directory: The folder, made if missing, or an address such as `"s3://bucket/weights"`.
            max_shard_size: Largest size of one file, in bytes or such as `"5GB"`; more files get an index.
            safe_serialization: `False` writes torch's pickle-based format.
        """
        session_remote.save_model(
            self.get_state_dict(model),
            save_directory,
            self.state._runtime.collectives,
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
        )

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        """Return a model's whole state, named as before `prepare` unless `unwrap` is `False`."""
        return (extract_model_from_parallel(model, keep_torch_compile=False) if unwrap else model).state_dict()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load further objects with the run, by their `state_dict` and `load_state_dict`.

        Raises:
            SettingError: (a `ValueError`) if an object lacks one of them; none is registered then.
        """
        lacking = [item for item in objects if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict"))]
        if lacking:
            raise SettingError(
                explain(
                    f"register_for_checkpointing got {lacking[0]!r:.80}, of type {type(lacking[0]).__name__}.",
                    accepted="objects with state_dict() and load_state_dict(state)",
                    remedy="Give its class the two methods, or wrap it in one that has them.",
                )
            )
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call `hook(models, weights, folder)` on all ranks before `save_state` writes.

        What a hook takes out of the list `weights` is not written.

        Returns:
            A handle whose `remove()` takes the hook off.
        """
        handle = RemovableHandle(self._session.save_hooks)
        self._session.save_hooks[handle.id] = hook
        return handle

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call `hook(models, folder)` on all ranks before `load_state` reads.

        What a hook takes out of the list `models` is not loaded.

        Returns:
            A handle whose `remove()` takes the hook off.
        """
        handle = RemovableHandle(self._session.load_hooks)
        self._session.load_hooks[handle.id] = hook
        return handle

    @overload
    def save_state(
        self,
        output_dir: str | Path | None = None,
        safe_serialization: bool = True,
        *,
        blocking: Literal[True] = True,
        allow_pickle: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | str: ...

    @overload
    def save_state(
        self,
        output_dir: str | Path | None = None,
        safe_serialization: bool = True,
        *,
        blocking: bool,
        allow_pickle: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | str | SaveHandle: ...

    def save_state(
        self,
        output_dir: str | Path | None = None,
        safe_serialization: bool = True,
        *,
        blocking: bool = True,
        allow_pickle: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | str | SaveHandle:
        """Save everything the run needs to continue. Called on all ranks; collective.

        Args:
            output_dir: The folder, or an address such as `"s3://bucket/run"`; needless with automatic naming.
            safe_serialization: `False` writes model weights in torch's pickle-based format.
            blocking: `False` returns as soon as everything is copied to memory, and writes while training goes on.
                One such save runs at a time: the next one, `load_state`, `end_training` and the end of the script
                wait for it. The memory for the copies is kept for the next save.
            allow_pickle: Keep a state that JSON and tensors cannot express, such as one with objects of your own, as a
                pickle. `load_state` needs the same argument then. Saves on signals do without.
            **save_model_func_kwargs: None is known to the formats of this version.

        Returns:
            The folder, or the address; with `blocking=False` a handle, whose `wait()` returns it when it is complete.

        Raises:
            WrongTypeError: (a `TypeError`) if there is neither a folder nor automatic naming, or an unknown keyword.
            CheckpointError: On all ranks, if any rank failed; nothing has changed then. A save in the background that
                has failed raises in its handle, or in the next of the calls that wait for it.
        """
        _refuse_keywords("save_state", save_model_func_kwargs)
        resuming.check("save_state() was called")
        session = self._session
        if session.scaling is not None:
            session.scaling.update_if_waiting()
        save = session_remote.saver(output_dir, self.project_configuration)
        handle = save(
            session.contents,
            folder=output_dir,
            project=self.project_configuration,
            step=self.step,
            windows=session.windows.state_dict(),
            runtime=self.state._runtime,
            saving=session.saving,
            get_model_state=self.get_state_dict,
            pre_hooks=list(session.save_hooks.values()),
            safe_serialization=safe_serialization,
            blocking=blocking,
            allow_pickle=allow_pickle,
        )
        return handle.folder if blocking else handle

    def load_state(
        self,
        input_dir: str | Path | None = None,
        load_kwargs: dict[str, Any] | None = None,
        verify: Literal["full", "size", "off"] = "full",
        *,
        allow_pickle: bool = False,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Load what `save_state` wrote into the prepared objects. Called on all ranks; collective.

        Args:
            input_dir: The folder or address; with automatic naming `None` takes the newest complete one, and says which.
            load_kwargs: Keywords for `load_state_dict` of models, as are `load_model_func_kwargs`.
            verify: What is compared with the manifest first: the content of all files (`"full"`), their sizes
                (`"size"`), or nothing (`"off"`). Without a folder, damaged checkpoints are passed over with a warning.
            allow_pickle: Also read states that were saved with this argument. They may run any code: only if you trust
                whoever wrote the checkpoint. Without it they are refused before anything is loaded.
            **load_model_func_kwargs: Such as `strict=False`, which also lets other missing parts pass with a warning.

        Raises:
            SettingError: (a `ValueError`) if there is no such folder, or `verify` is unknown.
            CheckpointError: On all ranks, if something is damaged, missing, incomplete or does not fit.
        """
        session = self._session
        session.saving.background.wait()
        keywords = {**(load_kwargs or {}), **load_model_func_kwargs}
        load = session_remote.loader(input_dir, self.project_configuration)
        loaded = load(
            session.contents,
            folder=input_dir,
            project=self.project_configuration,
            runtime=self.state._runtime,
            pre_hooks=list(session.load_hooks.values()),
            strict=keywords.get("strict", True),
            verify=verify,
            load_model_kwargs=keywords,
            allow_pickle=allow_pickle,
        )
        session.restore_windows(loaded.windows, loaded.step)
        session.loaded_from = loaded.folder
        if input_dir is None:
            session_preempt.tell_loaded(session)
        resuming.fulfil()

    def resume(self, checkpoint: str | Path | None = None) -> Path | str | None:
        """Continue what the launch asks to continue. Called on all ranks, before the first batch; collective.

        Call it when everything is prepared and registered. `accelerate launch --resume auto` then continues from the
        newest complete checkpoint, or starts from the beginning, and says so, if there is none at all; `--resume FOLDER`
        from that one; without the flag it does nothing. A script that was launched with `--resume` and neither calls
        this nor `load_state` raises at its first batch.

        Args:
            checkpoint: `"auto"`, `"off"`, a folder or an address, in place of what the launch says.

        Returns:
            The folder or address that was loaded, or `None`.

        Raises:
            SettingError: (a `ValueError`) if `auto` has no folder to look in: it needs automatic naming. Also if the run
                starts from the beginning, and its first checkpoint would be refused, since its folder exists.
            CheckpointError: If there are checkpoints, and none that is complete.
        """
        return session_preempt.resume(self._session, checkpoint, self.load_state)

    # End ---------------------------------------------------------------------------------------------------------

    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Start the trackers of `log_with`, of which this version has none: there is nothing to start."""
        return None

    def log(
        self,
        values: dict[str, Any],
        step: int | None = None,
        log_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Log values to the trackers of `log_with`, of which this version has none: there is nobody to tell."""
        return None

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Return a tracker of `log_with`.

        Raises:
            SettingError: (a `ValueError`): this version has none.
        """
        raise SettingError(
            explain(
                f"There is no tracker {name!r}.",
                accepted="none: log_with was not given",
            )
        )

    def end_training(self) -> None:
        """Wait for a save that still runs, let signals have their usual effect, and leave the process group.

        Called on all ranks, at the end of the script.

        Raises:
            CheckpointError: If a save in the background failed, on each rank that has not heard of it.
        """
        try:
            self._session.saving.release()
        finally:
            preemption.stop()
            self.state.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the run and forget its state, so that another one can be set up in this process.

        After an exception the group is left to the end of the process: leaving it could wait for ranks that are gone.
        """
        try:
            self._session.forget()
        except CheckpointError:  # of a save in the background, and logged; what ended the script comes first
            if error is None:
                raise
        finally:
            try:
                if error is None:
                    self.end_training()
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()

    # Settings, and engines that this version does not have ---------------------------------------------------------

    @property
    def split_batches(self) -> bool:
        """Whether each batch is cut over the processes."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether the main process reads for all; `None` means for iterable datasets."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether all processes get the same number of samples."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether loaders shuffle by seed and epoch only."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether batches are moved without waiting."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether loaders are built on torchdata's `StatefulDataLoader`."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def deepspeed_plugin(self) -> None:
        """The active DeepSpeed options: none."""
        return None

    @property
    def parallelism_config(self) -> None:
        """The axes of the device mesh: none."""
        return None

    @property
    def torch_device_mesh(self) -> None:
        """The device mesh: none."""
        return None

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are fully sharded by torch's `fully_shard`."""
        return False

    @property
    def is_composable_parallelism_enabled(self) -> bool:
        """The same as `is_fsdp2`."""
        return self.is_fsdp2

    @property
    def fp8_backend(self) -> FP8BackendType:
        """Which library computes in eight bits: none."""
        return FP8BackendType.NO

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank along the tensor-parallel axis, of which there is none: raises `RuntimeError`."""
        raise RuntimeError(explain("There is no tensor-parallel axis: no parallelism_config was given."))

    @property
    def data_parallel_rank(self) -> int:
        """This rank along the axis of replicas of a mesh, of which there is none: raises `RuntimeError`."""
        raise RuntimeError(
            explain(
                "There is no device mesh: no parallelism_config was given.",
                remedy="Use process_index.",
            )
        )

    @property
    def data_parallel_shard_rank(self) -> int:
        """This rank along the axis of shards of a mesh, of which there is none: raises `RuntimeError`."""
        raise RuntimeError(
            explain(
                "There is no device mesh: no parallelism_config was given.",
                remedy="Use process_index.",
            )
        )

    @property
    def pipeline_parallel_rank(self) -> int:
        """This rank along the pipeline axis, of which there is none: raises `UnsupportedCombination`."""
        absent.refuse("pipeline_parallel_rank", "pipeline parallelism")

    @property
    def context_parallel_rank(self) -> int:
        """This rank along the context-parallel axis, of which there is none: raises `UnsupportedCombination`."""
        absent.refuse("context_parallel_rank", "context parallelism")

    @contextmanager
    def maybe_context_parallel(
        self,
        buffers: list[torch.Tensor] | None = None,
        buffer_seq_dims: list[int] | None = None,
        no_restore_buffers: set[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Run the body with sequences split over processes, if the run has a context-parallel axis; it has none."""
        yield

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Run backward for a LOMO optimizer, whose engine this version does not have."""
        absent.refuse("lomo_backward()", "the LOMO engine")

    def deepspeed_ulysses_dl_adapter(self, dl: Any, model: Any) -> Any:
        """Adapt a loader to DeepSpeed's sequence parallelism, whose engine this version does not have."""
        absent.refuse("deepspeed_ulysses_dl_adapter()", "the DeepSpeed engine")


def _refuse_keywords(caller: str, keywords: dict[str, Any]) -> None:
    if keywords:
        name = next(iter(keywords))
        raise TypeError(explain(f"{caller}() got {name}={keywords[name]!r:.60}, which no format here takes."))
