"""Resolve a module's public names on first use.

Owns the `__getattr__` behind `accelerate` and `accelerate.utils`, so that importing them loads nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    module: str, table: Mapping[str, str], namespace: dict[str, Any], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a module whose names live elsewhere (PEP 562).

    Args:
        module: The `__name__` of the module that offers the names.
        table: Public name -> the module that defines it, relative to `accelerate` (`"session.state"`).
        namespace: The `globals()` of the offering module; a resolved name is kept there.
        modules: Modules below it that are loaded on first use too: `accelerate.utils` after `import accelerate`.
    """

    def __getattr__(name: str) -> Any:
        home = table.get(name)
        if home is None and name in modules:
            return importlib.import_module(f"{module}.{name}")
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(f"accelerate.{home}"), name)
        except AttributeError as error:
            # Left as it is, Python would say that the name does not exist, and hide what really failed.
            raise ImportError(f"{module}.{name} could not be loaded from accelerate.{home}: {error}") from error
        namespace[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *table, *modules})

    return __getattr__, __dir__
