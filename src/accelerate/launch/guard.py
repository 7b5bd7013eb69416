"""The launcher's side of the guard, the process that ends a run whose launcher was killed. See `launch.family`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from . import family
from .family import Family


class Guard:
    """Tells the guard which processes there are."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process

    def tell(self, known: Family) -> None:
        """Say who the workers are now; those named before stay known."""
        if self._process is None or self._process.stdin is None:
            return
        with suppress(OSError):  # somebody has killed it; the run goes on without
            lines = "".join(f"{pid} {since}\n" for pid, since in known.workers.items())
            self._process.stdin.write(lines.encode())
            self._process.stdin.flush()


@contextmanager
def guarded(known: Family, folder: Path, environ: Mapping[str, str]) -> Iterator[Guard]:
    """Have a guard beside this process for the length of the block.

    It is in a session of its own, so that what ends a whole process group does not end it too.

    Args:
        known: The run that it guards.
        folder: What it removes when the launcher has not.
        environ: The variables it gets; the run's mark must not be among them.
    """
    process = None
    if os.name == "posix":
        words = [sys.executable, "-I", "-S", family.__file__, str(os.getpid()), known.mark, str(folder)]
        with suppress(OSError):
            process = subprocess.Popen(
                words,
                env=dict(environ),
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
    try:
        yield Guard(process)
    finally:
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
