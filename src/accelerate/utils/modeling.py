"""Face of `accelerate.utils.modeling`. The code lives in `accelerate.core.text` and `accelerate.session.region`."""

from ..core.text import convert_file_size_to_int
from ..session.region import get_grad_scaler, get_mixed_precision_context_manager

__all__ = [
    "convert_file_size_to_int",
    "get_grad_scaler",
    "get_mixed_precision_context_manager",
]
