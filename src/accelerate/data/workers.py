"""How long the worker processes of a pass that is left in the middle may hold up the loop.

Owns that one decision; torch starts and ends the workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

LEAVING_SECONDS = 1.0
"""How long they may take to end, all together, before torch sends them SIGTERM."""


@contextmanager
def not_held_up(batches: Any) -> Iterator[None]:
    """If what reads a pass is closed inside, let the workers end soon, or be ended.

    Torch asks them to end and waits for each in turn, 5 seconds before SIGTERM and 5 after it. In the middle of a
    sample they do not hear. After an exception in the loop's body all that time passes before anybody sees the
    exception: it only leaves the frame of the loop when the iterator is gone.

    Args:
        batches: Torch's iterator. One without workers is left alone, and one whose workers stay for the next pass.
    """
    try:
        yield
    except GeneratorExit:
        if not getattr(batches, "_persistent_workers", False):
            patience = _Patience()
            for worker in getattr(batches, "_workers", ()):
                worker.join = partial(patience.join, worker)
        raise


class _Patience:
    """The time that all workers of a pass have together. It starts when torch waits for the first of them."""

    _deadline: float | None = None

    def join(self, worker: Any, timeout: float | None = None) -> None:
        """Wait for a worker; for as long as the caller says, unless that is torch."""
        if timeout == MP_STATUS_CHECK_INTERVAL:
            if self._deadline is None:
                self._deadline = time.monotonic() + LEAVING_SECONDS
            timeout = max(0.0, self._deadline - time.monotonic())
        type(worker).join(worker, timeout)
        if worker.exitcode is not None:
            vars(worker).pop("join", None)  # a cycle, which would keep what the process holds
