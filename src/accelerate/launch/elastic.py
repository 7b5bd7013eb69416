"""Run a script in several processes, on one machine or more.

Owns the use of torch's elastic agent, which starts the workers, watches them, restarts them when asked and ends the
others when one fails. Imports torch; only when such a run starts.
"""

from __future__ import annotations

import logging
import signal
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..core.errors import LaunchError, SettingError, explain
from ..settings import env
from .plan import LaunchPlan
from .report import Failure, WorkersFailed


def run(plan: LaunchPlan) -> None:
    """Run `plan` to its end. Blocks.

    Raises:
        WorkersFailed: If a worker ends badly; all others have been ended then.
        LaunchError: If the processes cannot meet.
    """
    start(plan, plan.argv[0], plan.argv[1:], launch_config(plan))


def start(plan: LaunchPlan, entry: str | Callable[..., Any], arguments: Sequence[Any], config: LaunchConfig) -> None:
    """Start `entry` in the processes of `plan` and wait for them."""
    hush()
    try:
        # Torch sets the second itself and would leave it behind.
        with env.applied({**plan.env, "TORCHELASTIC_SIGNALS_TO_HANDLE": config.signals_to_handle}):
            elastic_launch(config, entry)(*arguments)
    except ChildFailedError as error:
        raise WorkersFailed.among(_in_order(error), plan.processes_per_node * plan.nodes) from None
    except SignalException as error:
        message = f"accelerate: the launcher received {error.sigval.name} and ended the workers"
        raise WorkersFailed(message, 128 + error.sigval) from None
    except RendezvousError as error:
        raise LaunchError(
            explain(
                f"The processes could not meet at {plan.rendezvous.endpoint} ({plan.rendezvous.backend}): {error}.",
                remedy="Check that all machines run the same command and reach that address and port.",
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
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=plan.log_dir, tee=tee),
        log_line_prefix_template=log_line_prefix,
    )


def _in_order(error: ChildFailedError) -> list[Failure]:
    """Return the failures, the root cause first as far as it can be told.

    Being ended by the agent (SIGTERM), or losing the connection to another rank, is a consequence, never the cause.
    Beyond that the order is that in which workers noted their exceptions; one that noted none is stamped when the
    agent looked.
    """

    def key(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        lost_connection = any(sign in _traceback(failure) for sign in _LOST_CONNECTION)
        return (failure.exitcode == -signal.SIGTERM, lost_connection, _time(failure), rank)

    return [
        Failure(rank, failure.pid, failure.exitcode, _traceback(failure))
        for rank, failure in sorted(error.failures.items(), key=key)
    ]


# How gloo and nccl say that the rank at the other end is gone.
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def _time(failure: ProcessFailure) -> float:
    # The note's own stamp has whole seconds only; ranks often fail within one.
    try:
        return Path(failure.error_file).stat().st_mtime
    except OSError:
        return failure.timestamp


def _traceback(failure: ProcessFailure) -> str:
    """Return what the worker noted about its exception; scripts without torch's `record` note nothing."""
    message = failure.error_file_data.get("message")
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
