"""Run a script in one process.

Owns the hand-over: the interpreter takes the place of the launcher, so that arguments, tracebacks, signals and the
exit status are those of `python script.py`.
"""

from __future__ import annotations

import os
import subprocess
from typing import NoReturn

from ..core.errors import LaunchError, explain
from ..settings import env
from .plan import LaunchPlan
from .report import WorkersFailed


def become(plan: LaunchPlan) -> NoReturn:
    """Replace this process by the script. Does not return."""
    try:
        os.execvpe(plan.argv[0], plan.argv, {**env.read(), **plan.env})
    except OSError as error:
        raise _not_started(plan, error) from error


def run(plan: LaunchPlan) -> None:
    """Run the script in a child process and wait; for callers that have work to do afterwards.

    Raises:
        WorkersFailed: If the script ends with a status other than 0.
    """
    try:
        status = subprocess.call(plan.argv, env={**env.read(), **plan.env})
    except OSError as error:
        raise _not_started(plan, error) from error
    if status:
        raise WorkersFailed.alone(plan.argv, status)


def _not_started(plan: LaunchPlan, error: OSError) -> LaunchError:
    return LaunchError(
        explain(
            f"{plan.argv[0]!r} cannot be run: {error.strerror}.",
            accepted="a program on the PATH, or the path of one",
            remedy="Check the name after --no_python.",
        )
    )
