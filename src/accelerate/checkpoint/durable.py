"""Bytes that survive a power cut.

Owns fsync: of files, of folders, of whole trees; and replacing one file as a whole.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .disk_errors import about


def flush_file(file: Path) -> None:
    """Wait until the content of `file` is on the disk."""
    with about(file):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    flush_file(folder)


def flush_tree(folder: Path) -> None:
    """Wait until everything below `folder` is on the disk, names last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                flush_file(path)
        flush_folder(Path(parent))


def make_folder(folder: Path) -> None:
    """Create `folder` with its parents, durably; nothing happens if it is there."""
    missing = []
    path = folder
    while not path.exists():
        missing.append(path)
        path = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def write_file(file: Path, content: bytes) -> None:
    """Write a new file and wait until its content is on the disk."""
    with about(file, len(content)), file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Write one file so that at any instant the old or the new content is there.

    Args:
        file: What to replace or create.
        write: Writes the content to the path it is given, in the same folder.
    """
    aside = file.with_name(f".accelerate-file-{uuid.uuid4().hex[:8]}")
    try:
        write(aside)
        flush_file(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(file.parent)


def files_below(folder: Path) -> Iterator[str]:
    """Yield the relative names of all files below `folder`, sorted, with `/` between folders."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    yield from sorted(path.relative_to(folder).as_posix() for path in found)
