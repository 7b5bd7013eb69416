"""Where settings came from, on their way from the launcher to its workers.

A worker reads its settings from variables that the launcher set. What stands behind a variable (a flag, a line of a
file, nothing) travels in one more, ACCELERATE_SETTINGS, so that an error in a worker can name it, and so that a launcher
inside a worker can tell what the user said from what the launcher around it said. That variable holds remarks only: the
value of a setting is that of its own variable, and a remark about another value is not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import NoneType

VARIABLE = "ACCELERATE_SETTINGS"
SCHEMA = 1


Remark = tuple[str, str | None, str | None]
"""The value of a variable, where the launcher had it from (`None`: nobody said it), and what it was before."""


def pack(variables: Mapping[str, Remark], told: Sequence[str] = ()) -> str:
    """Return the text of the variable.

    Args:
        variables: Variable that the launcher sets -> what is to be known about it.
        told: Warnings the launcher has given, which workers need not repeat.
    """
    return json.dumps({"schema": SCHEMA, "origins": variables, "told": list(told)}, separators=(",", ":"))


def added(environ: Mapping[str, str], variables: Mapping[str, tuple[str, str | None]]) -> str:
    """Return the text of the variable for workers of a launcher that keeps to the environment it was called in.

    What a launcher around it has said stays known; what variables were before that one, too.

    Args:
        environ: The environment of the call.
        variables: Variable that is set -> its value, and where it came from.
    """
    known = _remarks(environ)
    before = {name: known[name][2] if name in known else environ.get(name) for name in variables}
    told = _read(environ).get("told")
    remarks = {name: (value, given, before[name]) for name, (value, given) in variables.items()}
    return pack({**known, **remarks}, told if isinstance(told, list) else ())


def origin(environ: Mapping[str, str], name: str) -> str:
    """Say where the value of a variable came from: `from --mixed_precision`, or `from ACCELERATE_MIXED_PRECISION`."""
    remark = _remarks(environ).get(name)
    if remark is None:
        return f"from {name}"
    return "a default of the launcher" if remark[1] is None else f"{remark[1]}, given to the launcher"


def before_launch(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return what variables were before a launcher set them for this worker; `None` for those that were not there.

    A flag or a file speaks to its own launch. A launch inside of that goes by what the user put into the environment,
    and by what the script put there since.
    """
    before = {name: remark[2] for name, remark in _remarks(environ).items()}
    return {**before, VARIABLE: None} if VARIABLE in environ else {}


def was_told(environ: Mapping[str, str], text: str) -> bool:
    """Tell whether the launcher has given a warning already."""
    told = _read(environ).get("told")
    return isinstance(told, list) and text in told


def _remarks(environ: Mapping[str, str]) -> dict[str, Remark]:
    """Return the remarks about values that are still those of the launcher."""
    found = _read(environ).get("origins")
    remarks = found.items() if isinstance(found, dict) else ()
    return {
        name: tuple(remark)
        for name, remark in remarks
        if isinstance(remark, list) and len(remark) == 3 and remark[0] == environ.get(name)
        if all(isinstance(item, (str, NoneType)) for item in remark)
    }


def _read(environ: Mapping[str, str]) -> dict[str, object]:
    try:
        found = json.loads(environ.get(VARIABLE) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}
