"""What workers print, passed on while they run.

Owns the pipes. A notebook's kernel replaces `sys.stdout` by an object that only its own process can write to, so each
worker writes into two named pipes, and a thread of the launcher hands on what arrives, line by line.

The lines of this machine's first worker appear as they are, those of the others behind `[rank N] `.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import selectors
import sys
import threading
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Any, Self, TextIO

STREAMS = ("stdout", "stderr")
PARTIAL_SECONDS = 0.3
"""How long a line without its end is kept, in the hope of the rest; a progress bar or a prompt has no end."""


def marks(first_rank: int, processes_here: int, template: str | None = None, role: str = "default") -> tuple[str, ...]:
    """Return what stands before each line, for each worker of this machine.

    Args:
        first_rank: The rank of this machine's first worker.
        processes_here: How many workers this machine has.
        template: Torch's form, with `${role_name}`, `${rank}` and `${local_rank}`; for all workers then.
        role: What stands for the first of these.
    """
    ranks = range(first_rank, first_rank + processes_here)
    if template is not None:
        fill = Template(template).safe_substitute
        return tuple(fill(role_name=role, rank=rank, local_rank=rank - first_rank) for rank in ranks)
    return ("", *(f"[rank {rank}] " for rank in ranks[1:]))


class Lines:
    """Cuts what arrives from one stream of one worker into pieces for people."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._kept = ""
        self._at_start = True

    def feed(self, data: bytes) -> str:
        """Take what arrived; return the whole lines. A carriage return ends one too, as in progress bars."""
        text = self._kept + self._decode(data)
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        self._kept = text[end:]
        return self._marked(text[:end])

    def rest(self) -> str:
        """Return what has no end of line yet."""
        text, self._kept = self._kept, ""
        return self._marked(text)

    def _marked(self, text: str) -> str:
        if not text:
            return ""
        begun = not self._at_start
        self._at_start = text[-1] in "\r\n"
        marked = re.sub(r"(?:^|(?<=[\r\n]))(?=[^\r\n])", lambda _: self.mark, text)
        return marked.removeprefix(self.mark) if begun else marked


class Voices:
    """Hands on what workers print, from entering to leaving. Not for Windows, which has no such pipes."""

    def __init__(self, folder: Path, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes
        self._folder = folder
        self._ears: dict[int, tuple[Lines, TextIO]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="accelerate-voices", daemon=True)

    def __enter__(self) -> Self:
        for number, mark in enumerate(self._prefixes):
            for stream in STREAMS:
                pipe = _pipe(self._folder, number, stream)
                os.mkfifo(pipe, 0o600)
                # Open for writing too: the pipe never ends, however often workers come and go.
                ear = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._ears[ear] = (Lines(mark), getattr(sys, stream))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for ear, (lines, target) in self._ears.items():
            _say(target, lines.feed(_drained(ear)) + lines.rest())
        self.forget()

    def forget(self) -> None:
        """Close the ears; also in a forked worker, which would otherwise listen to itself when the launcher is gone."""
        for ear in self._ears:
            os.close(ear)
        self._ears = {}

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for ear in self._ears:
                selector.register(ear, selectors.EVENT_READ)
            while not self._stop.is_set():
                events = selector.select(PARTIAL_SECONDS / 3)
                for key, _ in events:
                    lines, target = self._ears[key.fd]
                    _say(target, lines.feed(_read(key.fd)))
                if not events:
                    for lines, target in self._ears.values():
                        _say(target, lines.rest())


def speak_into(folder: Path, local_rank: int) -> None:
    """Let this process, a worker, print into its pipes, at every level: Python's, logging's and C's."""
    for number, stream in enumerate(STREAMS, 1):
        pipe = _pipe(folder, local_rank, stream)
        if not pipe.exists():  # Windows
            continue
        before = getattr(sys, stream)
        voice = os.open(pipe, os.O_WRONLY)
        os.dup2(voice, number)
        os.close(voice)
        raw = io.FileIO(number, "w", closefd=False)
        after = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True)
        setattr(sys, stream, after)
        setattr(sys, f"__{stream}__", after)
        _redirect_logging(before, after)


def _redirect_logging(before: Any, after: TextIO) -> None:
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.stream = after  # not setStream, which would flush the old one


def _pipe(folder: Path, local_rank: int, stream: str) -> Path:
    return folder / f"{stream}.{local_rank}"


def _read(ear: int) -> bytes:
    try:
        return os.read(ear, 65536)
    except BlockingIOError:
        return b""


def _drained(ear: int) -> bytes:
    return b"".join(iter(lambda: _read(ear), b""))


def _say(target: TextIO, text: str) -> None:
    if not text:
        return
    try:
        target.write(text)
        target.flush()
    except (OSError, ValueError):  # whoever read has gone; the workers go on
        return
