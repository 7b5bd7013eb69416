"""The only owner of `os.environ`.

Everything else receives a mapping, or asks here. Writing happens in two functions: `applied`, which restores on
exit, and `announce`, for the few names that other libraries in this process look at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ..core.errors import SettingError, explain
from ..core.text import str_to_bool

# Names that other libraries read in this process after we decided something.
ANNOUNCED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)


def read() -> dict[str, str]:
    """Return a copy of the process environment."""
    return dict(os.environ)


def get(name: str, default: str | None = None) -> str | None:
    """Return one variable as text."""
    return os.environ.get(name, default)


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Read a boolean variable in any of the accepted spellings; unset or empty means `False`.

    Raises:
        SettingError: (a `ValueError`) for any other word.
    """
    value = environ.get(name) or "false"
    try:
        return bool(str_to_bool(value))
    except SettingError:
        raise SettingError(
            explain(
                f"{name}={value!r} in the environment is not a boolean.",
                accepted="yes, true, on, 1, or no, false, off, 0",
                remedy=f"Set {name}=true, or unset it.",
            )
        ) from None


def announce(name: str, value: str) -> None:
    """Set a variable that other libraries in this process look at. Only names of `ANNOUNCED`."""
    if name not in ANNOUNCED:
        raise KeyError(f"{name} is not a variable this library announces")
    os.environ[name] = value


@contextmanager
def applied(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables, `None` removing one, and restore all of them on exit."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _write(variables)
        yield
    finally:
        _write(before)


def _write(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def patch_environment(**kwargs: object) -> Iterator[None]:
    """Set environment variables, names upper-cased, and restore them on exit."""
    with applied({name.upper(): str(value) for name, value in kwargs.items()}):
        yield


@contextmanager
def clear_environment() -> Iterator[None]:
    """Empty the environment, and restore it on exit."""
    before = read()
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Read a boolean variable in any of the accepted spellings; unset means `default`."""
    value = os.environ.get(key)
    return default if value is None else bool(str_to_bool(value))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """Read a variable as text."""
    return os.environ.get(key, default)


def get_int_from_env(env_keys: list[str], default: int) -> int:
    """Return the first of several variables that holds a number >= 0."""
    for key in env_keys:
        value = int(os.environ.get(key, "-1"))
        if value >= 0:
            return value
    return default


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorate a function, or all methods of a class, to leave the variables `ACCELERATE_*` as it found them.

    For tests: variables of this library that the body sets or removes are put back, also if it raises.
    """
    if not isinstance(func_or_cls, type):
        return _restoring(func_or_cls)
    for name, value in list(vars(func_or_cls).items()):
        if callable(value) and not isinstance(value, type) and not name.startswith("__"):
            setattr(func_or_cls, name, _restoring(value))
    return func_or_cls


def _restoring(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
        try:
            return function(*args, **kwargs)
        finally:
            for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
                del os.environ[name]
            os.environ.update(before)

    return wrapper
