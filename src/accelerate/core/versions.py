"""Versions: our own, and comparing those of others.

Owns the one place where our version is written. Imports no torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

__version__ = "2.0.0"

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def compare_versions(library_or_version: object, operation: str, requirement_version: str) -> bool:
    """Compare an installed package's version, or a version, with a requirement.

    Args:
        library_or_version: A distribution name such as `"torch"`, or a `packaging` version.
        operation: One of `<`, `<=`, `==`, `!=`, `>=`, `>`.
        requirement_version: The version to compare with, such as `"2.9"`.

    Raises:
        ValueError: If `operation` is none of the six.
    """
    from importlib.metadata import version as version_of  # costs 20 ms, and `--help` wants none of it

    from packaging.version import Version, parse

    if operation not in _OPERATORS:
        accepted = ", ".join(_OPERATORS)
        raise ValueError(f"operation={operation!r} does not compare versions. Accepted: {accepted}.")
    found = library_or_version
    if isinstance(found, str):
        found = parse(version_of(found))
    if not isinstance(found, Version):
        found = parse(str(found))
    return _OPERATORS[operation](found, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Compare the installed torch with `version`; see `compare_versions`."""
    from importlib.metadata import version as version_of

    from packaging.version import parse

    # The local part ("+cpu", "+cu128") names a build, not a version.
    return compare_versions(
        parse(parse(version_of("torch")).base_version),
        operation,
        version,
    )
