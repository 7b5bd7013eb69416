"""How long worker processes may hold up an exception that leaves a loop in the middle of a pass.

Owns that one decision; torch starts and ends the workers.
"""

from __future__ import annotations

import gc
import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

ENDING_SECONDS = 1.0
"""How long they may take to end after an exception, all together, before torch sends them SIGTERM."""
ENDED_SECONDS = 0.25
"""The same after SIGTERM."""


@contextmanager
def not_held_up(batches: Any) -> Iterator[None]:
    """If what reads a pass is closed inside because of an exception, let the workers end soon, or be ended.

    Torch asks them to end and waits for each in turn, 5 seconds before SIGTERM and 5 after it. In the middle of a
    sample they do not hear. An exception in the loop's body leaves the frame of the loop when the iterator is gone, so
    all that time passes before anybody sees it. A loop that is left by `break` keeps torch's times: its workers may have
    something to finish.

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

    def __init__(self) -> None:
        self._deadline: float | None = None
        self._waited: set[int | None] = set()
        self._fails = False

    def join(self, worker: Any, timeout: float | None = None) -> None:
        """Wait for a worker; for as long as the caller says, unless that is torch and an exception waits for it."""
        wait = type(worker).join
        if timeout != MP_STATUS_CHECK_INTERVAL:
            wait(worker, timeout)
        elif worker.pid in self._waited:  # it has had SIGTERM
            wait(worker, ENDED_SECONDS if self._fails else timeout)
        else:
            self._waited.add(worker.pid)
            if self._deadline is None:
                self._deadline = time.monotonic() + ENDING_SECONDS
            first = max(0.0, self._deadline - time.monotonic())
            wait(worker, first)
            if worker.exitcode is None:
                self._fails = self._fails or _exception_is_leaving()
                if not self._fails:
                    wait(worker, MP_STATUS_CHECK_INTERVAL - first)
        if worker.exitcode is not None:
            vars(worker).pop("join", None)  # a cycle, which would keep what the process holds


def _exception_is_leaving() -> bool:
    """Tell whether an exception is on its way out of the frame that holds the loop.

    Python shows it to nobody while it clears up that frame. But it has made its traceback, which points to the
    instruction where the frame still is; that of an exception which was caught before points to another one. Generators
    between the loop and the workers are closed by an exception of their own, whatever the reason.
    """
    frame = sys._getframe()
    while frame is not None and (frame.f_code.co_flags & inspect.CO_GENERATOR or _is_of_reading(frame)):
        frame = frame.f_back
    return frame is not None and any(
        type(found) is TracebackType and found.tb_frame is frame and found.tb_lasti == frame.f_lasti
        for found in gc.get_objects()
    )


def _is_of_reading(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("accelerate", "torch", "torchdata")
