"""A progress bar on one process. The only file that imports tqdm."""

from __future__ import annotations

from typing import Any

from ..core.available import require
from . import state


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """Return a `tqdm.auto.tqdm` that is shown on the first process of each machine only.

    Args:
        *args: As for tqdm.
        main_process_only: `False` shows one bar per process.
        **kwargs: As for tqdm.

    Raises:
        MissingPackage: (an `ImportError`) if tqdm is not installed.
    """
    require("tqdm", setting="accelerate.utils.tqdm", install="tqdm")
    from tqdm.auto import tqdm as bar

    if main_process_only and state.detected_process().local_rank != 0:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
