"""Options of torch objects that the library builds for the user. Imports torch inside methods only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from ...core.enums import DDPCommunicationHookType
from ..bag import KwargsHandler


@dataclass
class AutocastKwargs(KwargsHandler):
    """Options of `torch.autocast` for the model's forward and `Accelerator.autocast`."""

    enabled: bool = True
    """Whether autocast is on."""

    cache_enabled: bool | None = None
    """Whether casts of weights are kept within one region; `None` is torch's default."""

    outputs_to_fp32: bool = True
    """Return the model's half-precision outputs in float32. `False` leaves them, which saves a copy of each."""


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Options of `torch.nn.parallel.DistributedDataParallel`."""

    dim: int = 0
    """Dimension along which inputs are batched."""

    broadcast_buffers: bool = True
    """Copy rank 0's buffers to all before each forward."""

    bucket_cap_mb: int = 25
    """Size in MiB of the buckets in which gradients are reduced."""

    find_unused_parameters: bool = False
    """Search the graph for parameters that took no part, so that they are not waited for."""

    check_reduction: bool = False
    """Accepted by torch and without effect there."""

    gradient_as_bucket_view: bool = False
    """Let gradients be views of the buckets, saving one copy."""

    static_graph: bool = False
    """Promise that the same parameters take part in every step."""

    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    """How gradients are compressed on their way."""

    comm_wrapper: Literal[
        DDPCommunicationHookType.NO,
        DDPCommunicationHookType.FP16,
        DDPCommunicationHookType.BF16,
    ] = DDPCommunicationHookType.NO
    """A cast applied around `comm_hook`."""

    comm_state_option: dict[str, Any] = field(default_factory=dict)
    """Keywords of the hook's state, such as `matrix_approximation_rank` for PowerSGD."""

    def to_dict(
        self,
        ignore_keys: tuple[str, ...] = (
            "comm_hook",
            "comm_wrapper",
            "comm_state_option",
        ),
    ) -> dict[str, Any]:
        """Return the fields torch's constructor takes."""
        return {key: value for key, value in super().to_dict().items() if key not in ignore_keys}

    def register_comm_hook(self, model: Any) -> None:
        """Register `comm_hook` on a `DistributedDataParallel` model; does nothing for `NO`."""
        hook_type = DDPCommunicationHookType
        if self.comm_hook == hook_type.NO and self.comm_wrapper == hook_type.NO:
            return
        from torch.distributed.algorithms.ddp_comm_hooks import (
            default_hooks,
            powerSGD_hook,
        )

        hooks: dict[DDPCommunicationHookType, Any] = {
            hook_type.NO: default_hooks.allreduce_hook,
            hook_type.FP16: default_hooks.fp16_compress_hook,
            hook_type.BF16: default_hooks.bf16_compress_hook,
            hook_type.POWER_SGD: powerSGD_hook.powerSGD_hook,
            hook_type.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
        }
        wrappers: dict[DDPCommunicationHookType, Any] = {
            hook_type.FP16: default_hooks.fp16_compress_wrapper,
            hook_type.BF16: default_hooks.bf16_compress_wrapper,
        }
        hook = hooks[self.comm_hook]
        if self.comm_wrapper in wrappers:
            hook = wrappers[self.comm_wrapper](hook)
        state = None
        if self.comm_hook in (hook_type.POWER_SGD, hook_type.BATCHED_POWER_SGD):
            state = powerSGD_hook.PowerSGDState(None, **self.comm_state_option)
        model.register_comm_hook(state=state, hook=hook)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """Options of `torch.amp.GradScaler`, used with `mixed_precision="fp16"`."""

    init_scale: float = 65536.0
    """The first loss scale."""

    growth_factor: float = 2.0
    """What the scale is multiplied by after `growth_interval` steps without overflow."""

    backoff_factor: float = 0.5
    """What the scale is multiplied by after an overflow."""

    growth_interval: int = 2000
    """Number of steps without overflow before the scale grows."""

    enabled: bool = True
    """Whether scaling is on."""


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """Options of `torch.distributed.init_process_group`."""

    backend: str | None = "nccl"
    """The backend; the default leaves the choice to the device that is found."""

    init_method: str | None = None
    """How processes meet, as an URL; `None` means by environment variables."""

    timeout: timedelta | None = None
    """How long a collective waits. `None` is 10 minutes for nccl and 30 for others, as in torch."""

    def __post_init__(self) -> None:
        self._timeout_given = self.timeout is not None
        if self.timeout is None:
            self.timeout = timedelta(seconds=600 if self.backend == "nccl" else 1800)

    def to_kwargs(self) -> dict[str, Any]:
        """Return the fields that were set."""
        kwargs = super().to_kwargs()
        if not self._timeout_given:
            kwargs.pop("timeout", None)
        return kwargs


@dataclass
class ProfileKwargs(KwargsHandler):
    """Options of `torch.profiler.profile`, see `Accelerator.profile`."""

    activities: list[Literal["cpu", "xpu", "mtia", "cuda", "hpu"]] | None = None
    """What is recorded; `None` is everything torch can record here."""

    schedule_option: dict[str, int] | None = None
    """Keywords of `torch.profiler.schedule`: wait, warmup, active, repeat, skip_first."""

    on_trace_ready: Callable[..., Any] | None = None
    """Called with the profiler at the end of each cycle."""

    record_shapes: bool = False
    """Record the shapes of inputs."""

    profile_memory: bool = False
    """Record allocations."""

    with_stack: bool = False
    """Record file and line."""

    with_flops: bool = False
    """Estimate floating-point operations of some operators."""

    with_modules: bool = False
    """Record the hierarchy of modules."""

    output_trace_dir: str | None = None
    """Folder in which each rank writes `profile_{rank}.json`, for `chrome://tracing`."""

    def build(self) -> Any:
        """Return a `torch.profiler.profile` with these options.

        Raises:
            SettingError: (a `ValueError`) for an activity torch does not know.
        """
        import torch

        from ...core.errors import SettingError, explain

        activities = None
        if self.activities is not None:
            known = {name.lower(): kind for name, kind in torch.profiler.ProfilerActivity.__members__.items()}
            unknown = [name for name in self.activities if name not in known]
            if unknown:
                raise SettingError(
                    explain(
                        f"ProfileKwargs(activities={unknown!r}) is not known.",
                        accepted=known,
                    )
                )
            activities = [known[name] for name in self.activities]
        schedule = None if self.schedule_option is None else torch.profiler.schedule(**self.schedule_option)
        return torch.profiler.profile(
            activities=activities,
            schedule=schedule,
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )
