"""What a worker tells its launcher about its own end.

Owns the note that names an exception, and the file for a crash. Reads no environment, and imports nothing that takes
time: `import accelerate` calls `begin`. The launcher's half is `launch.failures`.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import AccelerateError

LAUNCHER_VARIABLE = "ACCELERATE_LAUNCHER_PID"
"""Names our launcher to the workers that it started. What a worker starts inherits it, and has another parent."""
NOTE_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Names the file for the note, as torch calls it."""
CRASH_FILE = "crash.txt"
"""Beside the note: where the interpreter was when the system ended it."""
DAEMON_SECONDS = 0.5
"""How long daemon processes of a rank that has failed may take to end, all together."""

_kept: list[Any] = []  # the crash file stays open as long as the process lives


def begin(environ: Mapping[str, str]) -> None:
    """Keep what is said at the end for the launcher, if this process is a worker of ours; otherwise do nothing.

    The launcher shows one traceback, last and once. So a worker that fails writes its own into a file, and prints it
    only where the launcher cannot be told any more.
    """
    note = environ.get(NOTE_FILE_VARIABLE)
    if note and environ.get(LAUNCHER_VARIABLE) == str(os.getppid()):
        if not environ.get("PYTHONUNBUFFERED"):  # that asks for each character at once
            _print_whole_lines()
        _note_exceptions(Path(note))
        _note_crashes(Path(note).with_name(CRASH_FILE))


def tell(environ: Mapping[str, str], error: BaseException) -> bool:
    """Note an exception that ends this process, a worker; tell whether the launcher will find it."""
    file = environ.get(NOTE_FILE_VARIABLE)
    return bool(file) and _told(Path(file), error)


def _print_whole_lines() -> None:
    # `python -u` writes a line and its end one after the other, and those of another rank come in between. As on a
    # terminal, text that has no end yet waits for it, or for flush=True.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _note_exceptions(file: Path) -> None:
    before, worker, launcher = sys.excepthook, os.getpid(), os.getppid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        told = (os.getpid(), os.getppid()) == (worker, launcher) and _told(file, error)
        if not told:
            before(kind, error, trace)
            return
        _let_no_daemon_wait()
        if before is not sys.__excepthook__:
            # Somebody shows or records exceptions in a way of their own; what they print is the traceback, then.
            _told(file, error, _caught(lambda: before(kind, error, trace)))

    sys.excepthook = hook


def _let_no_daemon_wait() -> None:
    """Have daemon processes of `multiprocessing`, as DataLoader workers are, killed if they do not end at once.

    Python asks them to end while it leaves, and waits for each without a limit. One that does not hear, in the middle
    of a sample, would hold up the news of a failure. Finalizers come right before that, after all exit handlers.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing.util")
    if multiprocessing is not None:
        multiprocessing.Finalize(None, _end_daemons, exitpriority=0)


def _end_daemons() -> None:
    from multiprocessing import active_children

    daemons = [child for child in active_children() if child.daemon]
    for child in daemons:
        child.terminate()
    deadline = time.monotonic() + DAEMON_SECONDS
    for child in daemons:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()


def _caught(say: Any) -> str:
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        say()
        return sys.stderr.getvalue()
    finally:
        sys.stderr = stderr


def _told(file: Path, error: BaseException, text: str = "") -> bool:
    """Write the note, in torch's form with what we add to it; tell whether it is there now."""
    found = traceback.TracebackException.from_exception(error)  # stands exceptions that cannot be printed
    note = {
        "message": {
            "message": f"{type(error).__name__}: {found}",
            "extraInfo": {
                "py_callstack": text or "".join(found.format()),
                "timestamp": str(int(time.time())),
            },
        },
        "arose_on": list(error.arose_on) if isinstance(error, AccelerateError) else [],
    }
    try:
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(note), encoding="utf-8", errors="surrogatepass")
        os.replace(aside, file)
    except (OSError, ValueError):
        return False
    return True


def _note_crashes(file: Path) -> None:
    if faulthandler.is_enabled():
        return
    try:
        _kept.append(file.open("w", encoding="utf-8"))
    except OSError:  # a crash is named without it
        return
    faulthandler.enable(_kept[-1])
