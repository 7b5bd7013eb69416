"""Torch's elastic agent, with a second look at the workers.

Owns when a failed run is ended and how: who is waited for, who gets which signal, and that nothing is left. Torch's
agent starts the workers, restarts them and meets the other machines, as ever.

[Note: causes and consequences] When a rank falls, the others soon fall too, because they lose their connection to it.
The first one that the agent sees end is often one of these: the rank that raised an exception may have let go of its
connections, and still be on its way out. Were it ended then, its traceback would be lost and another rank be blamed.
So as long as all ranks that have ended only lost a connection, the others get a moment to say why.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.launcher import api

from .failures import Endings, accounts, judged
from .family import Family, send
from .guard import Guard
from .logs import Logs
from .report import Failure
from .signals import Asked, second_one
from .tidings import Tidings, answers

CAUSE_PATIENCE_SECONDS = 2.0
"""How long ranks may take to say what made others lose their connection."""
NAMED_PATIENCE_SECONDS = 20.0
"""The same for a rank that others have named: its exception may wait for DataLoader workers, as torch does, 10 s for each."""
FAILURE_GRACE_SECONDS = 2.0
"""How long the ranks of a failed run may take to end. They wait for one that is gone: there is nothing to save."""
NEWS_SECONDS = 1.0
"""How often a machine whose ranks run asks whether one has failed elsewhere."""
HEARING_SECONDS = 2.5
"""How long a machine that knows the cause waits for the others to hear of it."""
REACH_SECONDS = 3.0
"""How long the place where the machines meet may be out of reach before workers are started again."""
LEFT_GRACE_SECONDS = 1.0
"""How long processes may take to end that the workers left running."""

KILL_SECONDS = 5.0
"""How long SIGKILL may take; a process that waits inside the kernel is then left to it."""
CAN_LOOK = hasattr(os, "waitid")
"""Whether the system tells how a child has ended without letting it go. Elsewhere torch's agent decides alone."""


class Run:
    """What is shared by the agent of a run and those who report on it.

    Args:
        logs: Where the workers print and leave notes.
        family: The processes of the run.
        guard: What ends them if this process cannot.
        grace_seconds: How long workers may take to end.
        meeting: The address where the machines meet.
        quiet: Whether of a failure its traceback alone is shown.
    """

    def __init__(
        self, logs: Logs, family: Family, guard: Guard, *, grace_seconds: float, meeting: str, quiet: bool
    ) -> None:
        self.logs, self.family, self.guard = logs, family, guard
        self.grace_seconds, self.meeting, self.quiet = grace_seconds, meeting, quiet
        self.endings = Endings()
        self.elsewhere: Failure | None = None
        """The failure that another machine has told of."""
        self.is_cut_off = False
        """Whether the machine where the others meet had gone when ranks failed here."""
        self.ended_well = False
        self.asked = Asked()
        self.ranks: dict[int, int] = {}
        """Local rank -> rank."""
        self.pids: dict[int, int] = {}
        """Local rank -> process id; empty before workers were started."""
        self.world_size = 0


_Agent: Any = LocalElasticAgent  # its decorators hide from type checkers what its methods take and return


class WatchingAgent(_Agent):
    """Torch's agent, ending failed runs as [Note: causes and consequences] has it."""

    run_: Run

    def _initialize_workers(self, worker_group: Any) -> None:
        # While the attempt before was ended, a signal only made that shorter.
        if self.run_.asked.first is not None:
            first = signal.Signals(self.run_.asked.first)
            raise SignalException(f"The launcher received {first.name}", first)
        super()._initialize_workers(worker_group)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        run = self.run_
        run.family.end(LEFT_GRACE_SECONDS)  # of the attempt before
        run.endings, run.elsewhere = Endings(), None
        others, is_first = worker_group.group_world_size - 1, worker_group.group_rank == 0
        self._tidings = Tidings(worker_group.store, others, is_first=is_first)
        self._next_news = 0.0
        self._is_counted = False
        self._undecided_since: float | None = None
        self._good_end: RunResult | None = None
        pids = super()._start_workers(worker_group)
        run.asked.keep_echoes_away()  # torch has just set its handlers
        run.ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        run.pids, run.world_size = pids, worker_group.workers[0].world_size
        run.family.add(pids.values())
        run.guard.tell(run.family)
        return pids

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = self._good_end or self._looked(worker_group)
        if not result.is_failed() and self._has_news() and self._heard():
            result = self._failed_elsewhere(worker_group)
        if result.is_failed():
            self._is_counted = True
            for failure in result.failures.values():  # what torch alone has seen, as of functions
                self.run_.endings.codes.setdefault(failure.local_rank, failure.exitcode)
            seconds = REACH_SECONDS if self._remaining_restarts else 0  # a moment's trouble must not cost the run
            self.run_.is_cut_off = not answers(self._store, seconds)
            if self.run_.is_cut_off:
                self._remaining_restarts = 0  # there is no place left to meet again
        elif result.state == WorkerState.SUCCEEDED and not self._tidings.is_over():
            self._good_end = result
            return RunResult(state=WorkerState.HEALTHY)  # torch comes back soon, and hears signals in the meantime
        return result

    def _has_news(self) -> bool:
        """Tell whether to ask for news of other machines: often at the end, now and then while the ranks run."""
        now = time.monotonic()
        if self._good_end is None and now < self._next_news:
            return False
        self._next_news = now + NEWS_SECONDS
        return True

    def _failed_elsewhere(self, worker_group: Any) -> RunResult:
        """End the ranks here, since one on another machine has failed."""
        if self._good_end is None:
            self._end_attempt()
            result = super()._monitor_workers(worker_group)  # collects them
            if result.is_failed():
                return result
        for local_rank in self.run_.ranks:  # those that torch alone has seen
            self.run_.endings.codes.setdefault(local_rank, 0)
        pids = self.run_.pids
        made = {rank: ProcessFailure(local, pids[local], 1, os.devnull) for local, rank in self.run_.ranks.items()}
        return RunResult(state=WorkerState.FAILED, failures=made)

    def _looked(self, worker_group: Any) -> RunResult:
        pids = self._pcontext.pids() if self._pcontext is not None else {}
        if not CAN_LOOK or not pids:
            return super()._monitor_workers(worker_group)
        if self._look(pids):
            if self._may_learn_more():
                return RunResult(state=WorkerState.HEALTHY)
            self._end_attempt()
        elif self._lingers():
            self._end_attempt()
        elif isinstance(worker_group.spec.entrypoint, str) and len(self.run_.endings.codes) < len(pids):
            # Torch's own look would collect, and judge, one that fails right now. Functions report their end to it.
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)

    def _look(self, pids: dict[int, int]) -> bool:
        """Note which workers have ended; tell whether one has failed."""
        endings = self.run_.endings
        for local_rank, pid in pids.items():
            if local_rank not in endings.codes and (code := exit_code(pid)) is not None:
                endings.codes[local_rank] = code
                endings.times[local_rank] = time.time()
        return any(endings.codes.values())

    def _may_learn_more(self) -> bool:
        """Tell whether to wait for a rank that knows why the others have failed."""
        endings, found = self.run_.endings, accounts(self.run_)
        if any(account.is_cause for account in found) or self._heard():
            return False
        if len(endings.codes) == len(self.run_.ranks) and self._worker_group.group_world_size == 1:
            return False
        self._undecided_since = self._undecided_since or time.monotonic()
        named = {rank for account in found for rank in account.arose_on}
        gone = {account.rank for account in found if account.code is not None}
        may_speak = named - gone  # also on another machine, which tells
        seconds = NAMED_PATIENCE_SECONDS if may_speak else CAUSE_PATIENCE_SECONDS
        return time.monotonic() - self._undecided_since < seconds

    def _lingers(self) -> bool:
        """Tell whether a rank has noted an exception long ago and does not end: its exit handlers wait for somebody."""
        notes = [own.folder / "error.json" for own in self.run_.logs.streams.values()]
        written = [note.stat().st_mtime for note in notes if note.exists()]
        return bool(written) and time.time() - min(written) > self.run_.grace_seconds

    def _asks_groups(self) -> bool:
        """Tell whether what the workers have started is asked to end along with them.

        DataLoader workers, which SIGTERM ends, have a batch to bring to a rank that is to save itself. A program that is
        not Python may be a shell, which passes nothing on.
        """
        program = self._worker_group.spec.entrypoint
        is_other = isinstance(program, str) and program != sys.executable
        return is_other or any(self.run_.endings.codes.values())

    def _end_attempt(self) -> None:
        """End the ranks of a failed attempt; tell the other machines who failed first here, if no other one has told.

        Ranks that only lost a connection may be all there is: machines that have ended well must hear of that, too.
        """
        first = next((account for account in accounts(self.run_) if account.has_failed), None)
        if first is not None:
            self._tidings.tell(first.failure())
        self._end_workers(signal.SIGTERM, FAILURE_GRACE_SECONDS)
        if first is not None and not self._remaining_restarts:
            self._tidings.wait_until_heard(HEARING_SECONDS)

    def _heard(self) -> bool:
        """Tell whether another machine has said who failed there."""
        self.run_.elsewhere = self._tidings.heard()
        return self.run_.elsewhere is not None

    def _restart_workers(self, worker_group: Any) -> None:
        run, spec = self.run_, worker_group.spec
        if self._heard() and not self._is_counted:  # others meet again already; machines count failures alike
            self._remaining_restarts = max(0, self._remaining_restarts - 1)
        if run.elsewhere is not None or any(account.has_failed for account in accounts(run)):
            run.logs.finish()
            said = judged(run, another_follows=True).shown(quiet=run.quiet)
            attempt = spec.max_restarts - self._remaining_restarts + 1
            is_silent = run.quiet or run.asked.first is not None
            again = "" if is_silent else f"accelerate: starting again: attempt {attempt} of {spec.max_restarts + 1}"
            with suppress(OSError):  # whoever read this may have gone; the run goes on
                sys.stderr.write("".join(f"{text}\n" for text in (said, again) if text))
                sys.stderr.flush()
        super()._restart_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Wait for nobody: `_monitor_workers` has. See [Note: the end of a run] in `launch.tidings`."""

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **options: Any) -> None:
        failed = any(self.run_.endings.codes.values())
        self._end_workers(death_sig, FAILURE_GRACE_SECONDS if failed else self.run_.grace_seconds)
        super()._shutdown(death_sig, *args, **options)  # collects them

    def _end_workers(self, number: signal.Signals, seconds: float) -> None:
        """Ask the workers to end, and end those that have not after so many seconds. A second signal ends them now."""
        pids = self._pcontext.pids() if self._pcontext is not None and CAN_LOOK else {}
        self._look(pids)
        running = {local_rank: pid for local_rank, pid in pids.items() if local_rank not in self.run_.endings.codes}
        if not running:
            return
        self.run_.endings.ended_by_us |= running.keys()
        deadline = time.monotonic() + seconds
        with second_one(lambda: send(running.values(), signal.SIGKILL), self.run_.asked):
            send(running.values(), number, groups=self._asks_groups())
            while (left := _running(running.values())) and time.monotonic() < deadline:
                time.sleep(0.02)
            send(left, signal.SIGKILL)
            while _running(left) and time.monotonic() < deadline + KILL_SECONDS:
                time.sleep(0.02)
        self._look(pids)


def _running(pids: Any) -> list[int]:
    return [pid for pid in pids if exit_code(pid) is None]


def exit_code(pid: int) -> int | None:
    """Return how a child has ended, as Python gives it, and leave it to be collected; `None` while it runs."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody has collected it: torch does, when it ended well
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


@contextmanager
def watching(run: Run) -> Iterator[None]:
    """Have torch's `elastic_launch` use our agent within the block.

    It has no argument for it; it looks the name up in its module.
    """

    class Agent(WatchingAgent):
        run_ = run

    place: Any = api
    before = place.LocalElasticAgent
    place.LocalElasticAgent = Agent
    try:
        yield
    finally:
        place.LocalElasticAgent = before
