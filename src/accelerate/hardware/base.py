"""What one family of devices can do.

Owns every call into `torch.<device>` modules, over `torch.get_device_module`. The base class serves all families;
one with quirks overrides a method in a file of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..core.enums import DistributedType
from ..core.errors import SettingError, explain


@dataclass(frozen=True)
class Hardware:
    """One family of devices. Stateless; facts are read from torch when asked."""

    name: str
    """The device type in torch: `"cuda"`."""

    label: DistributedType
    """What `distributed_type` says for plain data parallelism over several of these."""

    backend: str | None = None
    """The collective backend, such as `"nccl"`; `None` leaves it to torch's default for the device."""

    visible_devices: str | None = None
    """The variable that restricts which devices a process sees."""

    rng_key: str = ""
    """The name of its random state inside checkpoints."""

    copies_ahead: bool = False
    """Whether copies from pinned memory run beside the computation, on a stream of their own."""

    @property
    def module(self) -> Any:
        """The module `torch.<name>`; `None` for a device without one, such as `meta`."""
        try:
            return torch.get_device_module(self.name)
        except RuntimeError:
            return None

    def _call(self, function: str, *args: Any, default: Any = None) -> Any:
        found: Callable[..., Any] | None = getattr(self.module, function, None)
        return default if found is None else found(*args)

    def count(self) -> int:
        """Number of devices this process sees."""
        return int(self._call("device_count", default=1))

    def device(self, index: int | None = None) -> torch.device:
        """Return the device with this index; without one, the current device of the family.

        Raises:
            SettingError: (a `ValueError`) if there is no such device.
        """
        if index is None:
            # Asking for the current device may initialise the family, and a fork were impossible from then on.
            untouched = self._call("is_initialized", default=True) is False
            index = 0 if untouched else int(self._call("current_device", default=0))
        if index >= self.count():
            raise SettingError(
                explain(
                    f"Local process {index} has no {self.name} device of its own: {self.count()} visible here.",
                    accepted=f"at most {self.count()} processes on this machine",
                    remedy="Start fewer processes, or make more devices visible"
                    + (f" with {self.visible_devices}." if self.visible_devices else "."),
                )
            )
        return torch.device(self.name, index)

    def select(self, device: torch.device) -> None:
        """Make `device` the current one of this process."""
        self._call("set_device", device)

    def is_initialized(self) -> bool:
        """Tell whether this process has touched a device, after which it must not be forked."""
        return bool(self._call("is_initialized", default=False))

    def synchronize(self, device: torch.device | None = None) -> None:
        """Wait for the work queued on `device`; without one, on the current device. For one of another family, do nothing."""
        if device is None or device.type == self.name:
            # Families of one device do not take one.
            self._call("synchronize", *([] if device is None or self.count() == 1 else [device]))

    def copy_stream(self, device: torch.device) -> Any:
        """Return the stream on which batches are copied to `device`, always the same; `None` if there is none.

        Memory allocated on a stream is used again on that one only, so one stream for all copies keeps it small.
        """
        if not self.copies_ahead:
            return None
        return _copy_stream(self.name, self.device().index if device.index is None else device.index)

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream on which work for `device` is queued now."""
        return self._call("current_stream", device)

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue the work of the body on `stream`, and select its device there."""
        return self.module.stream(stream)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the CPU in memory that the device reads by itself; the same if it is there already."""
        return tensor if tensor.is_pinned() else tensor.pin_memory()

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return room on the CPU for a copy of `tensor`, into which a device of this family copies by itself."""
        pinned = self.copies_ahead and not tensor.is_cpu
        with torch.inference_mode(False):  # whoever fills it again may do so outside
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)

    def empty_cache(self) -> None:
        """Give cached memory back to the system."""
        self._call("empty_cache")

    def get_rng_state(self) -> Any:
        """Return the states of the family's generators, one for each visible device; of the current, if it has one."""
        found = self._call("get_rng_state_all")
        return self._call("get_rng_state") if found is None else found

    def set_rng_state(self, state: Any) -> None:
        """Restore what `get_rng_state` returned."""
        self._call("set_rng_state" if isinstance(state, torch.Tensor) else "set_rng_state_all", state)

    def get_generator_state(self) -> torch.Tensor:
        """Return the state of the current device's generator."""
        return self._call("get_rng_state")

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore the state of the current device's generator."""
        self._call("set_rng_state", state)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all visible devices."""
        self._call("manual_seed_all", seed)

    def supports_bf16(self) -> bool:
        """Tell whether the devices compute in bfloat16."""
        return bool(self._call("is_bf16_supported", default=True))

    def grad_scaler(self, **options: Any) -> torch.amp.GradScaler:
        """Make the loss scaler that fp16 needs."""
        return torch.amp.GradScaler(self.name, **options)

    @property
    def is_out_of_memory(self) -> Callable[[BaseException], bool]:
        """A predicate: is this exception the device running out of memory?"""
        return _is_out_of_memory

    @property
    def needs_placement(self) -> bool:
        """Whether tensors made on the CPU have to be moved to be used."""
        return True


@dataclass(frozen=True)
class Cpu(Hardware):
    """The CPU: one device, whose index only tells processes apart."""

    def count(self) -> int:
        return 1

    def device(self, index: int | None = None) -> torch.device:
        # Several processes on one machine have always seen "cpu:0" under this interface, a single one "cpu".
        return torch.device("cpu") if index is None else torch.device("cpu", 0)

    def select(self, device: torch.device) -> None:
        return None

    def get_rng_state(self) -> Any:
        return None  # torch's own generator is the CPU's; it is saved by itself

    def set_rng_state(self, state: Any) -> None:
        return None

    def get_generator_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_generator_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        return None

    def synchronize(self, device: torch.device | None = None) -> None:
        return None

    def supports_bf16(self) -> bool:
        return True

    @property
    def needs_placement(self) -> bool:
        return False


@functools.cache
def _copy_stream(name: str, index: int) -> Any:
    return torch.get_device_module(name).Stream(device=torch.device(name, index))


_OUT_OF_MEMORY = (
    "out of memory.",
    "out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "DefaultCPUAllocator: can't allocate memory",
)


def _is_out_of_memory(exception: BaseException) -> bool:
    if isinstance(exception, torch.OutOfMemoryError):
        return True
    if isinstance(exception, RuntimeError) and len(exception.args) == 1:
        return any(mark in str(exception.args[0]) for mark in _OUT_OF_MEMORY)
    return False
