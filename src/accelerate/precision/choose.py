"""Which precision a run computes in: the one place that decides."""

from __future__ import annotations

from ..core.enums import PrecisionType
from ..core.errors import UnsupportedCombination, explain
from ..hardware import Hardware
from ..settings.options.absent import refuse
from ..settings.options.handlers import AutocastKwargs, GradScalerKwargs
from .amp import BFloat16, Float16
from .base import FullPrecision, Precision


def choose(
    name: PrecisionType,
    hardware: Hardware,
    *,
    autocast: AutocastKwargs | None = None,
    scaler: GradScalerKwargs | None = None,
    origin: str = "",
) -> Precision:
    """Return the precision of this name on this hardware.

    Raises:
        UnsupportedCombination: (a `ValueError`) if the hardware, or this version, cannot compute in it.
    """
    if name is PrecisionType.NO:
        return FullPrecision()
    if name is PrecisionType.BF16:
        if not hardware.supports_bf16():
            raise UnsupportedCombination(
                explain(
                    f"mixed_precision='bf16'{origin} needs a device that computes in bfloat16; this {hardware.name} "
                    "device does not.",
                    accepted=("no", "fp16"),
                    remedy="Pass mixed_precision='fp16'.",
                )
            )
        return BFloat16(hardware.name, autocast)
    if name is PrecisionType.FP8:
        refuse(f"mixed_precision='fp8'{origin}", "an fp8 engine")
    options = (scaler or GradScalerKwargs()).to_kwargs()
    return Float16(hardware.name, hardware.grad_scaler(**options), autocast)
