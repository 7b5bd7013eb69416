"""JSON that may come from anybody.

Owns reading the JSON files of a checkpoint, and what is refused before it can cost memory or time: pipes and links
in place of files, more values than a state can reasonably have, a name that stands twice in one object, nesting
without end. Everything that is wrong is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..core.errors import CheckpointError, explain

T = TypeVar("T")

MAX_CONTAINERS = 2_000_000
"""Lists and objects in one document. Each takes two bytes of text, but sixty of memory."""
MAX_VALUES = 10_000_000

USE_ANOTHER = "Use another checkpoint."


def read_file(file: Path) -> bytes:
    """Read a file of this library's own, which is never a link, a pipe or a device.

    Raises:
        OSError: If it is one of these, or cannot be read.
    """
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{file.name} is not a plain file")
        return stream.read()


def parse(content: bytes, kind: type[T], source: object) -> T:
    """Read a JSON document as a `kind`.

    Args:
        content: The text.
        kind: What it has to hold.
        source: What to call it in an error: its path.

    Raises:
        CheckpointError: If it is anything else.
    """
    check_size(content, source, USE_ANOTHER)
    try:
        found = msgspec.json.decode(content, type=kind)
        # Bytes for letters: nothing is kept of what is read here, and no letter takes more than its byte.
        json.loads(content.decode("latin-1"), object_pairs_hook=_refuse_repeated)
    except (ValueError, RecursionError) as error:  # msgspec's errors are `ValueError`s too
        raise damaged(source, error) from None
    return found


def damaged(source: object, error: object) -> CheckpointError:
    """Return the error for a file that cannot be what it should be."""
    return CheckpointError(explain(f"{source} is damaged: {error}", remedy=USE_ANOTHER))


def check_size(content: bytes, source: object, remedy: str) -> None:
    """Refuse a document of so many values that reading it would fill the memory. The same for writer and reader.

    Raises:
        CheckpointError: Saying how many there are.
    """
    containers = content.count(b"[") + content.count(b"{")
    values = content.count(b",")
    if containers > MAX_CONTAINERS or values > MAX_VALUES:
        raise CheckpointError(
            explain(
                f"{source} has {containers} lists and objects and {values} values.",
                accepted=f"up to {MAX_CONTAINERS} lists and objects, and {MAX_VALUES} values",
                remedy=remedy,
            )
        )


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
