"""On which signals a run saves itself, and what it continues from: the project and the environment -> settings."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from ..core.addresses import shown
from ..core.errors import SettingError, WrongTypeError, explain
from . import origins
from .options.project import ProjectConfiguration

SIGNALS = tuple(name for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))
"""Those that may ask a run to save itself. SIGINT is the user's way to stop at once."""

SIGNALS_VARIABLE = "ACCELERATE_SAVE_ON_SIGNALS"
RESUME_VARIABLE = "ACCELERATE_RESUME"


def signals_from(project: ProjectConfiguration, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the signals on which the run saves itself.

    Raises:
        SettingError: (a `ValueError`) for an unknown signal, or without a folder and automatic naming to save into.
        WrongTypeError: (a `TypeError`) for something that names no signals.
    """
    given, origin = project.save_on_signals, "from ProjectConfiguration"
    if given is None:
        given, origin = environ.get(SIGNALS_VARIABLE) or (), origins.origin(environ, SIGNALS_VARIABLE)
    names = names_of(given, origin)
    if names and not (project.automatic_checkpoint_naming and project.project_dir):
        raise SettingError(
            explain(
                f"save_on_signals={','.join(names)} ({origin}) needs checkpoints that are named automatically, and "
                f"automatic_checkpoint_naming={project.automatic_checkpoint_naming}, project_dir={shown(repr(project.project_dir))}.",
                accepted="both set",
                remedy="Pass project_config=ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True).",
            )
        )
    return names


def names_of(given: Any, origin: str) -> tuple[str, ...]:
    """Return the full names of signals, each once; a text holds them separated by commas.

    Raises:
        SettingError: (a `ValueError`) for one that is unknown, or cannot be used for this.
        WrongTypeError: (a `TypeError`) for something else than texts.
    """
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise WrongTypeError(
            explain(
                f"save_on_signals={given!r:.80} has type {type(given).__name__} ({origin}).",
                accepted="names of signals",
                remedy='Pass save_on_signals=("SIGTERM", "SIGUSR1").',
            )
        )
    names = []
    for part in filter(None, (part.strip().upper() for part in parts)):
        name = part if part.startswith("SIG") else f"SIG{part}"
        if name not in SIGNALS:
            raise SettingError(
                explain(
                    f"save_on_signals names {part!r} ({origin}), on which a run cannot save itself.",
                    accepted=SIGNALS,
                    remedy="SIGTERM is what clusters send; SIGINT stops at once, as ever, and SIGKILL reaches no program.",
                )
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def resume_from(environ: Mapping[str, str]) -> str | None:
    """Return what ACCELERATE_RESUME asks to continue: `auto`, a folder, or `None` for nothing."""
    asked = environ.get(RESUME_VARIABLE, "")
    return None if asked in ("", "off") else asked
