"""The loader of torchdata, which can save its place within a pass. The only file that imports torchdata."""

from __future__ import annotations

import functools
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
        return _fed(StatefulDataLoader)(dataset, **arguments)


@functools.cache
def _fed(stateful: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """Return torchdata's class with indices from a `Feed`, as `data.reader.FedLoader` is torch's."""

    class FedStatefulLoader(stateful):
        feed: Any = None

        @property
        def _index_sampler(self) -> Any:
            return super()._index_sampler if self.feed is None else self.feed  # pyright: ignore[reportAttributeAccessIssue]

        def __reduce__(self) -> tuple[Any, ...]:
            return _empty, (), self.__dict__  # pickle cannot find a class that is made here

    return FedStatefulLoader


def _empty() -> DataLoader[Any]:
    stateful = stateful_class()
    if stateful is None:
        from torchdata.stateful_dataloader import StatefulDataLoader as stateful  # noqa: N813 - the same variable
    return _fed(stateful).__new__(_fed(stateful))
