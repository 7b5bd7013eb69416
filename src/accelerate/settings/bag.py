"""The base of the option classes users pass to `Accelerator`."""

from __future__ import annotations

import copy
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any


@dataclass
class KwargsHandler:
    """A set of options for one thing; only what differs from the defaults is passed on."""

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy of all fields."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {
            item.name: copy.deepcopy(value)
            for item in fields(self)
            if (value := getattr(self, item.name)) != _default_of(item)
        }


def _default_of(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING
