"""Reads the state files of Accelerate 1.x.

Owns which of its pickles corresponds to which state of ours. Reads them without running their code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import layout
from .trust import read_pickle


def peer_file(folder: Path, stem: str) -> Path:
    """Return where Accelerate 1.x keeps the state that we keep under `stem`."""
    if stem == layout.SCALER_STEM:
        return folder / layout.SCALER_NAME
    # One file served all ranks; whichever wrote last.
    stem = re.sub(rf"^({layout.LOADER_NAME}.*)_rank[0-9]+$", r"\1", stem)
    suffix = "pkl" if stem.startswith((layout.RNG_STATE_NAME, layout.CUSTOM_NAME)) else "bin"
    return folder / f"{stem}.{suffix}"


def read_state(folder: Path, stem: str) -> Any:
    """Read the state under `stem` from a folder of Accelerate 1.x.

    Raises:
        CheckpointError: If the file is damaged, or needs code to be read.
    """
    return read_pickle(peer_file(folder, stem))


def is_peer_folder(folder: Path) -> bool:
    """Tell whether `folder` looks like a finished save of Accelerate 1.x; its random states were written last."""
    return any(folder.glob(f"{layout.RNG_STATE_NAME}_*.pkl"))
