"""Run a script in several processes, on one machine or more.

Owns the use of torch's elastic agent, which starts the workers, watches them, restarts them when asked and ends the
others when one fails. Imports torch; only when such a run starts.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistNetworkError  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..core.errors import LaunchError, SettingError, explain
from ..core.leaving import NOTE_VARIABLE
from ..settings import env
from .plan import LaunchPlan
from .report import Failure, RunPreempted, WorkersFailed
from .signals import passing_on_to_children


def run(plan: LaunchPlan) -> None:
    """Run `plan` to its end. Blocks.

    Raises:
        WorkersFailed: If a worker ends badly; all others have been ended then.
        LaunchError: If the processes cannot meet.
    """
    start(plan, plan.argv[0], plan.argv[1:], launch_config(plan))


def start(plan: LaunchPlan, entry: str | Callable[..., Any], arguments: Sequence[Any], config: LaunchConfig) -> None:
    """Start `entry` in the processes of `plan` and wait for them.

    Raises:
        RunPreempted: If the run saved itself on a signal; its workers have ended with status 0 then.
    """
    hush()
    with tempfile.TemporaryDirectory(prefix="accelerate-launch-") as folder:
        note = Path(folder) / "preempted"
        _start(plan, entry, arguments, config, note)
        if note.exists():
            raise RunPreempted(note.read_text(encoding="utf-8"))


def _start(
    plan: LaunchPlan, entry: str | Callable[..., Any], arguments: Sequence[Any], config: LaunchConfig, note: Path
) -> None:
    try:
        # Newer torch sets the second itself and would leave it behind; 2.9 does not know the field.
        signals = getattr(config, "signals_to_handle", None)
        variables = {**plan.env, "TORCHELASTIC_SIGNALS_TO_HANDLE": signals, NOTE_VARIABLE: str(note)}
        with env.applied(variables), passing_on_to_children():
            elastic_launch(config, entry)(*arguments)
    except ChildFailedError as error:
        raise WorkersFailed.among(_in_order(error), plan.processes_per_node * plan.nodes) from None
    except SignalException as error:
        if note.exists():  # the workers ended as they should; that is what the signal was for
            return
        message = f"accelerate: the launcher received {error.sigval.name} and ended the workers"
        raise WorkersFailed(message, 128 + error.sigval) from None
    except (RendezvousError, DistNetworkError) as error:
        raise LaunchError(
            explain(
                f"The processes could not meet at {plan.rendezvous.endpoint} ({plan.rendezvous.backend}): {error}",
                remedy="Check that no other program listens there, and that all machines run the same command and "
                "reach that address and port.",
            )
        ) from error


def launch_config(
    plan: LaunchPlan, *, run_id: str = "none", start_method: str = "spawn", log_line_prefix: str | None = None
) -> LaunchConfig:
    """Translate a plan into torch's typed configuration.

    Args:
        plan: What is to be run.
        run_id: A name that all machines of a run share; torchrun's is `"none"`.
        start_method: How workers that run a function are made; a script always gets a new interpreter.
        log_line_prefix: What stands before each line of a worker that is copied to the terminal.
    """
    meeting = plan.rendezvous
    options: dict[str, Any] = dict(meeting.options)
    if meeting.backend == "static":
        options["rank"] = plan.node_rank
    try:
        tee = Std.from_str(plan.tee)
    except ValueError as error:
        raise SettingError(
            explain(
                f"tee={plan.tee!r} is not known (from --tee).",
                accepted=str(error),
                remedy="Pass --tee 3 for both streams.",
            )
        ) from error
    return LaunchConfig(
        min_nodes=plan.nodes,
        max_nodes=plan.nodes,
        nproc_per_node=plan.processes_per_node,
        # Machines that shall meet must name the same run; a single machine must meet nobody else.
        run_id=run_id if plan.nodes > 1 else str(uuid.uuid4()),
        role=plan.role,
        rdzv_backend=meeting.backend,
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs=options,
        local_addr=meeting.local_address,
        max_restarts=plan.max_restarts,
        monitor_interval=plan.monitor_interval,
        **_grace(plan),
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=plan.log_dir, tee=tee),
        log_line_prefix_template=log_line_prefix,
    )


def _grace(plan: LaunchPlan) -> dict[str, Any]:
    if plan.grace_seconds is None:
        return {}
    if "shutdown_timeout" not in {field.name for field in fields(LaunchConfig)}:
        raise SettingError(
            explain(
                f"grace_seconds={plan.grace_seconds} (from --grace_seconds) cannot be kept by torch {torch.__version__}, "
                "which ends workers after 30 seconds.",
                remedy="Leave the flag out, or update torch.",
            )
        )
    return {"shutdown_timeout": plan.grace_seconds}


@dataclass(frozen=True)
class _Observed:
    """One failure, and what tells causes from consequences."""

    failure: Failure
    time: float

    def key(self) -> tuple[bool, bool, float, int]:
        """Sort the root cause first, as far as it can be told.

        Being ended by the agent (SIGTERM), or losing the connection to another rank, is a consequence, never the
        cause. Beyond that the order is that in which workers noted their exceptions; one that noted none is stamped
        when the agent looked.
        """
        text = self.failure.traceback
        ended = self.failure.exitcode == -signal.SIGTERM
        return (ended, any(sign in text for sign in _LOST_CONNECTION), self.time, self.failure.rank)


# How gloo and nccl say that the rank at the other end is gone.
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def _in_order(error: ChildFailedError) -> list[Failure]:
    """Return the failures, the root cause first as far as it can be told."""
    found = {rank: _observed(rank, failure) for rank, failure in error.failures.items()}
    for rank, failure in error.failures.items():
        # A rank that noted an exception may still be on its way out when the agent sees another one fall, and ends it.
        for noted in _noted_beside(rank, failure):
            if noted.failure.rank not in found:
                found[noted.failure.rank] = noted
    return [item.failure for item in sorted(found.values(), key=_Observed.key)]


def _observed(rank: int, failure: ProcessFailure) -> _Observed:
    text = _traceback(failure.error_file_data)
    try:
        # The note's own stamp has whole seconds only; ranks often fail within one.
        time = Path(failure.error_file).stat().st_mtime
    except OSError:
        time = failure.timestamp
    # A rank that was ended while it left because of its own exception has failed by that exception.
    exitcode = 1 if text and failure.exitcode == -signal.SIGTERM else failure.exitcode
    return _Observed(Failure(rank, failure.pid, exitcode, text), time)


def _noted_beside(rank: int, failure: ProcessFailure) -> Iterator[_Observed]:
    """Yield what the other ranks of this machine and attempt noted: their files lie in folders beside its own."""
    own = Path(failure.error_file)
    if not own.is_file():
        return
    for file in own.parent.parent.glob(f"*/{own.name}"):
        if not file.parent.name.isdecimal():
            continue
        try:
            text, time = _traceback(json.loads(file.read_bytes())), file.stat().st_mtime
        except (OSError, ValueError):
            continue  # its writer was ended in the middle
        if text:
            other = rank - failure.local_rank + int(file.parent.name)
            yield _Observed(Failure(other, None, 1, text), time)


def _traceback(note: Any) -> str:
    """Return what a worker noted about its exception; scripts without torch's `record` note nothing."""
    message = note.get("message") if isinstance(note, dict) else None
    if not isinstance(message, dict):
        return ""
    return str(message.get("extraInfo", {}).get("py_callstack", message.get("message", "")))


def hush() -> None:
    """Silence torch's own lines about workers that end: our report says what happened, once.

    A level that the user has set stays.
    """
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Torch gives this one a level of its own while importing, from LOGLEVEL if that is set.
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    if agent.level == logging.WARNING and env.get("LOGLEVEL") is None:
        agent.setLevel(logging.CRITICAL)
