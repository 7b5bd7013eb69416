"""The variables of SLURM: the step that `srun` started this process in.

A shell inside an allocation (`salloc`, `srun --pty bash`) and a batch script see many of the same variables; only a
process of a step that `srun` started is one of several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import SettingError, explain
from . import variables
from .process import Process
from .variables import check_rank, number

_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Step numbers from here on stand for batch scripts, interactive shells and the like."""
_LOWEST_PORT, _PORTS = 10_000, 20_000
"""Ports are chosen below those that Linux gives to connections by itself (32768 and up)."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What `srun` started, as one of its tasks sees it."""

    tasks: int
    task: int
    local_task: int
    tasks_here: int
    nodes: int
    node: int
    first_host: str | None
    port: int
    """The same in all tasks of the step, and most likely another one in other jobs."""


def find(environ: Mapping[str, str]) -> Process | None:
    """Return the place of this task, if `srun` started several."""
    step = find_step(environ)
    if step is None:
        return None
    address = environ.get("MASTER_ADDR") or (step.first_host if step.nodes > 1 else "127.0.0.1")
    if address is None:
        raise SettingError(
            explain(
                f"SLURM started this step on {step.nodes} nodes, and SLURM_STEP_NODELIST does not name them.",
                accepted="the host name or address of the first node",
                remedy="Set MASTER_ADDR to it: export MASTER_ADDR=$(scontrol show hostnames | head -n 1)",
            )
        )
    return Process(
        rank=step.task,
        world_size=step.tasks,
        local_rank=step.local_task,
        local_world_size=step.tasks_here,
        source="slurm",
        address=f"{address}:{variables.port(environ, step.port)}",
    )


def find_step(environ: Mapping[str, str]) -> Step | None:
    """Return the step of several tasks that this process belongs to, if there is one.

    Raises:
        SettingError: (a `ValueError`) if the variables contradict each other.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None  # a batch script, or the shell of an allocation
    identity = number(environ, "SLURM_STEP_ID")
    # Steps that are started from the shell of `srun --pty`, which is a step's first, inherit its variable.
    is_shell = "SLURM_PTY_PORT" in environ and identity == 0
    tasks = number(environ, "SLURM_STEP_NUM_TASKS", number(environ, "SLURM_NTASKS", 1))
    if identity >= _FIRST_SPECIAL_STEP or is_shell or tasks <= 1:
        return None
    task = number(environ, "SLURM_PROCID")
    check_rank(task, tasks, "SLURM_PROCID and SLURM_STEP_NUM_TASKS in the environment")
    nodes = number(environ, "SLURM_STEP_NUM_NODES", number(environ, "SLURM_NNODES", 1))
    node = number(environ, "SLURM_NODEID", 0)
    check_rank(node, nodes, "SLURM_NODEID and SLURM_STEP_NUM_NODES in the environment")
    here = _tasks_here(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), node) or -(-tasks // nodes)
    local = number(environ, "SLURM_LOCALID", task % here)
    check_rank(local, here, "SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE in the environment")
    return Step(
        tasks=tasks,
        task=task,
        local_task=local,
        tasks_here=here,
        nodes=nodes,
        node=node,
        first_host=_first_host(environ),
        port=port(number(environ, "SLURM_JOB_ID", 0), identity),
    )


def port(job: int, step: int) -> int:
    """Choose the port at which the tasks of a step meet.

    Neighbouring jobs, and steps of one job that run side by side, get different ones.
    """
    return _LOWEST_PORT + (job + 4099 * step) % _PORTS


def _first_host(environ: Mapping[str, str]) -> str | None:
    text = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    hosts = expand(text) if text else ()
    return hosts[0] if hosts else None


def expand(text: str) -> tuple[str, ...]:
    """Return the hosts of a list such as `gpu[01-03,7],login2`, as `scontrol show hostnames` does."""
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]+|\[[^\]]*\])+", text):
        found = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
            found = [before + part for before in found for part in ([plain] if plain else _numbers(ranges))]
        hosts += found
    return tuple(hosts)


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1) if first.isdigit() and (last or first).isdigit() else ()
        found += [str(each).zfill(len(first)) for each in numbers]
    return found


def _tasks_here(text: str, node: int) -> int | None:
    """Return how many tasks a node has, from the short form that SLURM writes: `2(x3),1`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else None
