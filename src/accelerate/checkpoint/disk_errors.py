"""What is said when a disk refuses.

Owns the advice for each error number of the system, and finding that number in the errors of libraries that raise
their own kind. Reads no content of files.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import CheckpointError, explain

_ADVICE = {
    errno.ENOSPC: "Free some space, or save to another disk.",
    errno.EDQUOT: "Remove files of yours, have the quota raised, or save to another disk.",
    errno.EFBIG: "Raise the largest size of a file (`ulimit -f`), or save to a file system that allows it.",
    errno.EIO: "The device fails: look at the system's log (`dmesg`), and save to another disk.",
    errno.EROFS: "Mount it writable, or save elsewhere.",
    errno.EACCES: "Let this user write there (`ls -ld` shows who may), or save elsewhere.",
    errno.EPERM: "Let this user write there (`lsattr` and `ls -ld` show who may), or save elsewhere.",
    errno.EMFILE: "Raise the number of open files (`ulimit -n`), or close some: loaders' workers hold many.",
    errno.ENFILE: "The system has no more open files to give: end other programs, or raise `fs.file-max`.",
    errno.ENAMETOOLONG: "Give the checkpoint folder a shorter name.",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The words of Rust's and of torch's writers.
_NUMBER = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")


@contextmanager
def about(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Let an error of the system in this block say what it was about, and what to do.

    Args:
        path: The file or folder.
        num_bytes: How many bytes it shall hold, if it is being written.

    Raises:
        CheckpointError: In place of an `OSError`, or of one that a library made of it.
    """
    try:
        yield
    except Exception as error:
        text = describe(error, path, num_bytes)
        if text is None:
            raise
        raise CheckpointError(text) from error


def describe(error: BaseException, path: Path, num_bytes: int | None = None) -> str | None:
    """Return the path, the problem and the advice for an error of the system; `None` for any other error."""
    number = _number_of(error)
    if number is None:
        return None
    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else path
    problem = f"{path}: {os.strerror(number)} ({errno.errorcode.get(number, number)})."
    if number in _FULL:
        problem += _space(path, num_bytes)
    return explain(problem, remedy=_ADVICE.get(number, "Save elsewhere, or look at the system's log."))


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, CheckpointError):
        return None  # it has been described already
    if isinstance(error, OSError):
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found.group(1)) if found else None


def _space(path: Path, num_bytes: int | None) -> str:
    """Say how much room there is, and how much was needed."""
    parts = []
    try:
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        parts.append(f" {shutil.disk_usage(folder).free} bytes are free there")
    except (OSError, StopIteration):
        parts.append(" How many bytes are free there cannot be read")
    if num_bytes is not None:
        written = path.stat().st_size if path.is_file() else 0
        parts.append(f", {written} of this file are written, and it needs {num_bytes}")
    return "".join(parts) + "."
