"""What workers print, when it goes into files.

Owns the layout of the folder for logs, and the copy on the terminal: whole lines, each with its rank. Imports torch's
interface for this; only when such a run starts.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import IO, Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import to_map

from ..core.last_words import LAUNCHER_VARIABLE
from ..core.leaving import NOTE_VARIABLE
from .machine import unusable_folder

NOTE_FILE = "preempted"
"""In the folder for notes: that the run saved itself."""
_STREAMS = {"stdout": Std.OUT, "stderr": Std.ERR}
_LOOK_SECONDS = 0.1
FINISH_SECONDS = 2.0
"""How long a reader may let the last of it wait."""
_PIECE_BYTES = 1 << 16


@dataclass
class Streams:
    """Where the streams of one worker of this machine go."""

    rank: int
    folder: Path
    """That of its notes."""
    files: dict[str, Path] = field(default_factory=dict)
    """The streams that go into files."""
    shown: set[str] = field(default_factory=set)
    """Those of them that the terminal gets too."""
    are_kept: bool = True
    """Whether the files are there when the run has ended."""


class Logs(LogsSpecs):
    """Decides, for each attempt, where workers print and where they leave notes.

    The newest output of rank 3 is `LOG_DIR/rank_3/stdout.log` and `stderr.log`. Those of earlier attempts, and of
    earlier runs in the same folder, stay as `stdout.1.log`, `stdout.2.log` and so on, the oldest first.

    Args:
        log_dir: Where logs are kept; without it they end with the run.
        described: The same with its origin, for errors.
        redirects: Which streams go into files only.
        tee: Which go into files and to the terminal.
        shown: The ranks of this machine whose output the terminal gets; empty for all.
        prefix: What stands before each line on the terminal: a template with `role_name`, `rank` and `local_rank`.
        role: The name of the workers.
        filters: Stream -> what a line must contain to be copied into `filtered_stdout.log`, too.
    """

    def __init__(
        self,
        *,
        log_dir: str | None = None,
        described: str = "",
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        shown: Collection[int] = (),
        prefix: str | None = None,
        role: str = "default",
        filters: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        super().__init__(log_dir, redirects, tee, set(shown) or None)
        self.notes = Path()
        self._kept = None if log_dir is None else Path(log_dir)
        self._described = described or f"log_dir={log_dir}"
        self.streams: dict[int, Streams] = {}
        self._wanted = (redirects, tee)
        self._shown = set(shown)
        self._prefix = prefix or ("[${role_name} ${rank}] " if role != "default" else "[rank ${rank}] ")
        self._role = role
        self._filters = dict(filters or {})
        self._tail: Tail | None = None

    def placed(self, folder: Path) -> Logs:
        """Say where notes go: into a folder of this launch alone."""
        self.notes = folder
        return self

    def _mark(self, variables: dict[str, str]) -> None:
        """Let a worker know its launcher, and be known by it. Only workers: what else this process starts is not the run's."""
        variables[NOTE_VARIABLE] = str(self.notes / NOTE_FILE)
        variables[LAUNCHER_VARIABLE] = str(os.getpid())

    @property
    def root_log_dir(self) -> str:
        return str(self._kept or self.notes)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Choose the files of an attempt. Torch calls it before it starts the workers, with their variables."""
        self.finish()
        redirects, tee = (to_map(wanted, len(envs)) for wanted in self._wanted)
        found, copies = LogsDest(), []
        for local_rank, variables in envs.items():
            self._mark(variables)
            attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
            notes = self.notes / f"attempt_{attempt}" / str(local_rank)
            notes.mkdir(parents=True, exist_ok=True)
            own = Streams(int(variables.get("RANK", local_rank)), notes, are_kept=self._kept is not None)
            self.streams[local_rank] = own
            found.error_files[local_rank] = str(notes / "error.json")
            (notes / "error.json").unlink(missing_ok=True)  # attempts that a new machine began have the same number
            variables["TORCHELASTIC_ERROR_FILE"] = found.error_files[local_rank]
            seen = not self._shown or local_rank in self._shown
            for name, paths in (("stdout", found.stdouts), ("stderr", found.stderrs)):
                paths[local_rank] = "" if seen else os.devnull
                if (redirects[local_rank] | tee[local_rank]) & _STREAMS[name]:
                    own.files[name] = self._fresh(own, name)
                    paths[local_rank] = str(own.files[name])
                    copied = bool(tee[local_rank] & _STREAMS[name]) and seen
                    own.shown |= {name} if copied else set()
                    if copied or self._filters.get(name):
                        copies.append(self._copy(own, name, variables, copied))
        if copies:
            self._tail = Tail(copies)
        return found

    def finish(self) -> None:
        """Copy what is left to the terminal, when the workers have ended."""
        if self._tail is not None:
            self._tail.finish()
            self._tail = None

    def _fresh(self, own: Streams, name: str) -> Path:
        folder = own.folder if self._kept is None else self._kept / f"rank_{own.rank}"
        file = folder / f"{name}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                file.rename(self.later_name(file))
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except OSError as error:
            if self._kept is None:  # a folder of our own, which no flag has named
                raise
            raise unusable_folder(self._described, f"{error.filename}: {error.strerror}") from None
        return file

    def later_name(self, file: Path) -> Path:
        """Return where the output in a file of this attempt will be found when there has been another one."""
        numbers = itertools.count(1)
        return next(path for n in numbers if not (path := file.with_name(f"{file.stem}.{n}.log")).exists())

    def _copy(self, own: Streams, name: str, variables: Mapping[str, str], copied: bool) -> Copy:
        known = {"role_name": self._role, "rank": own.rank, "local_rank": variables.get("LOCAL_RANK", "")}
        return Copy(
            own.files[name],
            name if copied else None,
            Template(self._prefix).safe_substitute(known),
            tuple(self._filters.get(name, ())),
            own.files[name].parent / f"filtered_{name}.log",
        )


class AdoptedLogs(Logs):
    """Somebody else's choice of files, of which we only take notice.

    Args:
        inner: What decides.
    """

    def __init__(self, inner: LogsSpecs) -> None:
        super().__init__()
        self._inner = inner

    @property
    def root_log_dir(self) -> str:
        return self._inner.root_log_dir

    def later_name(self, file: Path) -> Path:
        """Return the same name: what becomes of it is not for us to say."""
        return file

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Choose the files of an attempt, as the other one does."""
        found = self._inner.reify(envs)
        self.streams = {}
        for local_rank, variables in envs.items():
            self._mark(variables)
            chosen = {"stdout": found.stdouts.get(local_rank), "stderr": found.stderrs.get(local_rank)}
            files = {name: Path(file) for name, file in chosen.items() if file and file != os.devnull}
            note = found.error_files.get(local_rank)
            notes = Path(note).parent if note else self.notes
            self.streams[local_rank] = Streams(int(variables.get("RANK", local_rank)), notes, files, set(files))
        return found


@dataclass
class Copy:
    """One stream of one worker that is read while it is written."""

    file: Path
    to: str | None
    """`stdout` or `stderr`, if the terminal gets it."""
    prefix: str
    filters: tuple[str, ...] = ()
    filtered: Path | None = None
    _read: IO[bytes] | None = None
    _begun: bytes = b""
    _may_go_on_with_newline: bool = False

    def lines(self, *, last: bool) -> Iterator[str]:
        """Yield the lines that are whole by now; the rest of an unfinished one waits, unless it is the `last` look."""
        if self._read is None:
            try:
                self._read = self.file.open("rb")
            except FileNotFoundError:
                return
        news = self._read.read()
        if news and self._may_go_on_with_newline:
            news = news.removeprefix(b"\n")
        self._may_go_on_with_newline = news.endswith(b"\r") if news else self._may_go_on_with_newline
        # A progress bar ends its lines with a carriage return.
        text = self._begun + news
        *whole, self._begun = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
        if last:
            if self._begun:
                yield self._begun.decode("utf-8", "replace")
            self._read.close()


class Tail:
    """Copies streams to the terminal, in a thread, until it is finished.

    It writes past the buffers of `sys.stdout` and `sys.stderr`: when whoever reads them has stopped reading, nobody but
    this thread is to wait.
    """

    def __init__(self, copies: Collection[Copy]) -> None:
        self._copies = copies
        self._given_up: set[str | Path] = set()
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="accelerate-logs", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Copy what is there, and stop. A reader that has stopped reading is not waited for."""
        self._moved = time.monotonic()
        self._done.set()
        while self._thread.is_alive() and time.monotonic() - self._moved < FINISH_SECONDS:
            self._thread.join(_LOOK_SECONDS)

    def _run(self) -> None:
        while not self._done.wait(_LOOK_SECONDS):
            self._look(last=False)
        self._look(last=True)

    def _look(self, *, last: bool) -> None:
        for copy in self._copies:
            lines = list(copy.lines(last=last))
            if lines and copy.to is not None and copy.to not in self._given_up:
                text = "".join(f"{copy.prefix}{line}\n" for line in lines)
                self._try(copy.to, lambda name=copy.to, text=text: self._show(name, text))
            chosen = [line for line in lines if any(part in line for part in copy.filters)]
            if chosen and copy.filtered is not None and copy.filtered not in self._given_up:
                self._try(copy.filtered, lambda file=copy.filtered, chosen=chosen: _append(file, chosen))

    def _try(self, target: str | Path, write: Callable[[], None]) -> None:
        """Write, or give it up and say so: the run goes on."""
        try:
            write()
        except OSError as error:
            self._given_up.add(target)
            with suppress(OSError):  # it may be this very stream
                self._show("stderr", f"accelerate: no more output is copied to {target}: {error.strerror}\n")

    def _show(self, name: str, text: str) -> None:
        stream: Any = getattr(sys, name)
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # that of a notebook, say
            stream.write(text)
            stream.flush()
            return
        left = text.encode("utf-8", "replace")
        while left:
            try:
                left = left[os.write(number, left[:_PIECE_BYTES]) :]
                self._moved = time.monotonic()
            except BlockingIOError:  # somebody has told the stream not to wait
                select.select([], [number], [])


def _append(file: Path, lines: Collection[str]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
