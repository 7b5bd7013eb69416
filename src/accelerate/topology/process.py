"""Who one process is among how many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Process:
    """The place of one process in a job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    source: str = "single"
    """Who said so: `"torchrun"`, `"mpi"`, `"slurm"`, `"attached"` or `"single"`."""

    address: str | None = None
    """Where the processes meet, as `host:port`; `None` when they have met already, or need not."""

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group to join; true for torchrun with one process."""
        return self.source != "single"
