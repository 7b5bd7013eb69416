"""What a save does to the disk, seen from inside its process: needs no tool, and sees Python's calls only.

What compiled code writes is noticed at the next call of Python, before that call takes effect. Nothing here can be
taken off again, so it is for forked processes.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .operations import Op, parent, read_tree
from .power import ALL, Disk

_RENAMES = {"os.rename": "rename", "os.link": "link"}
_OTHERS = {"os.remove": "unlink", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}


def _watch(root: Path, before: Callable[[Op], None], after_sync: Callable[[Op], None]) -> None:
    """Call `before` ahead of each change below `root`, and `after_sync` after each fsync, never both at once."""
    own = threading.local()  # what a thread does in `before` is no change of the save
    lock = threading.Lock()

    def tell(listener: Callable[[Op], None], op: Op) -> None:
        own.busy = True
        try:
            with lock:
                listener(op)
        finally:
            own.busy = False

    def relative(path: Any, folder: Any = None) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.abspath(path)
        return os.path.relpath(path, root) if path == str(root) or path.startswith(f"{root}/") else None

    def find(event: str, args: tuple[Any, ...]) -> Op | None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            path = None if isinstance(args[0], int) else relative(args[0])
            return None if path is None else Op("truncate" if args[2] & os.O_TRUNC else "create", path)
        if event in _OTHERS:
            path = relative(args[0], args[-1])
            return None if path is None else Op(_OTHERS[event], path)
        if event in _RENAMES:
            source, target = relative(args[0], args[2]), relative(args[1], args[3])
            return None if source is None or target is None else Op(_RENAMES[event], source, to=target)
        return None

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if getattr(own, "busy", False) or not (event == "open" or event in _OTHERS or event in _RENAMES):
            return
        if (op := find(event, args)) is not None:
            tell(before, op)

    def syncing(real: Callable[[Any], None]) -> Callable[[Any], None]:
        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if (path := relative(number)) is None:
                return real(number)
            tell(before, Op("fsync", path))
            real(number)
            tell(after_sync, Op("fsync", path))
            return None

        return fsync

    os.fsync, os.fdatasync = syncing(os.fsync), syncing(os.fdatasync)
    sys.addaudithook(hook)


class _Record:
    def __init__(self, root: Path) -> None:
        self.root, self.ops, self.disk = root, [], Disk(read_tree(root))

    def before(self, op: Op) -> None:
        self.catch_up()
        if op.kind == "truncate":
            self._note(Op("create", op.path))
        if op.kind != "fsync":
            self._note(op)

    def _note(self, op: Op) -> None:
        if self._happens(op):
            self.disk.apply(op)
            self.ops.append(op)

    def _happens(self, op: Op) -> bool:
        """Tell whether the call, which is still to come, will succeed."""
        if op.kind in ("create", "mkdir"):
            return self._exists(parent(op.path)) and not self._exists(op.path)
        return op.kind == "returned" or self._exists(op.path)

    def _exists(self, path: str) -> bool:
        try:
            self.disk.inode(path)
        except KeyError:
            return False
        return True

    def catch_up(self) -> None:
        """Note what has been written since the last change that was seen."""
        known = self.disk.left(range(len(self.disk.pending)), {}, ALL)
        for path, content in read_tree(self.root).items():
            if path not in known:
                self._note(Op("mkdir" if content is None else "create", path))
            if content is not None and content != (known.get(path) or b""):
                self._note(Op("truncate", path, offset=len(content)))
                self._note(Op("write", path, data=content))


def recorded(tell: Callable[[Any], None], root: Path, file: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(tell, *args)` and leave in `file` what it did below `root`."""
    record = _Record(root)
    _watch(root, record.before, record._note)

    def listen(value: Any) -> None:
        if value == "returned":
            record.catch_up()
            record._note(Op("returned"))
        tell(value)

    value = function(listen, *args)
    record.catch_up()
    file.write_bytes(pickle.dumps(record.ops))
    return value


def counted(
    tell: Callable[[Any], None], rank: int, root: Path, file: Path, function: Callable[..., Any], *args: Any
) -> Any:
    """Call `function(tell, *args)` and leave in `file` how many changes below `root` this rank has made."""
    count = 0

    def before(op: Op) -> None:
        nonlocal count
        count += 1

    _watch(root, before, lambda op: None)
    value = function(tell, *args)
    if os.environ.get("RANK", "0") == str(rank):
        file.write_text(str(count))
    return value


def killed(
    tell: Callable[[Any], None], rank: int, number: int, root: Path, function: Callable[..., Any], *args: Any
) -> Any:
    """Call `function(tell, *args)`; on one rank, die when about to make the `number`-th change below `root`."""
    count = 0

    def before(op: Op) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("RANK", "0") == str(rank):
        _watch(root, before, lambda op: None)
    return function(tell, *args)
