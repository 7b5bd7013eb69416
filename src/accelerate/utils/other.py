"""Face of `accelerate.utils.other`. The code lives in `accelerate.parallel.unwrap`, `accelerate.checkpoint.weights` and `accelerate.core.text`."""

from ..checkpoint.weights import load, save
from ..core.text import convert_bytes
from ..parallel.unwrap import (
    extract_model_from_parallel,
    has_compiled_regions,
    is_compiled_module,
)
from ..runtime.ops import wait_for_everyone

__all__ = [
    "convert_bytes",
    "extract_model_from_parallel",
    "has_compiled_regions",
    "is_compiled_module",
    "load",
    "save",
    "wait_for_everyone",
]
