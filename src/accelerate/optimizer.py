"""Face of `accelerate.optimizer`. The code lives in `accelerate.stepping.optimizer`."""

from .stepping.optimizer import AcceleratedOptimizer, move_to_device

__all__ = ["AcceleratedOptimizer", "move_to_device"]
