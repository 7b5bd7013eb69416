"""Attributes of `Accelerator` that are views of its session.

Clients read them, and some assign to them between construction and `prepare`. An assignment changes the plan, so that
it has an effect.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from .session import Session


class HasSession(Protocol):
    """Whatever holds a session."""

    _session: Session


class SettingView:
    """A setting of the plan.

    Args:
        path: Where it is in `Settings`: `"data"`, `"handlers.ddp"`.
        read: Turns the setting into what clients see.
        write: Turns what clients assign into the setting.
    """

    def __init__(self, path: str, read: Any = None, write: Any = None) -> None:
        self._section, _, self._field = path.rpartition(".")
        self._read = read
        self._write = write

    def __get__(self, holder: HasSession | None, kind: type | None = None) -> Any:
        if holder is None:
            return self
        settings: Any = holder._session.plan.settings
        value = getattr(getattr(settings, self._section) if self._section else settings, self._field)
        return value if self._read is None else self._read(value)

    def __set__(self, holder: HasSession, value: Any) -> None:
        value = value if self._write is None else self._write(value)
        settings = holder._session.plan.settings
        change = {self._field: value}
        if self._section:
            change = {self._section: dataclasses.replace(getattr(settings, self._section), **change)}
        holder._session.change(dataclasses.replace(settings, **change))


class StepView:
    """The counter of accumulation: that of the window which had a batch last."""

    def __get__(self, holder: HasSession | None, kind: type | None = None) -> Any:
        return self if holder is None else holder._session.windows.step

    def __set__(self, holder: HasSession, value: int) -> None:
        holder._session.windows.step = value


class ListView:
    """A live list of the session; assigning replaces what is in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, holder: HasSession | None, kind: type | None = None) -> Any:
        return self if holder is None else getattr(holder._session, self._name)

    def __set__(self, holder: HasSession, value: list[Any]) -> None:
        getattr(holder._session, self._name)[:] = value
