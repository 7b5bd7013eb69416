"""The variables of MPI launchers, and of schedulers that start processes as they do.

Open MPI, MVAPICH2, Intel MPI and MPICH (Hydra), Cray PALS, jsrun (LSF), Flux.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import SettingError, explain
from . import slurm
from .process import Process
from .variables import check_rank, number, port


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What one launcher calls its variables."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None = None
    nodes: str | None = None
    """How many nodes there are."""


LAUNCHERS = (
    Launcher(
        name="Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        nodes="OMPI_MCA_orte_num_nodes",
    ),
    Launcher(
        name="MVAPICH2",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank="MV2_COMM_WORLD_LOCAL_RANK",
        local_size="MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK",
        size="JSM_NAMESPACE_SIZE",
        local_rank="JSM_NAMESPACE_LOCAL_RANK",
        local_size="JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher(
        name="Flux",
        rank="FLUX_TASK_RANK",
        size="FLUX_JOB_SIZE",
        local_rank="FLUX_TASK_LOCAL_ID",
        nodes="FLUX_JOB_NNODES",
    ),
    Launcher(
        name="PALS", rank="PALS_RANKID", size="PMI_SIZE", local_rank="PALS_LOCAL_RANKID", local_size="PALS_LOCAL_SIZE"
    ),
    Launcher(
        name="MPICH", rank="PMI_RANK", size="PMI_SIZE", local_rank="MPI_LOCALRANKID", local_size="MPI_LOCALNRANKS"
    ),
)
"""The first one whose rank and size are set counts."""


def find(environ: Mapping[str, str]) -> Process | None:
    """Return the place an MPI launcher gave us, if there is more than one process."""
    launcher = find_launcher(environ)
    if launcher is None:
        return None
    place = place_of(launcher, environ)
    return place and Process(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        source="mpi",
        address=_address(environ, spans_nodes=place.local_world_size < place.world_size),
    )


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that left its variables, whatever they say."""
    for launcher in LAUNCHERS:
        # PALS has the size from PMI, so its rank tells the two apart; elsewhere a missing rank is to be complained of.
        mark = launcher.rank if launcher.name == "PALS" else launcher.size
        if mark in environ:
            return None if launcher.name == "MPICH" and _is_slurms(environ) else launcher
    return None


def place_of(launcher: Launcher, environ: Mapping[str, str]) -> Process | None:
    """Return the ranks that a launcher's variables name; `None` for a single process."""
    world_size = number(environ, launcher.size)
    if world_size <= 1:
        return None
    rank = number(environ, launcher.rank)
    check_rank(rank, world_size, f"{launcher.rank} and {launcher.size} in the environment")
    local_world_size = _local_size(launcher, environ, world_size)
    local_rank = number(environ, launcher.local_rank, rank % (local_world_size or 1))
    origin = f"{launcher.local_rank} and {launcher.local_size or launcher.nodes} in the environment"
    check_rank(local_rank, local_world_size, origin)
    return Process(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, source="mpi"
    )


def _local_size(launcher: Launcher, environ: Mapping[str, str], world_size: int) -> int:
    if launcher.local_size is not None:
        return number(environ, launcher.local_size, world_size)
    return -(-world_size // max(1, number(environ, launcher.nodes or "", 1)))


def _is_slurms(environ: Mapping[str, str]) -> bool:
    # `srun --mpi=pmi2` names its own tasks in MPICH's words too, without saying how many are on one node.
    step = slurm.find_step(environ)
    return step is not None and (str(step.task), str(step.tasks)) == (environ.get("PMI_RANK"), environ.get("PMI_SIZE"))


def _address(environ: Mapping[str, str], *, spans_nodes: bool) -> str:
    host = environ.get("MASTER_ADDR")
    if host is None and spans_nodes:
        raise SettingError(
            explain(
                "MPI started this job on several nodes, and MASTER_ADDR does not say where they meet.",
                accepted="the host name or address of the node of rank 0",
                remedy="Start with: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ...",
            )
        )
    return f"{host or '127.0.0.1'}:{port(environ)}"
