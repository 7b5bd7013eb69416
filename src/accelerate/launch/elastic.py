"""Run a script in several processes, on one machine or more.

Owns the use of torch's elastic agent, which starts the workers and restarts them when asked. How they are watched and
ended: `launch.watching`. Imports torch; only when such a run starts.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..core.errors import LaunchError, explain
from ..core.last_words import NOTE_FILE_VARIABLE
from ..core.leaving import NOTE_VARIABLE
from ..settings import env, variables
from . import agent, loopback, registry, rendezvous, signals, streams
from .failures import Account, accounts, judged, keep_tracebacks
from .family import Family
from .guard import guarded
from .inline import not_started
from .logs import NOTE_FILE, AdoptedLogs, Logs
from .machine import unusable_folder
from .plan import LaunchPlan
from .report import RunPreempted, WorkersFailed
from .watching import LEFT_GRACE_SECONDS, Run, watching

GRACE_SECONDS = 30
"""How long workers may take to end when the launcher is asked to."""
_SIGNALS_FIELD, _GRACE_FIELD = "signals_to_handle", "shutdown_timeout"
_GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Torch's variable for the grace, where no flag sets it."""


def run(plan: LaunchPlan) -> None:
    """Run `plan` to its end. Blocks. If it does not end well, nothing that it started is running afterwards.

    Raises:
        WorkersFailed: If a worker ends badly; all others have been ended then.
        LaunchError: If the processes cannot meet.
        SettingError: (a `ValueError`) if there is no place for logs.
    """
    if plan.log_dir is not None:
        try:
            Path(plan.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable_folder(plan.described_log_dir, error.strerror or str(error)) from None
    start(plan, plan.argv[0], plan.argv[1:], launch_config(plan))


def start(
    plan: LaunchPlan,
    entry: str | Callable[..., Any],
    arguments: Sequence[Any],
    config: LaunchConfig,
    folder: Path | None = None,
) -> None:
    """Start `entry` in the processes of `plan` and wait for them.

    Args:
        plan: What is run.
        entry: A program, or a function.
        arguments: What it is given.
        config: What `launch_config` has made of the plan.
        folder: Where notes of this run go, a folder of the caller's, for this run alone. If this process is killed, it is
            removed for the caller. Without one, one is made and removed.

    Raises:
        RunPreempted: If the run saved itself on a signal; its workers have ended with status 0 then.
        WorkersFailed: If a worker failed, or a signal ended the run.
        LaunchError: If the processes cannot meet.
    """
    hush()
    with _notes() if folder is None else nullcontext(folder) as name:
        note = Path(name) / NOTE_FILE
        _start(plan, entry, arguments, config, note)
        if note.exists():
            raise RunPreempted(note.read_text(encoding="utf-8"))


def _notes() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="accelerate-launch-", ignore_cleanup_errors=True)


def _start(
    plan: LaunchPlan, entry: str | Callable[..., Any], arguments: Sequence[Any], config: LaunchConfig, note: Path
) -> None:
    environ = {
        **plan.env,
        # Newer torch sets this itself, and would leave it behind.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": getattr(config, _SIGNALS_FIELD, None) or signals.heard(),
        NOTE_FILE_VARIABLE: None,  # that of a launcher further up
    }
    with _watched(plan, config, note.parent) as watched:
        try:
            with env.applied(environ), signals.passing_on_to_children():
                elastic_launch(config, entry)(*arguments)
            watched.ended_well = True
        except OSError as error:
            if isinstance(entry, str) and error.filename == entry:
                raise not_started(plan, error) from error
            raise
        except ChildFailedError:
            watched.logs.finish()
            raise judged(watched) from None
        except SignalException as error:
            watched.logs.finish()
            if note.exists():  # the workers ended as they should; that is what the signal was for
                return
            where = _interrupted(watched)
            said = f"{where}accelerate: the launcher received {error.sigval.name} and ended the workers"
            raise WorkersFailed(said, 128 + error.sigval, where.rstrip()) from None
        except (RendezvousError, DistError) as error:
            watched.logs.finish()
            if watched.pids:
                raise _lost(watched, error) from None
            raise LaunchError(
                explain(
                    f"The processes could not meet at {plan.rendezvous.endpoint} ({plan.rendezvous.backend}): {error}",
                    remedy="Check that no other program listens there, and that all machines run the same command and "
                    "reach that address and port.",
                )
            ) from error


@contextmanager
def _watched(plan: LaunchPlan, config: LaunchConfig, folder: Path) -> Iterator[Run]:
    """Watch over what is started in this block: if it does not end well, nothing of it is left afterwards.

    What a script that ended well left running, as a last upload, goes on, as after `python script.py`.
    """
    given = config.logs_specs
    assert given is not None  # torch has a default
    logs = (given if isinstance(given, Logs) else AdoptedLogs(given)).placed(folder)
    config.logs_specs = logs
    family = Family(f"{NOTE_VARIABLE}={folder}")
    environ = env.read()
    environ.pop(NOTE_VARIABLE, None)
    with guarded(family, folder, environ) as guard:
        grace, meeting = _grace_seconds(plan), plan.rendezvous.endpoint
        found = Run(logs, family, guard, grace_seconds=grace, meeting=meeting, quiet=plan.quiet)
        try:
            with watching(found):
                yield found
        finally:
            with signals.second_one(lambda: None, found.asked):  # nothing stops this any more; it takes seconds at most
                if not found.ended_well:
                    family.end(LEFT_GRACE_SECONDS)
                logs.finish()


def _lost(watched: Run, error: Exception) -> WorkersFailed:
    """Say that workers were running, and the machines could not go on together."""
    why = str(error).partition("\n")[0]
    said = f"accelerate: the machines have lost each other at {watched.meeting}, and the workers here were ended: {why}"
    if not any(account.has_failed for account in accounts(watched)):
        return WorkersFailed(said, 1)
    failed = judged(watched)
    return WorkersFailed(f"{said}\n{failed}", failed.status, failed.traceback)


def _interrupted(watched: Run) -> str:
    """Show where one rank was when it was interrupted: all say much the same."""
    found: list[Account] = accounts(watched)
    keep_tracebacks(found)
    noted = min((account for account in found if account.exception), key=lambda account: account.rank, default=None)
    if noted is None:
        return ""
    return "".join(f"[rank {noted.rank}] {line}\n" for line in noted.exception.rstrip().splitlines())


def launch_config(
    plan: LaunchPlan, *, run_id: str = "none", start_method: str = "spawn", log_line_prefix: str | None = None
) -> LaunchConfig:
    """Translate a plan into torch's typed configuration.

    Args:
        plan: What is to be run.
        run_id: A name that all machines of a run share; torchrun's is `"none"`.
        start_method: How workers that run a function are made; a script always gets a new interpreter.
        log_line_prefix: What stands before each line of a worker that is copied to the terminal.

    Raises:
        SettingError: (a `ValueError`) for an option that the installed torch, or a class of logs, does not take; and for
            a variable of torch that cannot be read.
    """
    meeting = plan.rendezvous
    options: dict[str, Any] = dict(meeting.options)
    # 2.9 does not know the first of these, and reads the variable.
    named = {_SIGNALS_FIELD: signals.heard(), _GRACE_FIELD: _grace_seconds(plan)}
    named = {name: value for name, value in named.items() if hasattr(LaunchConfig, name)}
    backend = meeting.backend
    if backend == "loopback":
        backend = loopback.BACKEND
    elif backend not in rendezvous.OWN_FORMS:
        _check_offered(backend)
    else:
        rendezvous.register()
        backend = rendezvous.OWN_FORMS[backend]
        options["described"] = meeting.described
        options.setdefault("timeout", rendezvous.JOIN_SECONDS)  # torch would set 900
        if meeting.is_numbered:
            options["machine"] = plan.node_rank
        if meeting.processes is not None:
            options["processes"] = meeting.processes
    return LaunchConfig(
        min_nodes=plan.min_nodes or plan.nodes,
        max_nodes=plan.nodes,
        nproc_per_node=plan.processes_per_node,
        # Machines that shall meet must name the same run; a single machine must meet nobody else.
        run_id=plan.run_id or (run_id if plan.nodes > 1 else str(uuid.uuid4())),
        role=plan.role,
        rdzv_backend=backend,
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs=options,
        local_addr=meeting.local_address,
        max_restarts=plan.max_restarts,
        monitor_interval=plan.monitor_interval,
        logs_specs=_logs(plan, log_line_prefix),
        start_method=start_method,
        **{**named, **agent.config_fields(plan)},
    )


def _grace_seconds(plan: LaunchPlan) -> int:
    if plan.grace_seconds is not None:
        return plan.grace_seconds
    text = env.get(_GRACE_VARIABLE) or str(GRACE_SECONDS)
    if not text.isdecimal():
        raise variables.unreadable(_GRACE_VARIABLE, text, "a number of seconds")
    return int(text)


def _check_offered(backend: str) -> None:
    """Refuse a way to meet that torch does not know; a notebook may have registered one of its own."""
    offered = getattr(rendezvous_handler_registry, "_registry", {})
    if backend in registry.ETCD or backend not in offered:
        registry.check_backend(backend, "the argument rdzv_backend")  # a flag was checked before


def _logs(plan: LaunchPlan, prefix: str | None) -> LogsSpecs:
    asked = plan.agent
    redirects, tee = _streams(asked.get("redirects") or "0"), _streams(plan.tee)
    shown = {int(rank) for rank in _words(asked.get("local_ranks_filter"))}
    if "logs_specs" in asked:
        return agent.logs(
            asked["logs_specs"],
            log_dir=plan.log_dir,
            redirects=redirects,
            tee=tee,
            local_ranks_filter=shown or None,
        )
    return Logs(
        log_dir=plan.log_dir,
        described=plan.described_log_dir,
        redirects=redirects,
        tee=tee,
        shown=shown,
        prefix=prefix or env.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        role=plan.role,
        filters={name: _words(asked.get(f"duplicate_{name}_filters")) for name in streams.NUMBERS},
    )


def _words(text: str | None) -> list[str]:
    return [word for word in (text or "").split(",") if word]


def _streams(text: str) -> Std | dict[int, Std]:
    choice = streams.read(text)
    if isinstance(choice, dict):
        return {rank: Std(number) for rank, number in choice.items()}
    return Std(choice)


def hush() -> None:
    """Silence torch's own lines about workers that end: our report says what happened, once.

    A level that the user has set stays.
    """
    if logging.getLogger("torch.distributed.elastic").level == logging.NOTSET:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Torch gives this one a level of its own while importing, from LOGLEVEL if that is set.
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    if agent.level == logging.WARNING and env.get("LOGLEVEL") is None:
        agent.setLevel(logging.CRITICAL)
