"""Save everything and leave, where a signal asks for it; and continue as the launch asks.

Owns the order of both. When and where a run stops is up to `runtime.preemption` and `data.borders`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..checkpoint import layout
from ..core.addresses import shown
from ..core.errors import CheckpointError, SettingError, explain
from ..core.leaving import NOTE_VARIABLE, Preempted, describe
from ..data.borders import forget_evaluations, is_inside_a_step
from ..runtime import preemption, resuming
from ..settings import env
from ..settings.options.project import ProjectConfiguration
from . import numbered
from .session import Session


def watch_signals(session: Session, save: Callable[[], Path | str]) -> None:
    """Let the signals of the settings save the run. Called on all ranks, when it is set up.

    Raises:
        SettingError: (a `ValueError`) if a handler cannot be set here.
    """
    settings, runtime = session.plan.settings, session.plan.runtime
    resuming.expect(settings.resume)
    note = env.get(NOTE_VARIABLE)
    if note is not None and runtime.process.local_rank == 0:
        # Of an attempt that the launcher has restarted, since a process failed while it left. This one may finish.
        Path(note).unlink(missing_ok=True)
    if settings.save_on_signals:
        trains: Callable[[], bool] = partial(_trains, session)
        preemption.start(settings.save_on_signals, runtime, partial(_leave, session, save), trains)


def _trains(session: Session) -> bool:
    return bool(session.optimizers)


def _leave(session: Session, save: Callable[[], Path | str], reason: str) -> NoReturn:
    """Save and leave the script. Called on all ranks at the same place; collective."""
    watch = preemption.current
    if watch is not None and session.optimizers:
        forget_evaluations(session.dataloaders, watch)
    project, runtime = session.plan.settings.project, session.plan.runtime
    with suppress(CheckpointError):  # it was logged, and what follows takes the place of that save
        session.saving.background.wait()
    # What an earlier run left in the folder must not have this save refused, which cannot be repeated.
    newest = numbered.newest(project, runtime)
    if newest is not None:
        project.iteration = max(project.iteration, newest + 1)
    folder = save()
    process = runtime.process
    note = env.get(NOTE_VARIABLE)
    if (
        note is not None and Path(note).parent.is_dir()
    ):  # it is not where SLURM has taken the variable to another machine
        if process.local_rank == 0:
            # Under another name until it is whole: our launcher may look at any time.
            written = Path(f"{note}.tmp")
            written.write_text(describe(reason, folder), encoding="utf-8")
            written.rename(note)
        # Torch's agent would take any other status for a failure, end the other ranks and start all anew.
        raise Preempted(folder, reason, code=0)
    if process.rank == 0:
        print(f"accelerate: {describe(reason, folder)}", file=sys.stderr, flush=True)
    raise Preempted(folder, reason)


def check() -> None:
    """Let the run stop where the script asks for it, unless it would leave out a batch. Called on all ranks."""
    watch = preemption.current
    if watch is not None and not is_inside_a_step(watch):
        watch.reach()


def resume(session: Session, asked: str | Path | None, load: Callable[[str | None], None]) -> Path | str | None:
    """Load what the launch, or the script, asks to continue. Called on all ranks; collective.

    Args:
        session: Of the run.
        asked: `auto`, `off` or a folder; `None` means what the launch said.
        load: Loads a checkpoint, or the newest one.

    Returns:
        The folder or address; `None` if the run starts from the beginning.

    Raises:
        SettingError: (a `ValueError`) if `auto` has no folder to look in; or if nothing is to be loaded, and the folder
            of the first checkpoint exists already.
        CheckpointError: If there are checkpoints and none is complete.
    """
    settings, runtime = session.plan.settings, session.plan.runtime
    if asked is None:
        asked = resuming.pending
        if asked is None:  # nothing was asked for, or it is done already
            if session.loaded_from is None and settings.resume is None:
                _refuse_full_folder(session)
            return session.loaded_from
    if str(asked) == "off":
        resuming.fulfil()
        _refuse_full_folder(session)
        return None
    if str(asked) == "auto":
        _check_named(settings.project)
        if numbered.newest(settings.project, runtime) is None:
            resuming.fulfil()
            if runtime.process.rank == 0:
                print(
                    f"accelerate: {shown(numbered.place(settings.project))} holds no checkpoint at all: the run starts from "
                    "the beginning.",
                    file=sys.stderr,
                    flush=True,
                )
            return None
    if str(asked) == "auto":
        load(None)  # which says what it takes
    else:
        load(str(asked))
        tell_loaded(session)
    return session.loaded_from


def tell_loaded(session: Session) -> None:
    """Print, on one process, which checkpoint the run goes on from."""
    if session.plan.runtime.process.rank == 0 and session.loaded_from is not None:
        print(f"accelerate: the run continues from {shown(session.loaded_from)}", file=sys.stderr, flush=True)


def _check_named(project: ProjectConfiguration) -> None:
    if not (project.automatic_checkpoint_naming and project.project_dir):
        raise SettingError(
            explain(
                "The run is asked to continue from its newest checkpoint (resume auto), and has no folder of checkpoints: "
                f"automatic_checkpoint_naming={project.automatic_checkpoint_naming}, project_dir={shown(repr(project.project_dir))}.",
                accepted="both set, or the folder of a checkpoint in place of auto",
                remedy="Pass project_config=ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True).",
            )
        )


def _refuse_full_folder(session: Session) -> None:
    """Refuse a run from the beginning whose first save would be refused. Collective with automatic naming."""
    project, runtime = session.plan.settings.project, session.plan.runtime
    if not (project.automatic_checkpoint_naming and project.project_dir):
        return
    if numbered.exists(project, runtime):
        first = f"{shown(numbered.place(project))}/{layout.checkpoint_name(project.iteration)}"
        raise SettingError(
            explain(
                f"The run starts from the beginning, and the folder of its first checkpoint exists already: {first}.",
                accepted="a project_dir without checkpoints, or a run that continues",
                remedy="Launch with --resume auto to continue, or name another project_dir, or remove the folder.",
            )
        )
