"""Ranks: who this process is among how many, and joining the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import attached, mpi, slurm, torchrun
from .process import Process

SOURCES: tuple[Callable[[Mapping[str, str]], Process | None], ...] = (
    attached.find,
    torchrun.find,
    mpi.find,
    slurm.find,
)
"""Asked in order. A group that exists already wins: under Ray and the like a second one must not be made.

MPI comes before SLURM: its launcher may have been started by `srun`, once for each node.
"""


def detect(environ: Mapping[str, str]) -> Process:
    """Return who this process is; a single one if no launcher left a trace."""
    for source in SOURCES:
        process = source(environ)
        if process is not None:
            return process
    return Process()


__all__ = ["SOURCES", "Process", "detect"]
