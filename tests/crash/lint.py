"""The order of a durable save, checked on its operations alone. Pure.

Each new file: all its writes, an fsync of it, the rename that makes it visible, an fsync of the folder it came into.
What was there before is never written to, and goes only after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .operations import Op, Tree, parent
from .power import NONE, Disk


def violations(start: Tree, ops: Sequence[Op]) -> list[str]:
    """Return what a power cut could tear, in words.

    Args:
        start: What lay there before the save.
        ops: What it did; `returned` among them.
    """
    disk = Disk(start)
    look = _Look(disk, old=set(disk.files))
    found: list[str] = []
    for op in ops:
        found += [f"{op}: {fault}" for fault in look.faults(op)]
        disk.apply(op)
        look.note(op)
    return found


class _Look:
    def __init__(self, disk: Disk, old: set[int]) -> None:
        self.disk, self.old = disk, old
        self.placed: dict[int, str] = {}
        """What a rename has put where it is; and what was wrong at the last rename, if anything."""
        self.undurable: dict[str, str] = {}
        """Renames of new things, and the folder that has to be synced for each."""

    def faults(self, op: Op) -> Iterator[str]:
        """Yield what is wrong with doing this now."""
        if op.kind in ("write", "truncate") and self.disk.inode(op.path) in self.old:
            yield "a file of the old state is written to"
        if op.kind == "unlink" and self.disk.inode(op.path) in self.old:
            if not self.placed:
                yield "a file of the old state goes before there is a new one"
            for path in self.undurable:
                yield f"a file of the old state goes before {path} is durable"
        if op.kind == "returned":
            yield from self._not_durable()

    def _not_durable(self) -> Iterator[str]:
        left = self.disk.left((), {}, NONE)
        for path, inode in self.disk.below(".").items():
            if inode in self.disk.files and inode not in self.old:
                if left.get(path) != self.disk.files[inode].now:
                    yield f"{path} is not on the disk"
                if fault := self.placed.get(inode, "was written under its final name"):
                    yield f"{path} {fault}"

    def note(self, op: Op) -> None:
        """Remember what was done, after it was."""
        if op.kind == "rename":
            below = self.disk.below(op.to)
            if not self.old & set(below.values()):
                unsynced = self.disk.unsynced()
                for inode in below.values():
                    if inode in self.disk.files:
                        fault = "was not synced after its last write when it was renamed" if inode in unsynced else ""
                        self.placed[inode] = fault
                self.undurable[op.to] = parent(op.to)
        if op.kind == "fsync":
            self.undurable = {path: folder for path, folder in self.undurable.items() if folder != op.path}
