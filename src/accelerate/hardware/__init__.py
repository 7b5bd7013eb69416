"""Families of devices: what the machine is, and every call into `torch.<device>`."""

from __future__ import annotations

import torch

from ..core.enums import DistributedType
from ..core.errors import SettingError, explain
from .base import Hardware
from .families import FAMILIES

CPU = FAMILIES["cpu"]


def named(name: str) -> Hardware:
    """Return the family of a torch device type; one that has no row gets the generic family."""
    family = FAMILIES.get(name)
    return (
        family if family is not None else Hardware(name, DistributedType.MULTI_GPU, rng_key=f"torch_{name}_manual_seed")
    )


def detect() -> Hardware:
    """Return the family of this machine's accelerator, as torch names it; the CPU where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return CPU if found is None else named(found.type)


def of(device: torch.device | str, origin: str) -> Hardware:
    """Return the family of a device that the user named.

    Raises:
        SettingError: (a `ValueError`) if torch does not know it; `origin` says who named it.
    """
    try:
        return named(torch.device(device).type)
    except RuntimeError as error:
        raise SettingError(
            explain(
                f"device {str(device)!r} is not known to torch ({origin}).",
                accepted=str(error).splitlines()[0],
            )
        ) from error


def _is_available(name: str) -> bool:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == name


def is_cuda_available() -> bool:
    """Tell whether there is a CUDA device."""
    return torch.cuda.is_available()


def is_mps_available(min_version: str = "1.12") -> bool:
    """Tell whether there is an Apple GPU. Every torch we support knows it, so `min_version` decides nothing."""
    return _is_available("mps")


def is_npu_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on an Ascend NPU here; the device itself is always checked."""
    return _is_available("npu")


def is_mlu_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on a Cambricon MLU here; the device itself is always checked."""
    return _is_available("mlu")


def is_musa_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on a Moore Threads GPU here; the device itself is always checked."""
    return _is_available("musa")


def is_sdaa_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on a Tecorigin SDAA here; the device itself is always checked."""
    return _is_available("sdaa")


def is_hpu_available(patch_torch: bool = True) -> bool:
    """Tell whether torch computes on an Intel Gaudi here. Nothing in torch is patched."""
    return _is_available("hpu")


def is_xpu_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on an Intel GPU here; the device itself is always checked."""
    return _is_available("xpu")


def is_neuron_available(check_device: bool = False) -> bool:
    """Tell whether torch computes on an AWS Neuron device here; the device itself is always checked."""
    return _is_available("neuron")


def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Tell whether training through torch_xla works here: this version has no engine for it."""
    return False


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Tell whether this machine's device computes in bfloat16."""
    return detect().supports_bf16()


def is_fp16_available() -> bool:
    """Tell whether this machine's device computes in float16; all that torch supports do."""
    return True


__all__ = ["CPU", "FAMILIES", "Hardware", "detect", "named", "of"]
