"""Writing where commands are told to: at any instant the old text or the new one is there, whole.

Owns what is said when a file cannot be written. A command that is interrupted leaves nothing half written.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint import durable
from ..core.errors import CheckpointError, SettingError, explain
from ..settings.config_file import NO_HOME

ELSEWHERE = "Name a file elsewhere with --config_file, or set HF_HOME to a folder that this user may write to."


def check_writable(path: Path, *, remedy: str = ELSEWHERE) -> None:
    """Find out before any question is asked that a file could not be written later.

    Args:
        path: The file; neither it nor its folder need exist.
        remedy: What to do if it cannot be written.

    Raises:
        SettingError: (a `ValueError`) if it cannot.
    """
    if NO_HOME in path.parents or path.parts[:1] == ("~",):
        raise SettingError(
            explain(
                f"{path.name} cannot be written: there is no home folder (the variable HOME is not set, and the system knows "
                "none for this user).",
                remedy=remedy,
            )
        )
    try:
        if path.is_dir():
            raise _refused(path, "it is a folder", remedy)
        if path.exists() and not path.is_file():
            raise _refused(path, "it is not a plain file", remedy)
        parent = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise _refused(path, error.strerror or str(error), remedy) from error
    if not parent.is_dir():
        raise _refused(path, f"{parent} is not a folder", remedy)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(path, f"this user may not write to {parent}", remedy)


def save_text(path: Path, text: str, *, remedy: str = ELSEWHERE) -> None:
    """Write a file, making its folder; a file that is there is replaced as a whole.

    Args:
        path: Where to. A link is followed, and stays a link.
        text: The content.
        remedy: What to do if it cannot be written.

    Raises:
        SettingError: (a `ValueError`) if it cannot be written. What was there before is there still.
    """
    check_writable(path, remedy=remedy)

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")
        if target.exists():
            aside.chmod(target.stat().st_mode)  # who may read it stays as it was

    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_file(target, write)
    except OSError as error:
        raise _refused(path, error.strerror or str(error), remedy) from error
    except CheckpointError as error:
        raise _refused(path, str(error), remedy) from error


def _refused(path: Path, reason: str, remedy: str) -> SettingError:
    return SettingError(explain(f"{path} cannot be written: {reason}.", remedy=remedy))
