"""Measure what reading something costs: memory and time, in a process of its own."""

from __future__ import annotations

import os
import pickle
import re
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 2**20
_ADDRESS_SPACE = 8 * 2**30
_SECONDS = 30


@dataclass(frozen=True)
class Cost:
    """What happened, and what it took."""

    error: str
    """Class and text of what was raised; empty if nothing was."""
    is_clean: bool
    """Whether it is one of this library's errors about checkpoints."""
    memory: int
    """Bytes that the process held at most, beyond what it had before."""
    seconds: float
    """Of processor time."""


def cost_of(action: Callable[[], Any], *, apart: bool = True) -> Cost:
    """Run `action`; `apart` in a copy of this process, which may not grow without end."""
    if not apart:
        return _measure(action)
    with tempfile.NamedTemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
                resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
                Path(answer.name).write_bytes(pickle.dumps(_measure(action)))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        content = Path(answer.name).read_bytes()
    assert content, f"the process ended with {os.waitstatus_to_exitcode(status)}"
    return pickle.loads(content)


def _measure(action: Callable[[], Any]) -> Cost:
    from accelerate.core.errors import CheckpointError

    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before, of_files = _status("VmRSS"), _status("RssFile")
    began = time.process_time()
    error, is_clean = "", False
    try:
        action()
    except Exception as caught:
        error, is_clean = f"{type(caught).__name__}: {caught}", isinstance(caught, CheckpointError)
    seconds = time.process_time() - began
    # A copy of a process maps the code of its libraries anew when it first runs it: that is not what reading costs.
    code = max(0, _status("RssFile") - of_files)
    return Cost(error, is_clean, _status("VmHWM") - before - code, seconds)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def size_of(folder: Path) -> int:
    """Return how many bytes all files below `folder` hold."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
