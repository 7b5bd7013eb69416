"""Where the launcher was started: by SLURM, Kubeflow, MPI, a cloud, or by hand.

Owns what each kind of place leaves in the environment, one row each, and what that means for a launch. Pure functions
over a mapping; asks no network and imports no torch.

[Note: nodes and processes] A place starts our command once for each node, or once for each process. A task that is
alone on its node stands for the node, and starts a process for each device there. Several tasks on one node are the
processes of the run already: each runs the script in its own place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import SettingError, explain
from ..topology import Process, mpi, slurm, torchrun
from ..topology.variables import check_rank, number, port
from . import deepspeed
from .source import MACHINES, Source, over
from .torchrun import from_environment


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the environment says about this run."""

    name: str
    source: Source = field(default_factory=dict)
    """The settings that it decides."""
    process: Process | None = None
    """What this task is, if it is one process of the run already; else it stands for its node."""
    rank_variables: tuple[str, ...] = ()
    """The variables by which a script would find out that it is one of several."""
    notes: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """How many nodes there are, where each has one task."""
        return self.source["num_machines"][0] if "num_machines" in self.source else 1


def find(environ: Mapping[str, str]) -> list[Place]:
    """Return the places we are in, the strongest first; none on a machine of one's own, and in a worker of another run.

    Torchrun's own variables come first. They may be set within another place; where they say how many nodes there are,
    they describe the whole run.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return []
    said = from_environment(environ)
    own = [Place(name="torchrun's environment", source=said)] if said else []
    looks = () if "num_machines" in said else PLACES
    return own + list(filter(None, (look(environ) for look in looks)))[:1]


# --- the rows ----------------------------------------------------------------------------------------------


def _mpi(environ: Mapping[str, str]) -> Place | None:
    launcher = mpi.find_launcher(environ)
    place = launcher and mpi.place_of(launcher, environ)
    if launcher is None or place is None:
        return None
    nodes = number(environ, launcher.nodes, place.world_size) if launcher.nodes else place.world_size
    if nodes >= place.world_size == place.local_world_size + 1 > 2:
        raise _lone(launcher, place)
    # Several nodes without an address are no error yet: a flag may name it.
    host = environ.get("MASTER_ADDR") or ("" if place.local_world_size < place.world_size else "127.0.0.1")
    return _task(
        environ,
        launcher.name,
        replace(place, address=f"{host}:{port(environ)}"),
        is_node=place.local_world_size == 1 and nodes >= place.world_size,
        size=launcher.size,
        node=launcher.rank,
        address="MASTER_ADDR",
        port="MASTER_PORT",
        marks=(launcher.rank, launcher.size),
    )


def _lone(launcher: mpi.Launcher, place: Process) -> SettingError:
    # All tasks have to see themselves in the same way, and nothing tells that one how the others are spread.
    return SettingError(
        explain(
            f"{place.local_world_size} of {place.world_size} tasks run on this node ({launcher.local_size}, "
            f"{launcher.size}): the one that is alone on another node cannot tell that it is not to start processes of its own.",
            accepted="the same number of tasks on all nodes",
            remedy="Spread them evenly, as with mpirun --map-by ppr:1:node or -ppn 1.",
        )
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    step = slurm.find_step(environ)
    process = slurm.find(environ)
    if step is None or process is None:
        return _allocation(environ)
    is_node = step.tasks == step.nodes
    return _task(
        environ,
        "SLURM",
        process,
        is_node=is_node,
        size="SLURM_STEP_NUM_NODES" if is_node else "SLURM_STEP_NUM_TASKS",
        node="SLURM_NODEID",
        address="MASTER_ADDR" if environ.get("MASTER_ADDR") else "SLURM_STEP_NODELIST",
        port="MASTER_PORT" if environ.get("MASTER_PORT") else "SLURM_JOB_ID",
        marks=("SLURM_PROCID",),
    )


def _allocation(environ: Mapping[str, str]) -> Place | None:
    """Say what a batch script or a shell inside an allocation should know: it runs on one node."""
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    if not nodes.isdigit() or int(nodes) <= 1 or environ.get("SLURM_STEP_NUM_TASKS", "1") == "0":
        return None
    if "SLURM_STEP_ID" in environ and "SLURM_PTY_PORT" not in environ:
        return None  # a step of one task, which was asked for
    note = (
        f"SLURM gave this job {nodes} nodes (SLURM_JOB_NUM_NODES), and this command uses one of them. "
        "To use all: srun --ntasks-per-node=1 accelerate launch ..."
    )
    return Place(name="SLURM", notes=(note,))


def _skypilot(environ: Mapping[str, str]) -> Place | None:
    if "SKYPILOT_NUM_NODES" not in environ and "SKYPILOT_NODE_IPS" not in environ:
        return None
    hosts = environ.get("SKYPILOT_NODE_IPS", "").split()
    per_node = number(environ, "SKYPILOT_NUM_GPUS_PER_NODE", 0)
    return _node(
        environ,
        name="SkyPilot",
        nodes=number(environ, "SKYPILOT_NUM_NODES", max(1, len(hosts))),
        rank="SKYPILOT_NODE_RANK",
        address=hosts[0] if hosts else None,
        per_node=per_node or None,
        variables=("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"),
    )


def _dstack(environ: Mapping[str, str]) -> Place | None:
    if "DSTACK_NODES_NUM" not in environ:
        return None
    return _node(
        environ,
        name="dstack",
        nodes=number(environ, "DSTACK_NODES_NUM"),
        rank="DSTACK_NODE_RANK",
        address=environ.get("DSTACK_MASTER_NODE_IP"),
        per_node=number(environ, "DSTACK_GPUS_PER_NODE", 0) or None,
        variables=("DSTACK_NODES_NUM", "DSTACK_MASTER_NODE_IP", "DSTACK_GPUS_PER_NODE"),
    )


def _sagemaker(environ: Mapping[str, str]) -> Place | None:
    if "SM_HOSTS" not in environ or "SM_CURRENT_HOST" not in environ:
        return None
    hosts = _json(environ, "SM_HOSTS")
    if not isinstance(hosts, list) or environ["SM_CURRENT_HOST"] not in hosts:
        raise SettingError(
            explain(
                f"SM_HOSTS={environ['SM_HOSTS']!r} in the environment does not list this machine, "
                f"SM_CURRENT_HOST={environ['SM_CURRENT_HOST']!r}.",
                accepted='a JSON list of host names, such as ["algo-1", "algo-2"]',
                remedy="Unset both to launch on this machine alone.",
            )
        )
    return _node(
        {"SM_CURRENT_HOST": str(hosts.index(environ["SM_CURRENT_HOST"]))},
        name="SageMaker",
        nodes=len(hosts),
        rank="SM_CURRENT_HOST",
        address=str(hosts[0]),
        per_node=number(environ, "SM_NUM_GPUS", 0) or None,
        variables=("SM_HOSTS", "SM_HOSTS", "SM_NUM_GPUS"),
    )


def _lepton(environ: Mapping[str, str]) -> Place | None:
    if "LEPTON_JOB_TOTAL_WORKERS" not in environ:
        return None
    prefix, domain = environ.get("LEPTON_JOB_WORKER_PREFIX"), environ.get("LEPTON_SUBDOMAIN")
    return _node(
        environ,
        name="DGX Cloud Lepton",
        nodes=number(environ, "LEPTON_JOB_TOTAL_WORKERS"),
        rank="LEPTON_JOB_WORKER_INDEX",
        address=f"{prefix}-0.{domain}" if prefix and domain else None,
        per_node=None,
        variables=("LEPTON_JOB_TOTAL_WORKERS", "LEPTON_JOB_WORKER_PREFIX, LEPTON_SUBDOMAIN", ""),
    )


def _vertex(environ: Mapping[str, str]) -> Place | None:
    """Read Vertex AI's description of the cluster, where it does not give ranks as PyTorchJob does."""
    if "CLUSTER_SPEC" not in environ or "RANK" in environ:
        return None
    spec = _json(environ, "CLUSTER_SPEC")
    pools = spec.get("cluster") if isinstance(spec, dict) else None
    task = spec.get("task") if isinstance(spec, dict) else None
    if not isinstance(pools, dict) or not isinstance(task, dict) or task.get("type") not in pools:
        return None  # TensorFlow and others describe themselves in this variable too
    lists = {pool: hosts if isinstance(hosts, list) else [] for pool, hosts in sorted(pools.items())}
    hosts = [(pool, str(index), host) for pool, listed in lists.items() for index, host in enumerate(listed)]
    numbers = [(pool, index) for pool, index, _ in hosts]
    own = (task["type"], str(task.get("index", 0)))
    if own not in numbers:
        raise SettingError(
            explain(
                f"CLUSTER_SPEC in the environment says that this is {own[0]} {own[1]}, and lists no such host.",
                accepted="what Vertex AI writes: cluster, with a list of hosts for each pool, and task, with type and index",
                remedy="Correct or unset the variable.",
            )
        )
    place = numbers.index(own)
    host, colon, port = str(hosts[0][2]).rpartition(":")
    host, port = (host, port) if colon else (port, "")
    return _node(
        {"CLUSTER_SPEC": str(place)},
        name="Vertex AI",
        nodes=len(hosts),
        rank="CLUSTER_SPEC",
        address=host,
        per_node=None,
        variables=("CLUSTER_SPEC", "CLUSTER_SPEC", ""),
        port=int(port) if port.isdigit() else None,
    )


def _ranks_by_hand(environ: Mapping[str, str]) -> Place | None:
    """Read torch's own variables, which PyTorchJob, Vertex AI and AzureML set once for each pod or process."""
    if "MASTER_ADDR" not in environ:
        return None  # left over, or for the script to complain of
    process = torchrun.find(environ)
    if process is None or process.world_size <= 1:
        return None
    name = next((name for mark, name in _SETTERS.items() if mark in environ), "the environment")
    # A process that knows no local rank is alone in its container; so is one whose node has its rank.
    if "LOCAL_WORLD_SIZE" not in environ and _is_alone(environ):
        process = replace(process, local_rank=0, local_world_size=1)
    return _task(
        environ,
        name,
        process,
        is_node=process.local_world_size == 1,
        size="WORLD_SIZE",
        node="RANK",
        address="MASTER_ADDR",
        port="MASTER_PORT" if "MASTER_PORT" in environ else "",
        marks=("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )


_SETTERS = {
    "CLUSTER_SPEC": "Vertex AI",
    "AZUREML_RUN_ID": "AzureML",
    "AZ_BATCH_NODE_LIST": "AzureML",
    "KUBERNETES_SERVICE_HOST": "PyTorchJob",
}
"""A variable -> whose machine has it."""


def _is_alone(environ: Mapping[str, str]) -> bool:
    return "LOCAL_RANK" not in environ or (
        environ.get("NODE_RANK") == environ["RANK"] and environ.get("NODE_COUNT") == environ["WORLD_SIZE"]
    )


PLACES: Sequence[Callable[[Mapping[str, str]], Place | None]] = (
    _mpi,
    _slurm,
    _skypilot,
    _dstack,
    _sagemaker,
    _lepton,
    _vertex,
    _ranks_by_hand,
)
"""Asked in order: what was started last comes first, and what names itself before what anybody sets."""


# --- what rows have in common ------------------------------------------------------------------------------


def _task(
    environ: Mapping[str, str],
    name: str,
    process: Process,
    *,
    is_node: bool,
    size: str,
    node: str,
    address: str,
    port: str,
    marks: tuple[str, ...],
) -> Place:
    """Describe a place that starts our command in several tasks. See [Note: nodes and processes]."""
    host, _, number_of_port = (process.address or "").rpartition(":")
    values = {
        "num_machines": (process.world_size, size),
        "machine_rank": (process.rank, node),
        "main_process_ip": (host, address),
        "main_process_port": (int(number_of_port) if number_of_port.isdigit() else None, port),
    }
    return Place(
        name=name,
        source=_from(name, values if is_node else {"num_processes": (process.world_size, size)}),
        process=None if is_node else process,
        rank_variables=tuple(mark for mark in marks if mark in environ),
    )


def _node(
    environ: Mapping[str, str],
    *,
    name: str,
    nodes: int,
    rank: str,
    address: str | None,
    per_node: int | None,
    variables: tuple[str, str, str],
    port: int | None = None,
) -> Place:
    """Describe a place that starts our command once for each node."""
    node_rank = number(environ, rank, None if nodes > 1 else 0)
    check_rank(node_rank, nodes, f"{rank} and {variables[0]} in the environment")
    several = {
        "num_machines": (nodes, variables[0]),
        "machine_rank": (node_rank, rank),
        "main_process_ip": (address, variables[1]),
        "main_process_port": (port, variables[1]),
    }
    values = {**(several if nodes > 1 else {}), "processes_per_machine": (per_node, variables[2])}
    return Place(name=name, source=_from(name, values))


def _from(name: str, values: Mapping[str, tuple[Any, str]]) -> Source:
    """Give each value that is known its origin: the place, and the variable."""
    return {
        setting: (value, f"from {name} ({variable})" if variable else f"from {name}")
        for setting, (value, variable) in values.items()
        if value not in (None, "")
    }


def _json(environ: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(environ[name])
    except ValueError:
        raise SettingError(
            explain(
                f"{name}={environ[name]!r} in the environment is not JSON.",
                remedy=f"Unset {name} to launch on this machine alone.",
            )
        ) from None


# --- the place among the other sources ---------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """What all sources say together."""

    source: Source
    place: Place | None = None
    """`None` if there is none, or if flags or variables ask for something else."""
    notes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    """The variables of a place that is left aside: scripts must not follow them either."""


def weigh(places: Sequence[Place], written: Source, asked: Source) -> Standing:
    """Let flags and variables win over a place, and a place over a file; say where they contradict each other.

    Args:
        places: What `find` returned.
        written: What the configuration file says.
        asked: What flags and variables say.
    """
    kept: Place | None = None
    notes: list[str] = []
    hidden: list[str] = []
    many = any(
        isinstance(count := source.get("num_machines", (1,))[0], int) and count > 1 for source in (written, asked)
    )
    for place in map(_without_count, places) if _program(asked) else places:
        if place.source or not (many or _starter(place, written) or _starter(place, asked)):
            notes += place.notes  # where nothing was started, they say how to start all
        other_run = _other_run(place, asked)
        if other_run is not None:
            notes.append(other_run)
            hidden += place.rank_variables
            left = {name: item for name, item in place.source.items() if name not in (*MACHINES, "num_processes")}
            asked = over(left, asked)
            continue
        kept = place
        written, asked = dict(written), dict(asked)
        for name, (source, why) in _without_use(place, written, asked).items():
            value, origin = source.pop(name)
            if not isinstance(value, int):  # a number agrees, or it would be another run
                notes.append(f"{name}={value} ({origin}) is left aside: {why}.")
        if "num_machines" in place.source:
            written = _spread(written, place.nodes)
        notes += _contradictions(place, written, asked)
        asked = over(place.source, asked)
    written, told = _for_flag(written, asked)
    return Standing(over(written, asked), kept, (*notes, *told), tuple(hidden))


def _other_run(place: Place, asked: Source) -> str | None:
    """Return why flags or variables describe another run than the place's, if they do."""
    tasks, nodes = place.process, place.nodes
    here = place.source.get("num_machines") or place.source.get("num_processes")
    if here is None:
        return None
    count = f"{tasks.world_size} processes" if tasks else f"{nodes} machines" if nodes > 1 else "1 machine"
    if starter := _starter(place, asked):
        if (tasks.world_size if tasks else nodes) > 1:
            return _only_from_the_first(place, f"{starter}={asked[starter][0]} ({asked[starter][1]})", here)
        return _against(starter, asked, count, here[1])
    if "standalone" in asked and (tasks or nodes > 1):
        return _against("standalone", asked, count, here[1])
    if "num_machines" in asked and nodes not in (1, asked["num_machines"][0]):
        return _against("num_machines", asked, str(nodes), here[1])
    if tasks is None:
        is_alone = "num_machines" not in asked and asked.get("num_processes", ("", ""))[0] == 1
        return _against("num_processes", asked, count, here[1]) if is_alone else None
    for name, number_of in (("num_processes", tasks.world_size), ("processes_per_machine", tasks.local_world_size)):
        if isinstance(asked.get(name, ("", ""))[0], int) and asked[name][0] != number_of:
            return _against(name, asked, str(number_of), here[1])
    return None


def _starter(place: Place, source: Source) -> str | None:
    """Return the setting that asks for another program to start the processes of all machines, if one does."""
    if place.process is None and source.get("deepspeed_multinode_launcher", ("", ""))[0] == "nossh":
        return None  # each machine starts its own
    return _program(source)


def _program(source: Source) -> str | None:
    """Return the setting that asks for mpirun or DeepSpeed's launcher, if one does."""
    asked = deepspeed.asked_by({name: value for name, (value, _) in source.items()})
    return "mpirun_hostfile" if "mpirun_hostfile" in source else asked


def _without_count(place: Place) -> Place:
    """Leave out how many devices a place has on each node, which nobody has asked for; a variable of torchrun's asks."""
    if place.source.get("processes_per_machine", ("", "from the variable"))[1].startswith("from the variable"):
        return place
    source = {name: item for name, item in place.source.items() if name != "processes_per_machine"}
    return replace(place, source=source)


def _only_from_the_first(place: Place, starter: str, tasks: tuple[Any, str]) -> str:
    """Say what becomes of a program that starts the processes of all machines, where our command runs several times.

    A cloud runs the user's script on each node, which may call us on the first one alone. Who gives tasks ranks has
    started our command itself, in each of them.

    Raises:
        SettingError: (a `ValueError`) where the run would start more than once.
    """
    count, origin = tasks
    if place.rank_variables or place.source.get("machine_rank", (0, ""))[0]:
        raise SettingError(
            explain(
                f"{starter} starts the processes of all machines from one place, and each of the {count} tasks here "
                f"({origin}) would start all of it.",
                accepted="one task (with SLURM: srun --nodes=1 --ntasks=1), or deepspeed_multinode_launcher=nossh, one on "
                "each machine",
                remedy="Run this command once, or leave the setting out: the tasks here are started already.",
            )
        )
    return (
        f"{starter} starts all of it from here, the first of {count} ({origin}): the others must not run this command."
    )


def _against(name: str, asked: Source, theirs: str, origin: str) -> str:
    return f"{name}={asked[name][0]} ({asked[name][1]}) contradicts {theirs} ({origin}): {_kind(asked[name][1])} is followed."


def _kind(origin: str) -> str:
    return "the flag" if origin.startswith("from --") else "the variable"


def _without_use(place: Place, written: Source, asked: Source) -> dict[str, tuple[Source, str]]:
    """Return the settings that have no meaning here, with their source and the reason."""
    useless: dict[str, tuple[Source, str]] = {}
    started = f"{place.name} has started the processes"
    if _starter(place, written) and (place.process is not None or place.nodes > 1):
        useless |= {name: (written, started) for name in ("mpirun_hostfile", *deepspeed.SETTINGS) if name in written}
    if "processes_per_machine" in asked and place.process is not None:
        useless["processes_per_machine"] = (asked, started)
    return useless


def _contradictions(place: Place, written: Source, asked: Source) -> list[str]:
    notes: list[str] = []
    weaker, stronger = _totals(written, place.nodes), _totals(asked, place.nodes)
    for name, (value, origin) in _totals(place.source, place.nodes).items():
        other, winner = (stronger.get(name), "") if name in stronger else (weaker.get(name), place.name)
        if other is not None and str(other[0]) != str(value):
            notes.append(
                f"{name}={other[0]} ({other[1]}) contradicts {name}={value} ({origin}): {winner or _kind(other[1])} is "
                "followed."
            )
    return notes


def _totals(source: Source, nodes: int) -> Source:
    """Return a source with the processes of all machines instead of those of each, to be compared with others."""
    found = dict(source)
    count, origin = found.pop("processes_per_machine", (None, ""))
    return over(found, {"num_processes": (count * nodes, origin)}) if isinstance(count, int) else found


def _for_flag(written: Source, asked: Source) -> tuple[Source, list[str]]:
    """Read a file as `_spread` does where a flag says how many machines there are, and say so."""
    found = over(written, asked)
    here_only, origin_of_it = asked.get("standalone", (False, ""))
    count = (1, origin_of_it) if here_only else asked.get("num_machines")
    if count is None or found.get("num_processes") != written.get("num_processes", ()):
        return written, []
    names = {name: value for name, (value, _) in found.items()}
    if "mpirun_hostfile" in names or deepspeed.asked_by(names):
        return written, []  # one program starts, and counts, the processes of all machines
    spread = _spread(written, count[0])
    if spread is written:
        return written, []
    total, origin = written["num_processes"]
    machines, of_file = written.get("num_machines", (1, ""))[0], spread["processes_per_machine"]
    note = (
        f"num_processes={total} ({origin}) stands in a file for {machines} machine(s): {of_file[0]} on each of the "
        f"{count[0]} machine(s) ({count[1]})."
    )
    return spread, [note]


def _spread(written: Source, nodes: int) -> Source:
    """Read the number of processes in a file that was written for fewer machines as that of each of them."""
    total, origin = written.get("num_processes", (None, ""))
    machines = written.get("num_machines", (1, ""))[0]
    if machines == nodes or not isinstance(total, int) or total % machines:
        return written
    return over(written, {"processes_per_machine": (total // machines, f"{origin}, for each of {nodes} machines")})
