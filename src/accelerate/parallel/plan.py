"""What was decided for a run, before anything is prepared."""

from __future__ import annotations

from dataclasses import dataclass

from ..precision import Precision
from ..runtime.state import Runtime
from ..settings.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Settings and machine, and the precision that follows from them."""

    settings: Settings
    runtime: Runtime
    precision: Precision

    @property
    def data_shards(self) -> int:
        """How many ranks read different data: all, as long as there are no other axes."""
        return self.runtime.process.world_size
