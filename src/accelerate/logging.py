"""Face of `accelerate.logging`. The code lives in `accelerate.runtime.log`."""

from .runtime.log import MultiProcessAdapter, get_logger

__all__ = ["MultiProcessAdapter", "get_logger"]
