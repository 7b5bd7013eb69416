"""Writing files so that the disk is never waited for alone.

Owns the overlap: while a file is written, those before it are flushed and hashed by other threads, which costs
nothing but time of the disk and of a second core.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from . import durable
from .files import File
from .manifest import FileEntry, describe

_THREADS = 4  # two files at a time: one flushed and hashed, as is the next


class Writer(AbstractContextManager["Writer"]):
    """Writes files into one folder; when its block ends without an error, their content is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, FileEntry] = {}
        """What was written, once the block has ended."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="accelerate-save")
        self._flushed: list[Future[None]] = []
        self._described: dict[str, Future[FileEntry]] = {}

    def write(self, files: Iterable[File]) -> None:
        """Write files, each under its name."""
        for file in files:
            path = self.folder / file.name
            file.write(self.folder)
            self._flushed.append(self._pool.submit(durable.flush_file, path))
            self._described[file.name] = self._pool.submit(describe, path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for flushed in self._flushed:
                    flushed.result()
                self.entries = {name: described.result() for name, described in self._described.items()}
        finally:
            self._pool.shutdown(cancel_futures=True)
