"""Saves under strace: a kill at the nth change of the disk, and the list of all changes.

strace counts the calls of each kind and each thread by itself, and its filter by path knows no trees. So an undisturbed
save is logged first, and each of its calls that changes something is then met by its kind and its number.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .operations import Op

MISSING = "" if shutil.which("strace") else "strace is not installed"

_CHANGES = (
    "openat,open,creat,write,pwrite64,writev,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,ftruncate,truncate,fallocate,copy_file_range,sendfile,symlink,symlinkat"
)
_POSITIONS = "lseek"


@contextmanager
def _strace(pids: Sequence[int], options: Sequence[str]) -> Iterator[None]:
    attach = [word for pid in pids for word in ("-p", str(pid))]
    command = ["strace", "-qq", "-f", *options, *attach]  # -f: threads flush what others wrote
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        while any(_tracer(pid) == 0 for pid in pids):
            assert process.poll() is None, f"strace does not attach: {process.stderr.read().decode()}"
            time.sleep(0.001)
        yield
    finally:
        process.stderr.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tracer(pid: int) -> int:
    match = re.search(r"TracerPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match.group(1)) if match else 0


@dataclass(frozen=True)
class Point:
    """A call to be killed at: the `number`-th of its kind."""

    call: str
    number: int


@contextmanager
def kill_at(point: Point, victim: int, pids: Sequence[int]) -> Iterator[None]:
    """Kill one of the processes when it is about to make a certain call."""
    inject = f"inject={point.call}:signal=SIGKILL:when={point.number}"
    with _strace([pids[victim]], ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject]):
        yield


@contextmanager
def logged(log: Path, pids: Sequence[int], only: int | None = None) -> Iterator[None]:
    """Write to `log` what the processes do, or only one of them."""
    pids = pids if only is None else [pids[only]]
    options = ["-o", str(log), "-y", "-xx", "-s", str(1 << 20), "-e", f"trace={_CHANGES},{_POSITIONS}"]
    with _strace(pids, options):
        yield


_CALL = re.compile(r"^(?:(?P<pid>\d+) +)?(?P<name>\w+)\((?P<args>.*)\)\s+= (?P<result>-?\d+)(?P<rest>.*)$")
_ARGUMENT = re.compile(r'"[^"]*"|AT_FDCWD<[^>]*>|\d+<[^>]*>|[^,\s]+')
_UNFINISHED = re.compile(r"^(?:(?P<pid>\d+) +)?(?P<begin>.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(?:(?P<pid>\d+) +)?<\.\.\. \w+ resumed>(?P<end>.*)$")


def parse(log: str, root: Path, told: bytes = b'["told", "returned"]\n') -> list[Op]:
    """Return the changes below `root`, in order.

    Args:
        log: What strace wrote.
        root: Without symbolic links.
        told: What the processes write elsewhere when `save_state` has returned.

    Raises:
        ValueError: If there is a call that has no model.
    """
    reader = _Reader(str(root), told)
    return [op for line in _whole(log.splitlines()) for op in reader.read(line)]


def points(log: str, root: Path) -> list[Point]:
    """Return the calls that change something below `root`, in order, from the log of one process."""
    below = "".join(f"\\x{byte:02x}" for byte in os.fsencode(root))
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[Point, None] = {}  # threads count for themselves, and whichever comes first is met
    for line in _whole(log.splitlines()):
        if (match := _CALL.match(line)) is None:
            continue
        counts[match["pid"] or "", match["name"]] += 1
        reads = match["name"] in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT", match["args"])
        if below in match["args"] and not reads and match["name"] not in _POSITIONS:
            found[Point(match["name"], counts[match["pid"] or "", match["name"]])] = None
    return list(found)


def _whole(lines: Sequence[str]) -> Iterator[str]:
    begun: dict[str, str] = {}
    for line in lines:
        if match := _UNFINISHED.match(line):
            begun[match["pid"]] = match["begin"]
        elif match := _RESUMED.match(line):
            yield f"{match['pid']} {begun.pop(match['pid'])}{match['end']}"
        else:
            yield line


def _text(argument: str) -> bytes:
    return bytes.fromhex(argument.strip('"').replace("\\x", ""))


def _path(argument: str) -> str:
    """Return the path of `5<...>`, `AT_FDCWD<...>` or a quoted string."""
    inner = argument[argument.index("<") + 1 : -1] if argument.endswith(">") else argument
    return _text(inner).decode()


def _with_folders(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Return a call in its younger form, which names the folder that a path is relative to."""
    here = "AT_FDCWD<\\x2f>"
    if name == "rename":
        return "renameat", [here, arguments[0], here, arguments[1]]
    if name == "rmdir":
        return "unlinkat", [here, arguments[0], "AT_REMOVEDIR"]
    if name in ("symlink", "link", "creat", "truncate"):
        raise ValueError(f"no model of {name}{tuple(arguments)}")
    if name in ("open", "mkdir", "unlink"):
        return f"{name}at", [here, *arguments]
    return name.removesuffix("2"), arguments


class _Reader:
    def __init__(self, root: str, told: bytes) -> None:
        self.root, self.told = root, told
        self.places: dict[tuple[str, str], int] = {}
        """Where each open file stands, by its number and path."""

    def _relative(self, path: str) -> str | None:
        if path == self.root:
            return "."
        return path.removeprefix(self.root + "/") if path.startswith(self.root + "/") else None

    def _at(self, folder: str, path: str) -> str | None:
        name = _path(path)
        return self._relative(name if name.startswith("/") else f"{_path(folder)}/{name}")

    def read(self, line: str) -> Iterator[Op]:
        match = _CALL.match(line)
        if match is None or int(match["result"]) < 0:
            return
        name, arguments = match["name"], _ARGUMENT.findall(match["args"])
        yield from self._changes(*_with_folders(name, arguments), match)

    def _changes(self, name: str, arguments: list[str], match: re.Match[str]) -> Iterator[Op]:
        if name in ("renameat", "linkat"):
            source, target = self._at(*arguments[:2]), self._at(*arguments[2:4])
            if source is not None and target is not None:
                yield Op(name.removesuffix("at"), source, to=target)
            elif source != target:
                raise ValueError(f"a rename or link over the border: {match[0]}")
        elif name in ("openat", "unlinkat", "mkdirat"):
            path = self._at(*arguments[:2])
            if path is None:
                return
            if name == "openat":
                yield from self._opened(path, arguments[2], match["result"])
            elif name == "mkdirat":
                yield Op("mkdir", path)
            else:
                yield Op("rmdir" if "AT_REMOVEDIR" in arguments[2:] else "unlink", path)
        elif name == "symlinkat":
            raise ValueError(f"no model of {match[0]}")
        elif "<" in arguments[0]:
            yield from self._on_open_file(name, arguments, match)

    def _opened(self, path: str, flags: str, number: str) -> Iterator[Op]:
        self.places[number, path] = 0
        if "O_CREAT" in flags:
            yield Op("create", path)
        if "O_TRUNC" in flags:
            yield Op("truncate", path)

    def _on_open_file(self, name: str, arguments: list[str], match: re.Match[str]) -> Iterator[Op]:
        if name in ("copy_file_range", "sendfile"):
            if any("<" in argument and self._relative(_path(argument)) for argument in arguments):
                raise ValueError(f"no model of {match[0]}")
            return
        number, _, _ = arguments[0].partition("<")
        if name == "write" and _text(arguments[1]) == self.told:
            yield Op("returned")
        path = self._relative(_path(arguments[0]))
        if path is None:
            return
        result, key = int(match["result"]), (number, path)
        if name in ("write", "writev"):
            data = b"".join(map(_text, re.findall(r'"[^"]*"', match["args"])))[:result]
            yield Op("write", path, offset=self.places[key], data=data)
            self.places[key] += result
        elif name == "pwrite64":
            yield Op("write", path, offset=int(arguments[3]), data=_text(arguments[1])[:result])
        elif name == "lseek":
            self.places[key] = result
        elif name == "ftruncate":
            yield Op("truncate", path, offset=int(arguments[1]))
        elif name in ("fsync", "fdatasync"):
            yield Op("fsync", path)
        else:
            raise ValueError(f"no model of {match[0]}")
