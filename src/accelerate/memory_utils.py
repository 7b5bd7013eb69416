"""Face of `accelerate.memory_utils`. The code lives in `accelerate.runtime.memory`."""

from .runtime.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]
