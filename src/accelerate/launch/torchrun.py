"""torchrun's names for what a launch may be asked, in our words.

Owns the translation, of flags and of the variables `PET_<FLAG>`. Pure; imports no torch. Options of torch's agent that
we have no word for keep their names, and are handed over by `launch.agent`.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import SettingError, explain
from ..core.text import str_to_bool
from ..settings.variables import unreadable
from .source import Source

SAME = {
    "node_rank": "machine_rank",
    "master_addr": "main_process_ip",
    "master_port": "main_process_port",
    "rdzv_id": "run_id",
    "shutdown_timeout": "grace_seconds",
    "nproc_per_node": "processes_per_machine",
}
"""torchrun's name -> ours."""

AGENT_FIELDS = (
    "event_log_handler",
    "numa_binding",
    "signals_to_handle",
    "duplicate_stdout_filters",
    "duplicate_stderr_filters",
    "virtual_local_rank",
    "redirects",
    "local_ranks_filter",
    "logs_specs",
)
"""Options of torch's agent that are passed on as they are."""

COUNT_WORDS = ("auto", "gpu", "cpu")

_TEXTS = (
    "nnodes", "nproc_per_node", "master_addr", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "local_addr",
    "start_method", "event_log_handler", "role", "log_dir", "redirects", "tee", "local_ranks_filter",
    "duplicate_stdout_filters", "duplicate_stderr_filters", "signals_to_handle",
)  # fmt: skip
_NUMBERS = ("node_rank", "master_port", "max_restarts", "shutdown_timeout")
_SWITCHES = ("standalone", "module", "no_python", "run_path", "virtual_local_rank")
VARIABLES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_NUMBERS, int),
    **dict.fromkeys(_SWITCHES, lambda text: bool(str_to_bool(text))),
    "monitor_interval": float,
}
"""The flags of torchrun that have a variable, and how its text is read."""


def from_environment(environ: Mapping[str, str]) -> Source:
    """Return what the variables `PET_<FLAG>` say, in our words: each is the value of a flag of torchrun.

    Raises:
        SettingError: (a `ValueError`) as `in_our_words` does.
    """
    found: Source = {}
    for flag, read in VARIABLES.items():
        name = f"PET_{flag.upper()}"
        text = environ.get(name)
        if not text:
            continue
        try:
            value = read(text)
        except ValueError:
            accepted = "true or false" if flag in _SWITCHES else "a number"
            raise unreadable(name, text, accepted) from None
        if value is not False:  # a switch that is off is a flag that is left out
            found[flag] = (value, f"from the variable {name}")
    return in_our_words(found)


def about_unknown(environ: Mapping[str, str]) -> list[str]:
    """Say, a sentence for each, which variables begin like torchrun's and have no effect, there or here."""
    told: list[str] = []
    for name in environ:
        flag = name.removeprefix("PET_").lower()
        if not name.startswith("PET_") or flag in VARIABLES:
            continue
        close = difflib.get_close_matches(flag, VARIABLES, n=1, cutoff=0.8)
        instead = (
            f"Pass --{flag}." if flag in AGENT_FIELDS else f"Did you mean PET_{close[0].upper()}?" if close else ""
        )
        told.append(f"the variable {name} has no effect: torchrun has no such variable. {instead}".rstrip())
    return told


def in_our_words(given: Source) -> Source:
    """Translate the settings that one source gave.

    Raises:
        SettingError: (a `ValueError`) for a value that cannot be read, or for two names of one thing that disagree.
    """
    found = {name: item for name, item in given.items() if name not in (*SAME, *_MACHINES, "rdzv_endpoint")}
    translated: list[tuple[str, Any, str]] = []
    for name, ours in SAME.items():
        if name in given:
            value, origin = given[name]
            translated.append((ours, _count(value, origin) if name == "nproc_per_node" else value, origin))
    for name in _MACHINES:
        if name in given:
            translated += _machines(name, *given[name])
    if "rdzv_endpoint" in given:
        translated += _endpoint(*given["rdzv_endpoint"])
    for name, value, origin in translated:
        if name in found and found[name][0] != value:
            raise SettingError(
                explain(
                    f"{name}={found[name][0]} ({found[name][1]}) contradicts {value} ({origin}): both are the same thing.",
                    remedy="Leave one of the two out.",
                )
            )
        found.setdefault(name, (value, origin))
    return found


_MACHINES = ("num_machines", "nnodes")


def _machines(name: str, value: Any, origin: str) -> list[tuple[str, Any, str]]:
    """Read `N` or `MIN:MAX`."""
    least, colon, most = str(value).partition(":")
    if not (least.isdecimal() and (most.isdecimal() if colon else True)) or not 1 <= int(least) <= int(most or least):
        raise SettingError(
            explain(
                f"{name}={value!r} ({origin}) is no number of machines.",
                accepted="N, or MIN:MAX with 1 <= MIN <= MAX",
                remedy=f"For example --{name} 4, or --{name} 2:4.",
            )
        )
    found: list[tuple[str, Any, str]] = [("num_machines", int(most or least), origin)]
    if most and most != least:
        found.append(("min_machines", int(least), origin))
    return found


def _count(value: Any, origin: str) -> int | str:
    text = str(value).lower()
    if text in COUNT_WORDS:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise SettingError(
        explain(
            f"nproc_per_node={value!r} ({origin}) is no number of processes.",
            accepted="a number from 1, or auto, gpu, cpu",
            remedy="Pass --nproc_per_node auto for one process on each device.",
        )
    )


def _endpoint(text: str, origin: str) -> list[tuple[str, Any, str]]:
    """Read `host`, `host:port`, `[v6]` or `[v6]:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or (text.startswith("[") and text.endswith("]")):
        host, port = text, ""
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or (port and not port.isdecimal()) or (colon and not port and not text.endswith("]")):
        raise SettingError(
            explain(
                f"rdzv_endpoint={text!r} ({origin}) is no address.",
                accepted="HOST or HOST:PORT",
                remedy="For example --rdzv_endpoint node0:29500.",
            )
        )
    return [("main_process_ip", host, origin), *([("main_process_port", int(port), origin)] if port else [])]


def read_pairs(text: str, origin: str) -> dict[str, str]:
    """Read the options of a meeting, `key=value,key=value`.

    Raises:
        SettingError: (a `ValueError`) for anything else.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        key, sign, value = part.partition("=")
        if not (key and sign and value):
            raise SettingError(
                explain(
                    f"rdzv_conf={text!r} cannot be read at {part!r} ({origin}).",
                    accepted="key=value pairs, separated by commas",
                    remedy="For example --rdzv_conf timeout=900,join_timeout=600",
                )
            )
        pairs[key.strip()] = value.strip()
    return pairs


def check_agent(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse values that torch's agent would choke on later.

    Raises:
        SettingError: (a `ValueError`) that names the value and where it came from.
    """
    ranks = values.get("local_ranks_filter")
    if ranks and not all(part.strip().isdecimal() for part in ranks.split(",")):
        raise SettingError(
            explain(
                f"local_ranks_filter={ranks!r} ({origins['local_ranks_filter']}) names no ranks.",
                accepted="numbers, separated by commas",
                remedy="For example --local_ranks_filter 0,2",
            )
        )
    for name in (values.get("signals_to_handle") or "").split(","):
        if name and (name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP")):
            why = "no process can handle" if name in signal.Signals.__members__ else "is no signal here"
            raise SettingError(
                explain(
                    f"signals_to_handle names {name!r} ({origins['signals_to_handle']}), which {why}.",
                    accepted="names such as SIGTERM, separated by commas",
                    remedy="torch's own list is SIGTERM,SIGINT,SIGHUP,SIGQUIT.",
                )
            )
