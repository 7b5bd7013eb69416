"""Ranks talking: leaf operations on one tensor or one object."""

from __future__ import annotations

from .base import Collectives, Exchange, Line
from .checked import CheckedCollectives
from .single import SingleProcess
from .torch_dist import TorchCollectives

__all__ = ["CheckedCollectives", "Collectives", "Exchange", "Line", "SingleProcess", "TorchCollectives"]
