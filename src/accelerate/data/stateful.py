"""The loader of torchdata, which can save its place within a pass. The only file that imports torchdata."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch.utils.data import DataLoader

from ..core.available import require


def stateful_class() -> type[DataLoader[Any]] | None:
    """Return torchdata's `StatefulDataLoader` if anything has imported it: only then can there be a loader of it."""
    module = sys.modules.get("torchdata.stateful_dataloader")
    return None if module is None else module.StatefulDataLoader


def make_stateful_loader(dataset: Any, **arguments: Any) -> DataLoader[Any]:
    """Make torchdata's `StatefulDataLoader`.

    Raises:
        MissingPackage: (an `ImportError`) if torchdata is not installed.
    """
    require("torchdata", setting="use_stateful_dataloader=True", install="'torchdata>=0.8'")
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        # torchdata 0.11, its last version, calls a function that torch 2.13 no longer wants called.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        return StatefulDataLoader(dataset, **arguments)
