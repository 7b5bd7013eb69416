"""Face of `accelerate.launchers`. The code lives in `accelerate.launch`."""

from .launch.functions import debug_launcher, notebook_launcher

__all__ = ["debug_launcher", "notebook_launcher"]
