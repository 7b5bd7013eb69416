"""Face of `accelerate.utils.fsdp_utils`. The code lives in `accelerate.checkpoint`."""

from ..checkpoint.convert import merge_fsdp_weights

__all__ = ["merge_fsdp_weights"]
