"""Names that clients replace at run time.

Owns the look-up of a name on the public module where a client may have put its own. For set-up code only,
never inside a step.
"""

from __future__ import annotations

import sys
from typing import TypeVar

T = TypeVar("T")


def seam(face: str, name: str, default: T) -> T:
    """Return what clients see under `face.name` now; imports nothing: a face never loaded was never patched."""
    module = sys.modules.get(face)
    return default if module is None else getattr(module, name, default)
