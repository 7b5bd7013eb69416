"""Functions in forked processes, as ranks of one run; any of them may die."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..support.ranks import free_port

GRACE_SECONDS = 60.0
"""How long ranks may run on after one of them has died."""

READY = "ready"
"""A process that tells this waits until all of them have."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Attach = Callable[[Sequence[int]], AbstractContextManager[Any]]


@dataclass
class Outcome:
    """How one rank ended."""

    told: list[Any] = field(default_factory=list)
    value: Any = None
    error: str | None = None
    killed: bool = False
    hung: bool = False
    seconds_after_death: float = 0.0
    """How long it ran on after another rank had died."""


@dataclass
class _Child:
    pid: int
    reads: int
    go: int
    outcome: Outcome = field(default_factory=Outcome)
    buffered: bytes = b""
    open: bool = True

    def go_on(self) -> None:
        """Wake the child where it waits."""
        with suppress(BrokenPipeError):
            os.write(self.go, b"g")


@dataclass(frozen=True)
class Kill:
    """Kill these ranks so many seconds after the first of them has told something that `when` accepts."""

    ranks: Sequence[int]
    delay: float
    when: Callable[[Any], bool]


def _nothing(_: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


def run(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 1,
    attach: Attach = _nothing,
    timeout: float = 60,
    kill: Kill | None = None,
) -> list[Outcome]:
    """Call `function(tell, *args)` in `ranks` forked processes; return how each ended.

    Args:
        function: What it passes to `tell`, and what it returns, must be JSON.
        args: Its arguments.
        ranks: How many processes; several get a launcher's variables.
        attach: Given the process ids when all of them have told `READY`, where they wait; its context is left when
            they have ended.
        timeout: After this many seconds a process counts as hung and is killed.
        kill: Whom to kill, and when.
    """
    children = [_fork(function, args, rank, ranks, port) for port in [free_port()] for rank in range(ranks)]
    try:
        with ExitStack() as attached:
            _listen(children, lambda pids: attached.enter_context(attach(pids)), timeout, kill)
            for child in children:
                child.go_on()
            for child in children:
                _, status = os.waitpid(child.pid, 0)
                child.outcome.killed = os.WIFSIGNALED(status) and not child.outcome.hung
    finally:
        for child in children:
            os.close(child.reads)
            os.close(child.go)
    return [child.outcome for child in children]


def _fork(function: Callable[..., Any], args: Sequence[Any], rank: int, ranks: int, port: int) -> _Child:
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _end_with(parent)
            gc.freeze()  # destructors of what the parent holds are not for its copies
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            _become(rank, ranks, port)
            _answer(function, args, to_parent, from_parent)
            # Rank 0 holds the store, which others may still be joining.
            os.read(from_parent, 1)
            status = 0
        finally:
            os._exit(status)
    os.close(to_parent)
    os.close(from_parent)
    return _Child(pid, from_child, to_child)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the one that forked it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that was said
        os._exit(1)


def _become(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


def _answer(function: Callable[..., Any], args: Sequence[Any], to_parent: int, from_parent: int) -> None:
    def send(kind: str, value: Any) -> None:
        os.write(to_parent, json.dumps([kind, value]).encode() + b"\n")

    def tell(value: Any) -> None:
        send("told", value)
        if value == READY:
            os.read(from_parent, 1)

    try:
        send("value", function(tell, *args))
    except BaseException as error:  # reported in the parent, whatever it is
        where = traceback.format_exc() if os.environ.get("CRASH_TRACEBACKS") else ""
        send("error", f"{type(error).__name__}: {error}"[:500] + where)
    os.write(to_parent, b"end\n")


def _listen(children: list[_Child], attach: Callable[[Sequence[int]], Any], timeout: float, kill: Kill | None) -> None:
    deadline, death, kill_at = time.monotonic() + timeout, 0.0, None
    ready = False
    while waiting := [child for child in children if child.open]:
        until = deadline if kill_at is None else min(deadline, kill_at)
        readable, _, _ = select.select([child.reads for child in waiting], [], [], max(0.0, until - time.monotonic()))
        now = time.monotonic()
        for child in waiting:
            if child.reads in readable and _take(child):
                if child.outcome.killed:
                    death = death or now
                    deadline = min(deadline, death + GRACE_SECONDS)
                elif death:
                    child.outcome.seconds_after_death = now - death
        if not ready and all(READY in child.outcome.told for child in children):
            ready = True
            attach([child.pid for child in children])
            for child in children:
                child.go_on()
        if kill is not None and any(map(kill.when, children[kill.ranks[0]].outcome.told)):
            kill_at, victims, kill = now + kill.delay, kill.ranks, None
        if kill_at is not None and now >= kill_at:
            for rank in victims:
                os.kill(children[rank].pid, signal.SIGKILL)
            kill_at = None
        if now >= deadline:
            for child in waiting:
                if child.open:
                    child.open, child.outcome.hung = False, True
                    os.kill(child.pid, signal.SIGKILL)


def _take(child: _Child) -> bool:
    """Read what the child has sent; return whether it has come to its end, one way or the other."""
    data = os.read(child.reads, 1 << 16)
    *lines, child.buffered = (child.buffered + data).split(b"\n")
    for line in lines:
        if line == b"end":
            child.open = False
            return True
        kind, value = json.loads(line)
        if kind == "told":
            child.outcome.told.append(value)
        else:
            setattr(child.outcome, kind, value)
    if not data:
        child.open, child.outcome.killed = False, True
    return not data
