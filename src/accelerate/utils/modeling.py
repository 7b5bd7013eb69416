"""Face of `accelerate.utils.modeling`. The code lives in `accelerate.core.text` and `accelerate.session`."""

from ..core.text import convert_file_size_to_int
from ..session.in_model import load_checkpoint_in_model, load_state_dict
from ..session.region import get_grad_scaler, get_mixed_precision_context_manager

__all__ = [
    "convert_file_size_to_int",
    "get_grad_scaler",
    "get_mixed_precision_context_manager",
    "load_checkpoint_in_model",
    "load_state_dict",
]
