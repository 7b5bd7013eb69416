"""Face of `accelerate.scheduler`. The code lives in `accelerate.stepping.scheduler`."""

from .stepping.scheduler import AcceleratedScheduler

__all__ = ["AcceleratedScheduler"]
