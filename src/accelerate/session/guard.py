"""Notice a prepared optimizer that was lost: `prepare` was called, and the script steps the old one.

Checked at the first step only; later ones cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import SettingError, explain
from ..parallel.plan import ParallelPlan
from ..stepping.optimizer import AcceleratedOptimizer


def guard_first_step(wrapper: AcceleratedOptimizer, plan: ParallelPlan) -> None:
    """Refuse a first step past the wrapper, where it would give wrong numbers.

    It would under fp16, whose gradients are scaled, and with accumulation, whose steps must wait.
    """
    reasons = []
    if plan.precision.scaler is not None:
        reasons.append("gradients are scaled for fp16")
    if (plan.settings.accumulation.num_steps or 1) > 1:
        reasons.append(f"gradients are accumulated over {plan.settings.accumulation.num_steps} batches")
    if not reasons:
        return

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        handle.remove()
        raise SettingError(
            explain(
                f"{type(optimizer).__name__}.step() was called on the optimizer as it was before prepare(), although "
                f"{' and '.join(reasons)}.",
                accepted="the optimizer that prepare() returned",
                remedy="Assign the result: optimizer = accelerator.prepare(optimizer).",
            )
        )

    handle = wrapper.optimizer.register_step_pre_hook(check)
    wrapper.before_first_step = handle.remove
