"""What a power cut may leave on a disk. Pure: operations in, trees out.

A disk keeps what was synced, and any part of the rest:

- What was written to a file since its last fsync may be there, missing, zeros, or cut off.
- A change of a folder's names that no fsync of that folder followed may have happened or not, each by itself. Changes
  of one name keep their order. That a file has content says nothing about whether it has a name.
- A rename is one step for a folder, and for a file within a folder. A file that moves to another folder may be found
  under both names, until the folder it left is synced.

This is less than ext4, XFS and Btrfs promise, so what survives here survives there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .operations import Op, Tree, parent

Name = tuple[int, str]
"""A folder's inode, and a name in it."""

ALL, NONE, ZERO, CUT = "all", "none", "zero", "cut"
SURVIVALS = (ALL, NONE, ZERO, CUT)
"""What became of the unsynced bytes of a file."""


@dataclass
class _File:
    now: bytes = b""
    synced: bytes = b""

    def surviving(self, survival: str) -> bytes:
        if survival == ALL or self.now == self.synced:
            return self.now
        if survival == NONE:
            return self.synced
        same = next((i for i, (a, b) in enumerate(zip(self.now, self.synced, strict=False)) if a != b), None)
        same = min(len(self.now), len(self.synced)) if same is None else same
        if survival == ZERO:
            return self.now[:same] + bytes(len(self.now) - same)
        return self.now[: same + (len(self.now) - same) // 2]


@dataclass
class _Change:
    """One change of names, which happens whole or not at all."""

    edits: tuple[tuple[Name, int | None], ...]
    after: tuple[_Change, ...]
    """Changes without which this one cannot have happened."""

    def folders(self) -> set[int]:
        return {folder for (folder, _), _ in self.edits}

    def names(self) -> set[Name]:
        return {name for name, _ in self.edits}


@dataclass
class Disk:
    """A folder as a running system sees it, and what of that is on the disk."""

    tree: Tree
    files: dict[int, _File] = field(default_factory=dict)
    now: dict[Name, int] = field(default_factory=dict)
    durable: dict[Name, int] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)
    folders: set[int] = field(default_factory=lambda: {0})
    inodes: int = 0

    def __post_init__(self) -> None:
        for path, content in sorted(self.tree.items()):
            inode = self._new(path, folder=content is None)
            if content is not None:
                self.files[inode] = _File(content, content)
        self.durable, self.pending = dict(self.now), []

    def apply(self, op: Op) -> None:
        """Do what a process did."""
        if op.kind in ("create", "mkdir"):
            if self._name(op.path) not in self.now:
                self._new(op.path, folder=op.kind == "mkdir")
        elif op.kind == "write":
            file = self.files[self.inode(op.path)]
            start = file.now[: op.offset].ljust(op.offset, b"\0")
            file.now = start + op.data + file.now[op.offset + len(op.data) :]
        elif op.kind == "truncate":
            file = self.files[self.inode(op.path)]
            file.now = file.now[: op.offset].ljust(op.offset, b"\0")
        elif op.kind == "fsync":
            self._sync(self.inode(op.path))
        elif op.kind == "link":
            self._change((self._name(op.to), self.inode(op.path)))
        elif op.kind == "rename":
            self._rename(op.path, op.to)
        elif op.kind in ("unlink", "rmdir"):
            self._change((self._name(op.path), None))
        elif op.kind != "returned":
            raise ValueError(f"an operation without a model: {op}")

    def _new(self, path: str, folder: bool) -> int:
        self.inodes += 1
        if folder:
            self.folders.add(self.inodes)
        else:
            self.files[self.inodes] = _File()
        self._change((self._name(path), self.inodes))
        return self.inodes

    def inode(self, path: str) -> int:
        """Return what a path leads to, or raise KeyError."""
        inode = 0
        for part in () if path == "." else path.split("/"):
            inode = self.now[inode, part]
        return inode

    def _name(self, path: str) -> Name:
        return self.inode(parent(path)), path.rpartition("/")[2]

    def _change(self, *edits: tuple[Name, int | None], after: tuple[_Change, ...] = ()) -> _Change:
        names = {name for name, _ in edits}
        change = _Change(edits, after + tuple(other for other in self.pending if other.names() & names))
        self.pending.append(change)
        _edit(self.now, change)
        return change

    def _rename(self, path: str, to: str) -> None:
        inode, source, target = self.inode(path), self._name(path), self._name(to)
        if inode in self.folders or source[0] == target[0]:
            self._change((target, inode), (source, None))
        else:
            self._change((source, None), after=(self._change((target, inode)),))

    def _sync(self, inode: int) -> None:
        if inode in self.files:
            self.files[inode].synced = self.files[inode].now
            return
        kept = _closed({id(change) for change in self.pending if inode in change.folders()}, self.pending)
        for change in self.pending:
            if id(change) in kept:
                _edit(self.durable, change)
        self.pending = [change for change in self.pending if id(change) not in kept]

    def below(self, path: str) -> dict[str, int]:
        """Return the inodes of a path and of all that lies below it, as a running system sees them."""
        found = {path: self.inode(path)}
        todo = [path]
        while todo:
            folder = todo.pop()
            for (above, name), entry in self.now.items():
                if above != found[folder]:
                    continue
                path = name if folder == "." else f"{folder}/{name}"
                found[path] = entry
                todo.append(path)
        return found

    def unsynced(self) -> list[int]:
        """Return the files with bytes that no fsync followed, oldest first."""
        return [inode for inode, file in self.files.items() if file.now != file.synced]

    def left(self, kept: Iterable[int], survivals: dict[int, str], other: str) -> dict[str, bytes | None]:
        """Return the tree that a power cut leaves.

        Args:
            kept: Positions in `pending` of changes that happened; those that they need happened too.
            survivals: What became of unsynced bytes of these files.
            other: The same for the rest.
        """
        chosen = _closed({id(self.pending[position]) for position in kept}, self.pending)
        names = dict(self.durable)
        for change in self.pending:
            if id(change) in chosen:
                _edit(names, change)
        below: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), inode in names.items():
            below.setdefault(folder, []).append((name, inode))
        tree: dict[str, bytes | None] = {}
        todo = [("", 0)]
        while todo:
            prefix, folder = todo.pop()
            for name, inode in below.get(folder, []):
                if inode in self.folders:
                    tree[prefix + name] = None
                    todo.append((f"{prefix}{name}/", inode))
                else:
                    tree[prefix + name] = self.files[inode].surviving(survivals.get(inode, other))
        return tree


def _edit(names: dict[Name, int], change: _Change) -> None:
    for name, inode in change.edits:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _closed(chosen: set[int], pending: Sequence[_Change]) -> set[int]:
    """Return the chosen changes with all that they need."""
    for change in reversed(pending):
        if id(change) in chosen:
            chosen = chosen | {id(other) for other in change.after}
    return chosen


@dataclass(frozen=True)
class Crash:
    """One state that a power cut may leave."""

    tree: dict[str, bytes | None]
    after: int
    """How many operations had happened; the first one that can leave this tree."""
    returned: bool
    """Whether `save_state` had returned, at the last such moment."""
    why: str


def crashes(start: Tree, ops: Sequence[Op], limit: int, seed: int = 0) -> list[Crash]:
    """Return different trees that a power cut during `ops` may leave, at most about `limit`.

    At each moment these are always among them, whatever the limit: nothing unsynced survived, all of it did, all
    names did without the bytes or with zeros. The rest is drawn; each moment draws as long as the limit allows.
    """
    # One tree before the return and one after it are two states: only the second has to be the new one.
    found: dict[tuple[bool, frozenset[tuple[str, bytes | None]]], Crash] = {}
    drawn: list[Crash] = []
    generator = random.Random(seed)
    disk, returned = Disk(start), False
    for count, op in enumerate([Op("returned", "start"), *ops]):
        if op != Op("returned", "start"):
            disk.apply(op)
            returned = returned or op.kind == "returned"
        for number, (tree, why) in enumerate(_at(disk, generator)):
            key = returned, frozenset(tree.items())
            if key in found:
                continue
            found[key] = crash = Crash(tree, count, returned, why)
            if number >= _ALWAYS:
                drawn.append(crash)
    surplus = len(found) - limit
    dropped = {id(crash) for crash in generator.sample(drawn, min(max(surplus, 0), len(drawn)))}
    return [crash for crash in found.values() if id(crash) not in dropped]


_ALWAYS = 4
_DRAWS = 40


def _at(disk: Disk, generator: random.Random) -> Iterator[tuple[dict[str, bytes | None], str]]:
    changes, files = range(len(disk.pending)), disk.unsynced()
    yield disk.left((), {}, NONE), "nothing unsynced"
    yield disk.left(changes, {}, ALL), "everything"
    yield disk.left(changes, {}, NONE), "all names, no unsynced bytes"
    yield disk.left(changes, {}, ZERO), "all names, zeros for unsynced bytes"
    for only in changes:
        yield disk.left((only,), {}, ALL), f"only change {only} of names"
        yield disk.left((only,), {}, NONE), f"only change {only} of names, no bytes"
        needed = _needing(disk.pending, only)
        yield disk.left([other for other in changes if other not in needed], {}, ALL), f"without change {only} of names"
    for file in files:
        for survival in (NONE, ZERO, CUT):
            yield disk.left(changes, {file: survival}, ALL), f"all names, {survival} of the bytes of one file"
    if len(changes) + len(files) > 1:
        for draw in range(_DRAWS):
            kept = [change for change in changes if generator.random() < 0.5]
            survivals = {file: generator.choice(SURVIVALS) for file in files}
            yield disk.left(kept, survivals, ALL), f"draw {draw}"


def _needing(pending: Sequence[_Change], position: int) -> set[int]:
    """Return the positions of a change and of all that cannot have happened without it."""
    missing = {id(pending[position])}
    found = {position}
    for other, change in enumerate(pending):
        if any(id(needed) in missing for needed in change.after):
            missing.add(id(change))
            found.add(other)
    return found
