"""Face of `accelerate.utils.tqdm`. The code lives in `accelerate.runtime.progress`."""

from ..runtime.progress import tqdm

__all__ = ["tqdm"]
