"""In which numbers a model computes."""

from __future__ import annotations

from .amp import BFloat16, Float16
from .base import FullPrecision, Precision
from .choose import choose

__all__ = ["BFloat16", "Float16", "FullPrecision", "Precision", "choose"]
