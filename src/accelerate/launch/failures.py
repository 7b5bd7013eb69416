"""Which worker failed first, as far as it can be told.

Owns the judgement, from exit codes and from the notes that workers leave (`core.last_words`). Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.last_words import CRASH_FILE
from .report import Failure, WorkersFailed

_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "remote process exited",
    "Connection was likely closed", "Socket closed", "Timed out waiting", "wait timeout", "op.preamble.length <= op.nbytes",
    "communicator was aborted", "ncclRemoteError", "cannot reach another rank any more", "The processes cannot agree",
)  # fmt: skip
"""How gloo, nccl, torch's store and this library say that the rank at the other end is gone, or silent."""
_SPEAKERS = ("RuntimeError", "torch.", "accelerate.", "[rank")
"""What such a line begins with. A server somewhere else may close a connection too: that is an `OSError`."""
_OWN_THREAD = "Current thread"
_BLAME = ("", "lost", "ended")
"""Kinds of failures, that of a cause first."""
_ENDED = (-signal.SIGTERM, -getattr(signal, "SIGKILL", 9), -signal.SIGINT)


@dataclass
class Endings:
    """How the workers of this machine have ended in the present attempt."""

    codes: dict[int, int] = field(default_factory=dict)
    """Local rank -> exit code, in the order in which they ended."""
    times: dict[int, float] = field(default_factory=dict)
    """Local rank -> the moment that was noticed, by the clock that stamps files."""
    ended_by_us: set[int] = field(default_factory=set)
    """The local ranks that were still running when the launcher ended the run."""


@dataclass(frozen=True)
class Account:
    """What is known about the end of one rank."""

    rank: int
    pid: int | None
    code: int | None
    """`None` while it runs."""
    time: float
    exception: str = ""
    """The traceback that the worker has noted."""
    summary: str = ""
    """The first line of what the exception said."""
    crash: str = ""
    """Where the interpreter was when the system ended it."""
    arose_on: tuple[int, ...] = ()
    """The ranks on which its exception arose; empty if it did not say."""
    ended_by_us: bool = False
    streams: Any = None
    """Where its output went: `launch.logs.Streams`."""

    @property
    def traceback(self) -> str:
        """What there is to show."""
        return "\n".join(part.rstrip() for part in (self.crash, self.exception) if part.strip())

    @property
    def has_failed(self) -> bool:
        """Whether there is something to blame somebody for."""
        return bool(self.code) or bool(self.exception)

    @property
    def is_consequence(self) -> bool:
        """Whether it fell because another rank had, as far as it can be told."""
        if self.arose_on:
            return self.rank not in self.arose_on
        if self.exception:
            return _lost_connection(self.exception)
        return self.was_ended or self._may_be_aborted_by_gloo

    @property
    def _may_be_aborted_by_gloo(self) -> bool:
        """Whether it is a thread of gloo or nccl that may have aborted the process, which they do if messages do not fit.

        Such a thread is not one of Python's, which would be marked as the current one.
        """
        return self.code == -getattr(signal, "SIGABRT", 6) and _OWN_THREAD not in self.crash

    @property
    def was_ended(self) -> bool:
        """Whether the launcher ended it, before it came to an end of its own."""
        return self.ended_by_us and self.code in _ENDED and not self.exception

    @property
    def is_cause(self) -> bool:
        """Whether nothing has to be waited for to name a cause."""
        return self.has_failed and not self.is_consequence

    def key(self) -> tuple[bool, bool, bool, float, int]:
        """Sort the cause first: what is no consequence, by time; then an abort, whose victims say that they are such."""
        return (self.was_ended, self.is_consequence, self.is_consequence and bool(self.exception), self.time, self.rank)

    def failure(self) -> Failure:
        """Put it as the report wants it."""
        # A rank that was ended while it left because of its own exception has failed by that exception.
        code = 1 if self.exception and self.code in (None, 0, -signal.SIGTERM) else self.code or 0
        files = self.streams.files
        log = files.get("stderr") or files.get("stdout")
        unseen = None if "stderr" in self.streams.shown else files.get("stderr")
        return Failure(
            self.rank,
            self.pid,
            code,
            self.traceback or _last_lines(unseen),
            summary=self.summary,
            log=str(log) if log and self.streams.are_kept else None,
            kind="ended" if self.was_ended else "lost" if self.is_consequence else "",
        )


def accounts(run: Any) -> list[Account]:
    """Return what is known about each worker of this machine, the first cause first.

    Args:
        run: Its `logs`, `endings`, `ranks` and `pids`, as `launch.watching` keeps them.
    """
    found = []
    for local_rank, own in run.logs.streams.items():
        rank = run.ranks.get(local_rank, own.rank)
        found.append(_account(rank, run.pids.get(local_rank), local_rank, own, run.endings))
    return sorted(found, key=Account.key)


def judged(run: Any, *, another_follows: bool = False) -> WorkersFailed:
    """Say how an attempt failed, and make the files for output complete.

    Args:
        another_follows: Whether the workers are started again; their logs get other names then.
        run: As for `accounts`; further its `world_size`, its `elsewhere`, whether it `is_cut_off`, and from which `meeting`.
    """
    found = accounts(run)
    keep_tracebacks(found)
    failures = [account.failure() for account in found if account.has_failed]
    if another_follows:
        failures = [replace(item, log=item.log and str(run.logs.later_name(Path(item.log)))) for item in failures]
    gone = [account.rank for account in found if account.code == 0 and not account.ended_by_us]
    if run.elsewhere is not None and (
        not failures or _BLAME.index(run.elsewhere.kind) < _BLAME.index(failures[0].kind)
    ):
        failures.insert(0, run.elsewhere)
    silent = run.meeting if run.is_cut_off and run.elsewhere is None else ""
    return WorkersFailed.among(failures, run.world_size, gone, silent=silent)


def _account(rank: int, pid: int | None, local_rank: int, own: Any, endings: Endings) -> Account:
    text, summary, arose_on, time = _note(own.folder / "error.json")
    return Account(
        rank,
        pid,
        endings.codes.get(local_rank),
        time or endings.times.get(local_rank, float("inf")),
        text,
        summary,
        _text(own.folder / CRASH_FILE),
        arose_on,
        local_rank in endings.ended_by_us,
        own,
    )


def _note(file: Path) -> tuple[str, str, tuple[int, ...], float | None]:
    """Return the traceback, its gist, where it arose and when."""
    try:
        time, note = file.stat().st_mtime, json.loads(file.read_bytes())
    except (OSError, ValueError):  # there is none, or its writer was ended in the middle
        return "", "", (), None
    message = note.get("message") if isinstance(note, dict) else None
    if not isinstance(message, dict):
        return "", "", (), None
    said = str(message.get("message", ""))
    text = str(message.get("extraInfo", {}).get("py_callstack", said))
    return text, said.partition("\n")[0], tuple(note.get("arose_on", ())), time


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.partition("\nExtension modules:")[0]  # dozens of names, on one line


def _lost_connection(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines()]
    return any(line.startswith(_SPEAKERS) and any(sign in line for sign in _LOST) for line in lines)


_LAST_BYTES = 4096
_LAST_LINES = 12


def _last_lines(file: Path | None) -> str:
    """Return the end of what a worker printed, where only a file has it."""
    if file is None:
        return ""
    try:
        with file.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _LAST_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_LAST_LINES:])


def keep_tracebacks(found: Iterable[Account]) -> None:
    """Write what workers did not print into the files for their output, so that these are complete."""
    for account in found:
        file = account.streams.files.get("stderr")
        if file is None or not account.traceback:
            continue
        try:
            with file.open("a", encoding="utf-8", errors="surrogateescape") as stream:
                stream.write(f"{account.traceback.rstrip()}\n")
        except OSError:
            continue
