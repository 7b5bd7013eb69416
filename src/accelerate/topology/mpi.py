"""The variables of MPI launchers: Open MPI, Intel MPI, MPICH and MVAPICH2."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import SettingError, explain
from .process import Process
from .variables import check_rank, number

# rank, size, local rank, local size
LAUNCHERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def find(environ: Mapping[str, str]) -> Process | None:
    """Return the place an MPI launcher gave us, if there is more than one process."""
    for rank_name, size_name, local_rank_name, local_size_name in LAUNCHERS:
        if size_name not in environ:
            continue
        world_size = number(environ, size_name)
        if world_size <= 1:
            continue
        rank = number(environ, rank_name)
        check_rank(rank, world_size, f"{rank_name} and {size_name} in the environment")
        local_world_size = number(environ, local_size_name, world_size)
        local_rank = number(environ, local_rank_name, rank % (local_world_size or 1))
        check_rank(
            local_rank,
            local_world_size,
            f"{local_rank_name} and {local_size_name} in the environment",
        )
        return Process(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            source="mpi",
            address=_address(environ, spans_nodes=local_world_size < world_size),
        )
    return None


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
    return f"{host or '127.0.0.1'}:{environ.get('MASTER_PORT', '29500')}"
