"""`AcceleratorState`, the public view of a run: the process state and what was chosen on top of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from ..core.enums import PrecisionType
from ..core.errors import NotStarted, SettingError, explain
from ..runtime import preemption, resuming
from ..runtime import state as runtime_state
from ..runtime.partial_state import PartialState
from ..settings import arguments, env, origins
from ..settings.options import absent
from ..settings.options.compile import TorchDynamoPlugin


class AcceleratorState:
    """What a run was set up with. All instances share their state, which an `Accelerator` creates.

    Every attribute of `PartialState` is one here too.

    Raises:
        SettingError: (a `ValueError`) if there is no `Accelerator` yet, or the arguments contradict it.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attributes = (
        *PartialState._known_attributes,
        "deepspeed_plugins",
        "device_mesh",
        "dynamo_plugin",
        "parallelism_config",
        "torch_tp_plugin",
    )

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = AcceleratorState._shared_state
        for name, value, engine in (
            ("deepspeed_plugin", deepspeed_plugin, "the DeepSpeed engine"),
            ("fsdp_plugin", fsdp_plugin, "the FSDP engine"),
            ("torch_tp_plugin", torch_tp_plugin, "the tensor-parallel engine"),
            ("megatron_lm_plugin", megatron_lm_plugin, "the Megatron-LM engine"),
            (
                "parallelism_config",
                parallelism_config,
                "device meshes with several axes",
            ),
        ):
            if value is not None:
                absent.refuse(f"{name}={value!r:.60} (an argument of AcceleratorState)", engine)
        environ = env.read()
        precision = arguments.precision_from(mixed_precision, environ)
        said = environ.get(arguments.PRECISION_VARIABLE)
        if self.initialized:
            origin = "" if mixed_precision else f" ({origins.origin(environ, arguments.PRECISION_VARIABLE)})"
            heard = not mixed_precision and said == self._precision_variable
            self._check_again(None if heard else precision, origin, cpu)
            return
        if not _from_accelerator:
            raise SettingError(
                explain(
                    "AcceleratorState does not exist yet: an Accelerator creates it.",
                    remedy="Write accelerator = Accelerator() before anything that uses its state.",
                )
            )
        _start_or_check_process(cpu, kwargs)
        self._mixed_precision = (precision or PrecisionType.NO).value
        self._precision_variable = said
        self.dynamo_plugin = dynamo_plugin or TorchDynamoPlugin()
        self.deepspeed_plugins: Any = None
        self.device_mesh: Any = None
        self.parallelism_config: Any = None
        self.torch_tp_plugin: Any = None

    def _check_again(self, precision: PrecisionType | None, origin: str, cpu: bool) -> None:
        if precision and precision.value != self._mixed_precision:
            raise SettingError(
                explain(
                    f"mixed_precision={precision.value!r}{origin} contradicts {self._mixed_precision!r}, with which this "
                    "process has been set up by an earlier Accelerator.",
                    accepted=f"{self._mixed_precision!r}, or no mixed_precision",
                    remedy="Give all Accelerators of a process the same precision, or end the first one: "
                    "use it as `with Accelerator(...) as accelerator:`.",
                )
            )
        _check_cpu(cpu)

    def __getattr__(self, name: str) -> Any:
        if name in runtime_state.SHARED:
            return runtime_state.SHARED[name]
        if name in self._known_attributes:
            raise NotStarted(
                explain(
                    f"AcceleratorState has no {name!r}: it was reset.",
                    remedy="Create the Accelerator() again.",
                )
            )
        raise AttributeError(f"'AcceleratorState' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{PartialState()!r}\nMixed precision type: {self.mixed_precision}\n"

    @property
    def initialized(self) -> bool:
        """Whether the state exists."""
        return bool(AcceleratorState._shared_state)

    @property
    def mixed_precision(self) -> str:
        """The precision of the run: `"no"`, `"bf16"` or `"fp16"`."""
        return self._mixed_precision

    @property
    def fork_launched(self) -> bool:
        """Whether this process was forked by a launcher function."""
        return PartialState().fork_launched

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return PartialState().use_distributed

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return PartialState().is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return PartialState().is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return PartialState().is_last_process

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are fully sharded by torch's `fully_shard`."""
        return False

    @property
    def deepspeed_plugin(self) -> Any:
        """The active DeepSpeed options; `None` without DeepSpeed."""
        return None

    def get_deepspeed_plugin(self, name: str) -> Any:
        """Return named DeepSpeed options; this version has none."""
        absent.refuse(f"get_deepspeed_plugin({name!r})", "the DeepSpeed engine")

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Make named DeepSpeed options the active ones; this version has none."""
        absent.refuse(f"select_deepspeed_plugin({name!r})", "the DeepSpeed engine")

    def wait_for_everyone(self) -> None:
        """Return once every rank has come. Called on all ranks; collective."""
        PartialState().wait_for_everyone()

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give each rank its share; see `PartialState.split_between_processes`."""
        with PartialState().split_between_processes(inputs, apply_padding=apply_padding) as share:
            yield share

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on rank 0, then on the others. Called on all ranks; collective."""
        return PartialState().main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on each machine's first process, then on the others. Called on all ranks; collective."""
        return PartialState().local_main_process_first()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first process of each machine only."""
        PartialState().print(*args, **kwargs)

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group, if there is one."""
        PartialState().destroy_process_group(group)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Forget everything; instances share this dictionary, so it is emptied in place."""
        AcceleratorState._shared_state.clear()
        preemption.stop()
        resuming.forget()
        if reset_partial_state:
            PartialState._reset_state()


def _start_or_check_process(cpu: bool, kwargs: dict[str, Any]) -> None:
    existed = runtime_state.is_started()
    if existed:
        _check_cpu(cpu)
    PartialState(cpu, **kwargs)
    if existed and kwargs and runtime_state.current().process.is_distributed:
        warnings.warn(
            f"InitProcessGroupKwargs({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) comes too late: this process "
            "has joined its group already. Pass the options to the first PartialState or Accelerator.",
            stacklevel=4,
        )


def _check_cpu(cpu: bool) -> None:
    device = runtime_state.current().device
    if cpu and runtime_state.current().hardware.needs_placement:
        raise SettingError(
            explain(
                f"cpu=True contradicts {device}, on which this process has been set up already.",
                remedy="Pass cpu=True to the first Accelerator or PartialState of the process, or set "
                "ACCELERATE_USE_CPU=true before it starts.",
            )
        )
