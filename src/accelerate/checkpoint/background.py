"""Saves that go on while training does.

Owns the one thread that writes in the background, and how its failure reaches the script: whoever waits for the save
hears of it, and so does the next call that has to do with checkpoints.

[Note: the thread] It is no daemon: an interpreter that ends waits for it, so a script that ends without a word still
has its last checkpoint. It talks to the other ranks on a line of its own, and touches only copies.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ..collectives.base import Exchange

_log = logging.getLogger(__name__)


class SaveHandle(os.PathLike[str]):
    """A save that may still be going on. Stands for its folder wherever a path is wanted."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder
        """Where the checkpoint appears, whole, when the save is done."""
        self._failure: BaseException | None = None
        self._is_told = False
        self._thread: threading.Thread | None = None

    def done(self) -> bool:
        """Tell whether the save has ended, well or not. Called on any rank."""
        return self._thread is None or not self._thread.is_alive()

    def _outcome(self) -> tuple[BaseException | None, bool]:
        """Wait, and return the failure, and whether this rank was told of it."""
        if self._thread is not None:
            self._thread.join()
        return self._failure, self._is_told

    def wait(self) -> Path | str:
        """Return the folder, or the address, when the checkpoint is complete.

        Called on any rank; blocks until all ranks have written.

        Raises:
            CheckpointError: If it failed on any rank; what was there before is whole. All ranks hear of it.
        """
        failure, _ = self._outcome()
        self._is_told = True
        if failure is not None:
            raise failure
        return self.folder

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._failure else "complete"
        return f"{type(self).__name__}({str(self.folder)!r}, {state})"


_running: set[threading.Thread] = set()


def settle() -> None:
    """Wait for all saves that this process writes in the background, whoever began them; raise nothing.

    Saves to the same place write aside at the same place, so one must have ended before another one begins.
    """
    for thread in list(_running):
        if thread is not threading.current_thread():
            thread.join()


class Background:
    """At most one save at a time that runs beside the training."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._last: SaveHandle | None = None

    def start(self, folder: Path, save: Callable[[], None]) -> SaveHandle:
        """Run `save` in a thread. The save before it must have been waited for."""
        handle = SaveHandle(folder)

        def run() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001 - raised where somebody waits
                handle._failure = error
                _log.error("A save in the background failed; the next checkpoint call raises this. %s", error)
            finally:
                _running.discard(thread)

        self._last = handle
        handle._thread = thread = threading.Thread(target=run, name="accelerate-save")
        _running.add(thread)
        try:
            thread.start()
        except RuntimeError:
            # The system has no thread left, and the other ranks are waiting.
            handle._thread = None
            run()
        return handle

    def wait(self) -> None:
        """Wait for the last save, and raise its failure unless all ranks have heard of it from its handle.

        Called on all ranks; collective if a save was begun since the last call.

        Raises:
            CheckpointError: On all ranks, if it failed.
        """
        last, self._last = self._last, None
        if last is None:
            return
        failure, is_told = last._outcome()
        # What one rank has caught another one may not have heard of, and they would go different ways.
        if failure is not None and not all(self._exchange.all_gather_object(is_told)):
            raise failure

    def end(self) -> None:
        """Wait for the last save, and raise its failure unless this rank has heard of it. Not collective.

        Raises:
            CheckpointError: If it failed.
        """
        last, self._last = self._last, None
        failure, is_told = last._outcome() if last is not None else (None, True)
        if failure is not None and not is_told:
            raise failure
