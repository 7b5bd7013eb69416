"""Face of `accelerate.big_modeling`. The code lives in `accelerate.session`; placing and offloading are not built yet."""

from .session.in_model import load_checkpoint_in_model

__all__ = ["load_checkpoint_in_model"]
