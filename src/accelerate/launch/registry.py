"""Names that torch's agent knows, or that packages register for it, and the options of our own ways to meet.

Owns what is accepted of `--rdzv_backend`, `--rdzv_conf`, `--event_log_handler` and `--logs_specs`. Imports no torch, so
that a wrong name is told at once; what packages register is looked up only for names that nobody else has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ..core.errors import SettingError, explain, nearest

OWN_BACKENDS = ("static", "c10d")
"""The ways to meet that are ours; torch's of these names are not used."""
ETCD = ("etcd", "etcd-v2")
BACKENDS_GROUP = "torchrun.handlers"
LOGS_GROUP = "torchrun.logs_specs"
_EVENT_HANDLERS = ("console", "dynamic_rendezvous", "null")

_WAITING = {"static": "timeout", "c10d": "join_timeout"}
"""Way to meet -> its name for how long machines wait for each other; each name is understood by both."""
_OF_C10D = (
    "last_call_timeout", "close_timeout", "heartbeat_timeout", "keep_alive_interval", "keep_alive_max_attempt",
    "read_timeout", "is_host",
)  # fmt: skip
_SWITCHED = ("1", "true", "t", "yes", "y", "0", "false", "f", "no", "n")


def check_options(options: Mapping[str, str], origin: str) -> None:
    """Refuse options that none of our ways to meet reads, and values that cannot be read.

    Raises:
        SettingError: (a `ValueError`) that names the option and where it came from.
    """
    known = (*_WAITING.values(), *_OF_C10D)
    for key, value in options.items():
        if key not in known:
            raise SettingError(
                explain(
                    f"{key}={value} ({origin}) is no option of rdzv_conf.{nearest(key, known)}",
                    accepted=known,
                    remedy="Correct it, or leave it out.",
                )
            )
        if value.lower() in _SWITCHED if key == "is_host" else value.isdecimal() and int(value) > 0:
            continue
        raise SettingError(
            explain(
                f"{key}={value} ({origin}) cannot be read.",
                accepted="true or false" if key == "is_host" else "a whole number from 1",
                remedy="For example --rdzv_conf join_timeout=900",
            )
        )


def options_of(backend: str, given: Mapping[str, object], origin: str) -> dict[str, str]:
    """Return the options of one of our ways to meet under the names that it reads.

    Raises:
        SettingError: (a `ValueError`) for an option that it has no use for.
    """
    options = {name: str(value) for name, value in given.items()}
    check_options(options, origin)
    other = next((name for name in options if backend == "static" and name in _OF_C10D), None)
    if other is not None:
        raise SettingError(
            explain(
                f"{other}={options[other]} ({origin}) is an option of c10d, and these machines meet by static.",
                accepted=[_WAITING["static"]],
                remedy="Pass --rdzv_backend c10d, or leave it out.",
            )
        )
    others = {name: value for name, value in options.items() if name not in _WAITING.values()}
    seconds = next((options[name] for name in (_WAITING[backend], *_WAITING.values()) if name in options), None)
    return others if seconds is None else {_WAITING[backend]: seconds, **others}


def check_names(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse names that a request asks for and nobody offers.

    Args:
        values: The settings of a request.
        origins: Where those came from that somebody gave.

    Raises:
        SettingError: (a `ValueError`) that names the value and where it came from.
    """
    checks = {"rdzv_backend": check_backend, "event_log_handler": check_event_handler, "logs_specs": check_logs}
    for name, check in checks.items():
        if name in origins:
            check(values[name], origins[name])


def check_backend(name: str, origin: str) -> None:
    """Refuse a way to meet that nobody offers.

    Raises:
        SettingError: (a `ValueError`) that names it and where it came from.
    """
    if name in OWN_BACKENDS:
        return
    if name in ETCD:
        if importlib.util.find_spec("etcd") is None:
            raise SettingError(
                explain(
                    f"rdzv_backend={name} ({origin}) needs the package python-etcd, which is not installed.",
                    accepted=OWN_BACKENDS,
                    remedy="Run `pip install python-etcd`, or choose c10d, which needs no server.",
                )
            )
        return
    registered = _registered(BACKENDS_GROUP)
    if name not in registered:
        raise SettingError(
            explain(
                f"rdzv_backend={name!r} ({origin}) is no way to meet that anybody offers here.",
                accepted=sorted({*OWN_BACKENDS, *ETCD, *registered}),
                remedy="Choose c10d, or install the package that offers it.",
            )
        )


def check_event_handler(name: str, origin: str) -> None:
    """Refuse a handler of events that torch does not have.

    Raises:
        SettingError: (a `ValueError`) that names it and where it came from.
    """
    if name not in _EVENT_HANDLERS:
        raise SettingError(
            explain(
                f"event_log_handler={name!r} ({origin}) is not known to torch.",
                accepted=_EVENT_HANDLERS,
                remedy="Pass --event_log_handler console to see events, or leave it out.",
            )
        )


def check_logs(name: str, origin: str) -> None:
    """Refuse rules for logs that nobody offers.

    Raises:
        SettingError: (a `ValueError`) that names them and where that came from.
    """
    registered = _registered(LOGS_GROUP)
    if name not in registered:
        raise SettingError(
            explain(
                f"logs_specs={name!r} is not registered ({origin}).",
                accepted=sorted(registered) or f"entry points of the group {LOGS_GROUP}; there are none",
                remedy="Install the package that offers it, or leave the flag out.",
            )
        )


def _registered(group: str) -> set[str]:
    import importlib.metadata  # costs 10 ms, and few launches ask

    return set(importlib.metadata.entry_points(group=group).names)
