"""Writing files so that the disk is never waited for alone.

Owns the overlap: while a file is written, other threads flush those before it to the disk and hash them. That costs
time of the disk and of another core, and hardly any of the writer's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from . import durable
from .disk_errors import about
from .files import File
from .manifest import FileEntry, entry_of

_THREADS = 2  # one waits for the disk while the other one hashes


class Writer:
    """Writes files into one folder; when its block ends without an error, their content is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, FileEntry] = {}
        """What was written, once the block has ended."""
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Not an executor, which would refuse to work for a save that goes on while the interpreter waits to end.
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        for _ in range(_THREADS):
            thread = threading.Thread(target=self._work, name="accelerate-flush")
            try:
                thread.start()
            except RuntimeError:
                # The system has none left, or the interpreter is about to end: this thread does it all then.
                break
            self._threads.append(thread)
        return self

    def write(self, files: Iterable[File]) -> None:
        """Write files, each under its name."""
        for file in files:
            with about(self.folder / file.name, file.num_bytes):
                file.write(self.folder)
            self._tasks.put(partial(durable.flush_file, self.folder / file.name))
            self._tasks.put(partial(self._describe, file.name))

    def _describe(self, name: str) -> None:
        self.entries[name] = entry_of(self.folder / name)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised at the end of the block
                self._failure = self._failure or error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads or (self,):
            self._tasks.put(None)
        if not self._threads:
            self._work()
        for thread in self._threads:
            thread.join()
        if error is None and self._failure is not None:
            raise self._failure
