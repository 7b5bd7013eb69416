"""Which of the workers' streams go into files, and which of those to the terminal as well.

Owns how `--redirects`, `--tee` and their companions are read, and which of their combinations keep nothing. Pure;
imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import SettingError, explain

NUMBERS = {"stdout": 1, "stderr": 2}
"""torchrun's numbers for the streams; 3 is both."""

Choice = int | dict[int, int]
"""Streams of all workers, or of each worker of this machine."""


def read(text: str) -> Choice:
    """Read `N` or `WORKER:N,WORKER:N`; workers are counted on each machine, from 0.

    Raises:
        ValueError: If it is neither.
    """
    if re.fullmatch("[0-3]", text):
        return int(text)
    if re.fullmatch("[0-9]+:[0-3](,[0-9]+:[0-3])*", text):
        return {int(rank): int(streams) for rank, _, streams in (part.partition(":") for part in text.split(","))}
    raise ValueError(text)


def tee_of(values: Mapping[str, Any], given: Mapping[str, str]) -> str:
    """Return which streams go to a file and the terminal: both, where a folder is named and nothing else is said.

    Args:
        values: The settings of a request.
        given: Those that somebody has said something about.
    """
    return "3" if values["log_dir"] and not {"tee", "redirects"} & set(given) else values["tee"]


def is_kept(values: Mapping[str, Any], given: Mapping[str, str]) -> bool:
    """Tell whether any output goes into a file; arguments as for `tee_of`."""
    return bool(kept(read(tee_of(values, given)), read(values["redirects"] or "0")) or values["logs_specs"])


def kept(*choices: Choice) -> int:
    """Return the streams that go into a file for one worker at least."""
    streams = 0
    for choice in choices:
        for number in choice.values() if isinstance(choice, dict) else [choice]:
            streams |= number
    return streams


def check(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse what cannot be read, and what would be written nowhere.

    Args:
        values: The settings of a request.
        origins: Where those came from that somebody gave.

    Raises:
        SettingError: (a `ValueError`) that names the value and where it came from.
    """
    redirects = _read("redirects", values["redirects"] or "0", origins)
    tee = _read("tee", tee_of(values, origins), origins)
    if values["logs_specs"]:
        return  # it has rules of its own
    if kept(redirects) and not values["log_dir"]:
        raise SettingError(
            explain(
                f"redirects={values['redirects']} ({origins['redirects']}) takes the workers' output from the terminal, and "
                "no folder is named to keep it.",
                remedy="Pass --log_dir FOLDER too.",
            )
        )
    for stream, number in NUMBERS.items():
        name = f"duplicate_{stream}_filters"
        if values[name] and not (values["log_dir"] and kept(redirects, tee) & number):
            raise SettingError(
                explain(
                    f"{name}={values[name]} ({origins[name]}) chooses lines of a file that there is not: {stream} is not kept.",
                    remedy=f"Pass --log_dir FOLDER too, and --tee {number} or 3 if you pass --tee or --redirects.",
                )
            )


def check_workers(values: Mapping[str, Any], origins: Mapping[str, str], count: int) -> None:
    """Refuse numbers of workers that this machine does not have.

    Args:
        values: The settings of a request, which `check` and `torchrun.check_agent` have accepted.
        origins: Where those came from that somebody gave.
        count: How many workers it has.

    Raises:
        SettingError: (a `ValueError`) that names the number, the value and where it came from.
    """
    named = {name: read(values[name] or "0") for name in ("tee", "redirects")}
    numbers = {name: list(choice) for name, choice in named.items() if isinstance(choice, dict)}
    numbers["local_ranks_filter"] = [int(word) for word in (values["local_ranks_filter"] or "").split(",") if word]
    for name, workers in numbers.items():
        absent = [str(worker) for worker in workers if worker >= count]
        if absent:
            raise SettingError(
                explain(
                    f"{name}={values[name]} ({origins[name]}) names worker {', '.join(absent)}, and this machine has {count}.",
                    accepted=f"0 to {count - 1}: the workers of each machine are counted from 0",
                    remedy=f"Correct --{name}.",
                )
            )


def _read(name: str, text: str, origins: Mapping[str, str]) -> Choice:
    try:
        return read(text)
    except ValueError:
        raise SettingError(
            explain(
                f"{name}={text!r} ({origins[name]}) names no streams.",
                accepted="0 for none, 1 for standard output, 2 for standard error, 3 for both, or WORKER:N,WORKER:N for "
                "single workers of each machine, counted from 0",
                remedy=f"Pass --{name} 3 for both streams.",
            )
        ) from None
