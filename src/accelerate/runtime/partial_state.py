"""`PartialState`, the public view of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .. import hardware
from ..core.enums import DistributedType
from ..core.errors import NotStarted, SettingError, WrongTypeError, explain, nearest
from ..settings import env
from ..topology import connect
from . import control, state
from .state import ProcessSettings, Runtime


class PartialState:
    """Who this process is, and on what it computes. All instances share their state.

    The first one detects where the process runs and joins the others; that is collective.

    Args:
        cpu: Compute on the CPU although there is an accelerator.
        **kwargs: `backend`, `timeout` and `init_method`, as for `torch.distributed.init_process_group`.
    """

    _shared_state: dict[str, Any] = state.SHARED
    _known_attributes = (
        "_cpu",
        "_runtime",
        "backend",
        "debug",
        "device",
        "distributed_type",
        "fork_launched",
        "local_process_index",
        "num_processes",
        "process_index",
    )

    backend: str | None
    debug: bool
    device: torch.device
    distributed_type: DistributedType
    fork_launched: bool
    local_process_index: int
    num_processes: int
    process_index: int
    _runtime: Runtime

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        self.__dict__ = state.SHARED
        if not state.is_started():
            state.start(_settings_from(cpu, kwargs))

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        return (
            f"Distributed environment: {self.distributed_type}{backend}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    def __getattr__(self, name: str) -> Any:
        if name in self._known_attributes:
            raise NotStarted(
                explain(
                    f"PartialState has no {name!r}: it was reset.",
                    remedy="Create the PartialState() or Accelerator() again.",
                )
            )
        raise AttributeError(f"'PartialState' object has no attribute {name!r}")

    @property
    def initialized(self) -> bool:
        """Whether the state exists."""
        return bool(state.SHARED)

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        """The device a single process would compute on here."""
        named = env.get("ACCELERATE_TORCH_DEVICE")
        return torch.device(named) if named else hardware.detect().device()

    def set_device(self) -> None:
        """Make this process's device torch's current one."""
        self._runtime.hardware.select(self.device)

    def wait_for_everyone(self) -> None:
        """Return once every rank has come. Called on all ranks; collective."""
        self._runtime.collectives.barrier()

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give each rank its share of some inputs, which stay as they are.

        Args:
            inputs: A list, tuple, tensor or `datasets.Dataset`, or a dictionary of them, all of one length.
                Anything else is given whole to every rank.
            apply_padding: Repeat the last element so that all shares are equally long, as `gather` needs.

        Raises:
            SettingError: (a `ValueError`) with several processes, if a dictionary's values differ in length.
        """
        yield control.split_inputs(inputs, self.num_processes, self.process_index, apply_padding)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on rank 0, then on the others. Called on all ranks; collective."""
        return control.goes_first(self._runtime.collectives, self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on each machine's first process, then on the others. Called on all ranks; collective."""
        return control.goes_first(self._runtime.collectives, self.is_local_main_process)

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on rank 0 only; the others get `None`."""
        if function is None:
            return self.on_main_process
        return control.only_if(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorate a function to run on the first process of each machine only."""
        if function is None:
            return self.on_local_main_process
        return control.only_if(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run on the last rank only."""
        return control.only_if(lambda: self.is_last_process, function)

    def on_process(
        self,
        function: Callable[..., Any] | None = None,
        process_index: int | None = None,
    ) -> Callable[..., Any]:
        """Decorate a function to run on one rank only."""
        index = _given(process_index, "process_index")
        if function is None:
            return lambda later: self.on_process(later, process_index=index)
        return control.only_if(lambda: self.process_index == index, function)

    def on_local_process(
        self,
        function: Callable[..., Any] | None = None,
        local_process_index: int | None = None,
    ) -> Callable[..., Any]:
        """Decorate a function to run on one process of each machine only."""
        index = _given(local_process_index, "local_process_index")
        if function is None:
            return lambda later: self.on_local_process(later, local_process_index=index)
        return control.only_if(lambda: self.local_process_index == index, function)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first process of each machine only."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group, if there is one."""
        connect.disconnect(group)

    @staticmethod
    def _reset_state() -> None:
        """Forget everything; instances share this dictionary, so it is emptied in place."""
        state.reset()


def _given(index: int | None, name: str) -> int:
    if index is None:
        raise SettingError(explain(f"{name} is missing.", remedy=f"Pass {name}=<rank>."))
    return index


# Keywords of torch.distributed.init_process_group.
_GROUP_OPTIONS = (
    "backend",
    "init_method",
    "timeout",
    "world_size",
    "rank",
    "store",
    "group_name",
    "pg_options",
    "device_id",
)


def _settings_from(cpu: bool, kwargs: dict[str, Any]) -> ProcessSettings:
    options = dict(kwargs)
    unknown = [name for name in options if name not in _GROUP_OPTIONS]
    if unknown:
        raise WrongTypeError(
            explain(
                f"PartialState got {unknown[0]}={options[unknown[0]]!r:.60}, which is no option of a process group."
                + nearest(unknown[0], _GROUP_OPTIONS),
                accepted=_GROUP_OPTIONS,
            )
        )
    return ProcessSettings(
        cpu=cpu,
        backend=options.pop("backend", None),
        timeout=options.pop("timeout", None),
        init_method=options.pop("init_method", None),
        group_options=options,
    )
