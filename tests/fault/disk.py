"""Disks that refuse: each fault is a context in which the calling process, and no other, meets it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

NOBODY = 65534
_CLONE_NEWNS = 0x00020000


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """Lower a limit of this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def small_files(_: Path) -> contextlib.AbstractContextManager[None]:
    """No file may have more than 1,000 bytes."""
    return limited(resource.RLIMIT_FSIZE, 1000)


def no_descriptors(_: Path) -> contextlib.AbstractContextManager[None]:
    """No further file can be opened."""
    return limited(resource.RLIMIT_NOFILE, 3)


@contextlib.contextmanager
def no_rights(_: Path) -> Iterator[None]:
    """The process is nobody's, and the folder is not."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder is a read-only mount, for this process alone."""
    own_mounts()
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def own_mounts() -> None:
    """Let what this process mounts be seen by no other one, and end with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def can_mount() -> bool:
    """Tell whether this user may mount."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mkdir -p /tmp && mount -t tmpfs -o size=64k none /tmp"]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the small disk that `folder` is but for 3,000 bytes or less."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        stream.write(bytes(shutil.disk_usage(folder).free - 4096))
    try:
        yield
    finally:
        filler.unlink()


def failing_fsync(number: int) -> Any:
    """`os.fsync` fails with this error, as on a disk that notices when data are flushed."""

    @contextlib.contextmanager
    def failing(_: Path) -> Iterator[None]:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        real, os.fsync = os.fsync, fsync
        try:
            yield
        finally:
            os.fsync = real

    return failing


@contextlib.contextmanager
def injected(files: Sequence[Path], calls: str, error: str, when: str = "1+") -> Iterator[None]:
    """Let strace answer these system calls on these files of this process with an error."""
    paths = [part for file in files for part in ("-P", str(file))]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", *paths, "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:error={error}:when={when}", "-p", str(os.getpid())]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not _traced():
            if tracer.poll() is not None or time.monotonic() > deadline:
                assert tracer.stderr is not None
                raise RuntimeError(f"strace cannot attach: {tracer.stderr.read()}")
            time.sleep(0.01)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def _traced() -> bool:
    """Tell whether every thread of this process has a tracer."""
    tasks = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
    return all("TracerPid:\t0\n" not in text for text in tasks)


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the names and hashes of all files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files}


FSYNC_ERRORS = {"EIO on fsync": errno.EIO, "EDQUOT on fsync": errno.EDQUOT}
