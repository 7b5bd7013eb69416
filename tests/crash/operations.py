"""One change that a save makes to the disk. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Tree = Mapping[str, bytes | None]
"""Relative names with `/`: the content of a file, or None for a folder. The root is not named."""


@dataclass(frozen=True)
class Op:
    """One change. Paths are relative to the folder that is looked at; it is `.` itself."""

    kind: str
    """create, write, truncate, fsync, rename, link, unlink, mkdir, rmdir or returned (of `save_state`)."""
    path: str = "."
    to: str = ""
    """Of rename and link."""
    offset: int = 0
    """Of write; the new size for truncate."""
    data: bytes = b""

    def __str__(self) -> str:
        size = f" {len(self.data)} at {self.offset}" if self.kind == "write" else ""
        return f"{self.kind} {self.path}{size}" + (f" -> {self.to}" if self.to else "")


def read_tree(root: Path) -> dict[str, bytes | None]:
    """Return what lies below `root`."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    """Make `root` hold what `tree` says."""
    root.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def parent(path: str) -> str:
    """Return the folder of a path."""
    return path.rpartition("/")[0] or "."
