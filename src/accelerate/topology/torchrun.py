"""The variables of torchrun, `python -m torch.distributed.launch --use_env` and our own launcher."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import SettingError, explain
from .process import Process
from .variables import check_rank, number, port


def find(environ: Mapping[str, str]) -> Process | None:
    """Return the place torchrun gave us, if it did; also that of one process in each container."""
    if environ.get("LOCAL_RANK") == "-1":
        return None
    if "LOCAL_RANK" not in environ:
        return _one_per_machine(environ)
    local_rank = number(environ, "LOCAL_RANK")
    world_size = number(environ, "WORLD_SIZE", 1)
    rank = number(environ, "RANK", None if world_size > 1 else 0)
    check_rank(rank, world_size, "RANK and WORLD_SIZE in the environment")
    if world_size == 1 and "MASTER_ADDR" not in environ:
        return None  # LOCAL_RANK alone, as some notebooks set it: nobody to meet
    local_world_size = _local_world_size(environ, world_size, rank - local_rank)
    if "LOCAL_WORLD_SIZE" in environ:
        check_rank(
            local_rank,
            local_world_size,
            "LOCAL_RANK and LOCAL_WORLD_SIZE in the environment",
        )
    return Process(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        source="torchrun",
        address=f"{environ.get('MASTER_ADDR', '127.0.0.1')}:{port(environ, is_alone=world_size == 1)}",
    )


def _local_world_size(environ: Mapping[str, str], world_size: int, before: int) -> int:
    """Return how many processes this machine has, of which some come before them on others.

    DeepSpeed's launcher has a name of its own for it. AzureML does not say it, and numbers the machines.
    """
    if "LOCAL_WORLD_SIZE" not in environ and environ.get("LOCAL_SIZE", "").isdecimal():
        return int(environ["LOCAL_SIZE"])
    if "LOCAL_WORLD_SIZE" in environ or not 0 <= before < world_size:
        return number(environ, "LOCAL_WORLD_SIZE", world_size)
    nodes, node = number(environ, "NODE_COUNT", 0), number(environ, "NODE_RANK", 0)
    if 0 < nodes <= world_size:
        return -(-world_size // nodes)
    return before // node if node and before else world_size - before


def _one_per_machine(environ: Mapping[str, str]) -> Process | None:
    # Job controllers that start one process in each container, such as Kubeflow's, leave the local rank out.
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    world_size = number(environ, "WORLD_SIZE")
    if world_size <= 1:
        return None
    if "MASTER_ADDR" not in environ:
        raise SettingError(
            explain(
                f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} say that this process is one of several, and "
                "nothing says where they meet: MASTER_ADDR is not set.",
                accepted="the host name or address of rank 0",
                remedy="Set MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE to run alone.",
            )
        )
    rank = number(environ, "RANK")
    check_rank(rank, world_size, "RANK and WORLD_SIZE in the environment")
    return Process(
        rank=rank,
        world_size=world_size,
        source="torchrun",
        address=f"{environ['MASTER_ADDR']}:{port(environ)}",
    )
