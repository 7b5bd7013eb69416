"""How a run ends that was asked to end, saved itself, and is to be started again."""

from __future__ import annotations

from pathlib import Path

from .addresses import shown

PREEMPTED_STATUS = 75
"""What a run ends with that saved itself on a signal: EX_TEMPFAIL of sysexits.h, "call me again".

No shell and no signal gives this number, so what started the run can tell "saved" from "ended" (143 for SIGTERM).
"""

NOTE_VARIABLE = "ACCELERATE_PREEMPTED_NOTE"
"""Names the file in which a worker tells our launcher that the run saved itself."""


class Preempted(SystemExit):
    """Leaves the script after a signal, when everything is saved; raised on all ranks at once.

    It is a `SystemExit`: left alone it ends the process with `code` and no traceback, and `finally` blocks run.
    """

    def __init__(self, folder: Path | str, reason: str, code: int = PREEMPTED_STATUS) -> None:
        super().__init__(code)
        self.folder = folder
        """The checkpoint to continue from."""
        self.reason = reason
        """Which rank received which signal."""

    def __str__(self) -> str:
        return describe(self.reason, self.folder)


def describe(reason: str, folder: Path | str) -> str:
    """Say it in one line."""
    return f"{reason}: the run saved itself in {shown(folder)} and ends; continue it with `accelerate launch --resume auto`"
