"""One worker that runs a function: a fork of the notebook's process, or a new interpreter.

Owns what stands around the call: where prints go, what becomes of the result, who is told of an exception. Loads torch
only where the function does, or something fails.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core import last_words
from ..settings import env
from . import cargo, voices

CALL_FILE = "call"


@dataclass(frozen=True)
class Desk:
    """The folder over which a launcher and its workers exchange what they have for each other."""

    folder: Path
    returns: bool = False
    """Whether results are to be sent back."""

    def result(self, local_rank: int) -> Path:
        """Return the file for the result of a worker."""
        return self.folder / f"result.{local_rank}"

    def results(self, first_rank: int, processes: int) -> list[Any]:
        """Return what the workers returned, in the order of their ranks."""
        return cargo.unpack_results([(first_rank + here, self.result(here)) for here in range(processes)])


def perform(desk: Desk, function: Callable[..., Any], arguments: Sequence[Any], *, by_value: bool = False) -> None:
    """Call the function in a worker, its prints going to the launcher, and leave its result on the desk."""
    local_rank = int(env.read()["LOCAL_RANK"])
    voices.speak_into(desk.folder, local_rank)
    try:
        value = function(*arguments)
        if desk.returns:
            cargo.pack_result(value, desk.result(local_rank), by_value=by_value)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def command(desk: Desk) -> tuple[str, ...]:
    """Return the words that start a new interpreter for what `cargo.pack_call` left on the desk.

    It looks for modules where this one does, the folder of the notebook included.
    """
    program = (
        f"import sys; sys.path[:] = {cargo.search_path()!r}; "
        f"from accelerate.launch.worker import main; main(sys.argv[1], {desk.returns})"
    )
    return (sys.executable, "-c", program, str(desk.folder))


def main(folder: str, returns: bool) -> None:
    """Work as a new interpreter."""
    end_with_launcher()
    desk = Desk(Path(folder), returns)
    work(desk, lambda: cargo.unpack_call(desk.folder / CALL_FILE), by_value=True)


def work(desk: Desk, call: Callable[[], tuple[Callable[..., Any], Sequence[Any]]], *, by_value: bool = False) -> None:
    """Perform a call, and leave this process with a note for the launcher if it fails; the launcher shows it.

    Args:
        desk: Where the result is left.
        call: Returns the function and its arguments.
        by_value: How the result travels. See [Note: by name or by value] in `launch.cargo`.
    """
    try:
        perform(desk, *call(), by_value=by_value)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch would take it for a good end, and wait for a result
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # the traceback begins with the function that the user knows
        if not last_words.tell(env.read(), error.with_traceback(trace)):
            raise
        sys.exit(1)


_fork_for_work = False


@contextmanager
def forks_for_work() -> Iterator[None]:
    """Let processes that are forked in this block leave alone what was garbage before.

    Destructors of stores and loaders wait for threads, which a fork does not have: the system would end it.
    """
    global _fork_for_work
    _register_once()
    before, _fork_for_work = _fork_for_work, True
    try:
        yield
    finally:
        _fork_for_work = before


@cache
def _register_once() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_keep_garbage)


def _keep_garbage() -> None:
    if _fork_for_work:
        gc.freeze()


_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the kernel end this process when its launcher is gone, however that ended. On Linux; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
