"""What the launch said about continuing, and whether the script has done so.

Owns the rule that a run which was asked to continue never begins from scratch because its script forgot to load.
"""

from __future__ import annotations

from ..core.errors import SettingError, explain

pending: str | None = None
"""What the launch asked for (`auto`, or a folder), until the script has loaded, or was told that there is nothing."""

_heard = False


def expect(asked: str | None) -> None:
    """Note what the launch asked for, once for a process; `None` for nothing."""
    global pending, _heard
    if not _heard:
        pending, _heard = asked, True


def fulfil() -> None:
    """Note that the script has loaded a checkpoint, or that there is none."""
    global pending
    pending = None


def forget() -> None:
    """Listen to the launch again, for another run in this process."""
    global pending, _heard
    pending, _heard = None, False


def check(action: str) -> None:
    """Refuse to begin while a checkpoint is still to be loaded.

    Raises:
        SettingError: (a `ValueError`) naming what the script did, and what to do before.
    """
    if pending is not None:
        raise SettingError(
            explain(
                f"{action}, and the run was launched to continue (--resume {pending}, or ACCELERATE_RESUME): the script has "
                "loaded no checkpoint, and would begin from scratch.",
                accepted="a script that calls accelerator.resume() or load_state() first",
                remedy="Call accelerator.resume() after prepare() and register_for_checkpointing(), and before the first "
                "batch; or launch with --resume off.",
            )
        )
