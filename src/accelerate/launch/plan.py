"""How a launch will be carried out.

Owns the decisions, as one pure function of the request and the machine. Starts nothing, reads no environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import LaunchError, SettingError, explain
from ..topology import Process
from . import deepspeed, devices, registry, streams
from .machine import Machine
from .mpirun import Program
from .request import LaunchRequest

DEFAULT_PORT = 29500
"""The port at which several machines meet when none is named."""

CPU_VARIABLE = "ACCELERATE_USE_CPU"


@dataclass(frozen=True)
class Rendezvous:
    """Where and how the processes of a run meet."""

    backend: str = "loopback"
    """`loopback` if all processes are on this machine; `static`, `c10d` or another name that torch knows."""
    endpoint: str = "127.0.0.1:0"
    options: Mapping[str, str] = field(default_factory=dict)
    local_address: str | None = None
    """The address under which this machine is known to the others; `None` lets torch ask the network."""
    described: str = ""
    """The endpoint's address with its origin, for errors."""
    is_numbered: bool = True
    """Whether the machines have been given numbers."""
    processes: int | None = None
    """How many processes all machines together have, where somebody said so: they compare it."""


@dataclass(frozen=True)
class LaunchPlan:
    """What will be run; those who run it decide nothing."""

    kind: str
    """`inline`: the script takes the place of this process; `elastic`: torch starts and watches the workers;
    `deepspeed`: DeepSpeed's launcher does."""
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Variables that the processes get in addition to those of the launcher."""
    without: tuple[str, ...] = ()
    """Variables of the launcher that a single process does not get."""
    starter: str = ""
    """The program that starts the processes and gives them their ranks, if that is not us."""
    prefix: tuple[str, ...] = ()
    """The words with which that program is called, before those that each process runs."""
    start: deepspeed.Start | None = None
    """How DeepSpeed's launcher is called, if that is the program."""
    process: Process | None = None
    """Which process of a run this one is already, if the place has started several."""
    nodes: int = 1
    min_nodes: int | None = None
    """How few machines are enough; `None` for all."""
    node_rank: int = 0
    processes_per_node: int = 1
    rendezvous: Rendezvous = Rendezvous()
    run_id: str | None = None
    """A name that the machines of this run share, where one was given."""
    agent: Mapping[str, Any] = field(default_factory=dict)
    """Options of torch's agent that are passed on as they are."""
    grace_seconds: int | None = None
    """How long workers may take to end when the launcher is asked to; `None` is torch's default, 30."""
    max_restarts: int = 0
    monitor_interval: float = 0.1
    tee: str = "0"
    log_dir: str | None = None
    described_log_dir: str = ""
    """The same with its origin, for errors."""
    role: str = "default"
    quiet: bool = False
    notes: tuple[str, ...] = ()
    """What was decided in another way than asked, in words for the user."""

    @property
    def command(self) -> tuple[str, ...]:
        """What is run here: `argv`, or the program that starts it in all processes."""
        return (*self.prefix, *self.argv) if self.start is None else deepspeed.command(self.start, self.argv, self.env)

    @property
    def world_size(self) -> int:
        """How many processes the run has, on all machines."""
        if self.start is not None:
            return sum(map(len, self.start.hosts.values()))
        return self.processes_per_node * self.nodes if self.process is None else self.process.world_size

    @property
    def ranks(self) -> range:
        """Those that start here, where machines keep the numbers they have now; none if they are given later."""
        if self.starter or not self.rendezvous.is_numbered:
            return range(0)
        if self.process is not None:
            return range(self.process.rank, self.process.rank + 1)
        first = self.node_rank * self.processes_per_node
        return range(first, first + self.processes_per_node)

    def decides(self, variable: str, request: LaunchRequest) -> bool:
        """Tell whether a variable has a value that nobody asked for: CPUs, where no accelerator is visible."""
        return variable == CPU_VARIABLE and self.env.get(CPU_VARIABLE) == _flag(True) and not request.cpu


def plan(request: LaunchRequest, machine: Machine) -> LaunchPlan:
    """Decide how to carry out `request` on `machine`.

    Raises:
        SettingError: (a `ValueError`) if the machine has not what the request needs.
        LaunchError: If the port that other machines will look for is taken.
    """
    if request.gpu_ids is not None and machine.mpirun is None and machine.deepspeed is None:
        devices.check_ids(request.gpu_ids, request.describe("gpu_ids"), machine.devices)
    if request.place is not None and request.place.process is not None:
        return _one_rank(request, machine, request.place.process)
    if machine.mpirun is not None and request.num_processes is not None:
        return _by_mpirun(request, machine, machine.mpirun, request.num_processes)
    if machine.deepspeed is not None:
        return _by_deepspeed(request, machine, machine.deepspeed)
    per_node = _processes_per_node(request, machine)
    total = per_node * request.num_machines
    is_single = total == 1 and set(request.of_agent) <= set(_of_meeting(request))
    notes = [*request.notes, *_without_use(request, machine, is_single=is_single)]
    on_cpu = _runs_on_cpu(request, machine, total, notes)
    _check_numa(request, machine, on_cpu)
    if is_single:
        return LaunchPlan(
            kind="inline",
            argv=_argv(request, machine, buffered=True),
            env=_environment(request, machine, 1, on_cpu),
            without=_left_out(request, machine),
            quiet=request.quiet,
            notes=tuple(notes),
        )
    streams.check_workers(vars(request), request.origins, per_node)
    env = _environment(request, machine, per_node, on_cpu)
    return LaunchPlan(
        kind="elastic",
        argv=_argv(request, machine, buffered=False),
        env={**env, **on_loopback(machine, on_cpu)} if request.num_machines == 1 and per_node > 1 else env,
        nodes=request.num_machines,
        min_nodes=request.min_machines,
        node_rank=request.machine_rank,
        processes_per_node=per_node,
        rendezvous=where_to_meet(request, machine, notes),
        run_id=request.run_id,
        agent=request.agent,
        grace_seconds=request.grace_seconds,
        max_restarts=request.max_restarts,
        monitor_interval=request.monitor_interval,
        tee=streams.tee_of(vars(request), request.origins),
        log_dir=request.log_dir,
        described_log_dir=request.describe("log_dir") if request.log_dir else "",
        role=request.role,
        quiet=request.quiet,
        notes=tuple(notes),
    )


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _of_meeting(request: LaunchRequest) -> tuple[str, ...]:
    """Return the settings that only say where processes of several machines meet, and how."""
    shared = ("main_process_ip", "local_addr", "rdzv_conf", "rdzv_backend")
    return shared if request.rdzv_backend in registry.OWN_BACKENDS else ()


_NUMBERED = ("machine_rank", "min_machines", "multi_gpu")


def _without_use(
    request: LaunchRequest,
    machine: Machine,
    *,
    is_single: bool = False,
    starter: str = "",
    decided: Sequence[str] = (),
) -> list[str]:
    """Say which settings change nothing in this run: nobody is left to believe that they do.

    Args:
        request: What was asked for.
        machine: What is there.
        is_single: Whether one process takes the place of the launcher.
        starter: What starts the processes, if it is not us.
        decided: The settings that it decides by itself.
    """
    useless: dict[str, str] = {}
    if request.is_for_this_run("same_network"):  # files of version 1.x all have it
        useless["same_network"] = "changes nothing: the address and the port are used in every network."
    useless["start_method"] = "changes nothing: a script always runs in a new interpreter."
    if starter:
        reason = f"has no use: {starter} counts and numbers the processes."
        useless |= dict.fromkeys(filter(request.is_for_this_run, decided), reason)
    elif request.num_machines == 1:
        useless |= dict.fromkeys(_of_meeting(request), "has no use on a single machine.")
    if is_single:
        useless["main_process_port"] = "has no use for a single process."
    if request.dynamo_backend == "no":
        reason = "has no use while dynamo_backend is no, unless the script names a back-end."
        useless |= dict.fromkeys(_DYNAMO, reason)
    if request.log_dir and not streams.is_kept(vars(request), request.origins):
        useless["log_dir"] = f"stays empty: {request.describe('tee')} keeps no output."
    told = [
        f"{request.describe(name)} {why}"
        for name, why in useless.items()
        if not request.is_usual(name) and not (name == "main_process_ip" and request.main_process_ip in _LOOPBACK)
    ]
    if request.gpu_ids is not None and request.cpu:
        told.append(f"{request.describe('gpu_ids')} has no use: {request.describe('cpu')}.")
    elif request.gpu_ids is not None and machine.devices is not None and not machine.devices.count:
        told.append(f"{request.describe('gpu_ids')} has no use: no accelerator is visible here.")
    counted = ("num_processes", "processes_per_machine", "gpu_ids")
    if is_single and request.several and not any(map(request.was_given, counted)):
        told.append(f"{request.several} asks for several processes, and nothing says how many: one is started.")
    label = machine.devices.label if machine.devices is not None and not request.cpu else ""
    if request.several and label and not request.several.startswith(f"distributed_type={label} "):
        told.append(f"{request.several} has no effect: the devices here are {label}, and these are used.")
    return told


_DYNAMO = ("dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation")


def _one_rank(request: LaunchRequest, machine: Machine, process: Process) -> LaunchPlan:
    """Plan for a task that is one process of the run already: it becomes the script."""
    starter = request.place.name if request.place is not None else ""
    notes = [*request.notes, *_without_use(request, machine, starter=starter, decided=("num_machines", *_NUMBERED))]
    on_cpu = request.cpu or (machine.devices is not None and machine.devices.count == 0)
    if on_cpu and not request.cpu:
        notes.append(
            f"No accelerator is visible here: {process.world_size} processes will run on CPUs. Say --cpu to ask for it."
        )
    rank = _as_rank(request, process)
    # Some places do not say how many are on a machine.
    is_near = process.local_world_size == process.world_size and rank["MASTER_ADDR"] in _LOOPBACK
    return LaunchPlan(
        kind="inline",
        argv=_argv(request, machine, buffered=False),
        env={
            **_environment(request, machine, process.local_world_size, on_cpu),
            **(on_loopback(machine, on_cpu) if is_near else {}),
            **rank,
        },
        process=process,
        processes_per_node=process.local_world_size,
        quiet=request.quiet,
        notes=tuple(notes),
    )


def _by_mpirun(request: LaunchRequest, machine: Machine, mpirun: Program, processes: int) -> LaunchPlan:
    """Plan for processes that mpirun starts; each finds its rank by what mpirun tells it."""
    per_node = processes // request.num_machines if request.was_given("num_machines") else None
    env = _environment(request, machine, per_node or processes, request.cpu)
    env["MASTER_ADDR"] = request.main_process_ip or mpirun.first_host or "127.0.0.1"
    env["MASTER_PORT"] = str(request.main_process_port or DEFAULT_PORT)
    return LaunchPlan(
        kind="inline",
        argv=_argv(request, machine, buffered=False),
        prefix=mpirun.command(request.mpirun_hostfile or "", processes, per_node, env),
        env=env,
        without=_left_out(request, machine),
        starter="mpirun",
        nodes=request.num_machines,
        processes_per_node=processes // request.num_machines,
        quiet=request.quiet,
        notes=(*request.notes, *_without_use(request, machine, starter="mpirun", decided=_NUMBERED)),
    )


def _by_deepspeed(request: LaunchRequest, machine: Machine, found: deepspeed.Found) -> LaunchPlan:
    """Plan for processes that DeepSpeed's launcher starts, by torchrun's variables or by those of MPI or SLURM."""
    start = deepspeed.decide(
        found,
        machine.python,
        deepspeed.Wanted(
            describe=request.describe,
            include=request.deepspeed_inclusion_filter,
            exclude=request.deepspeed_exclusion_filter,
            processes=request.num_processes,
            machines=request.num_machines if request.was_given("num_machines") else None,
            rank=request.machine_rank,
            address=request.main_process_ip,
            port=request.main_process_port,
        ),
    )
    per_node = max(map(len, start.hosts.values()))
    env = _environment(request, machine, per_node, request.cpu)
    env |= {"MASTER_ADDR": start.address, "MASTER_PORT": str(start.port)}
    if start.is_here:
        env |= on_loopback(machine, request.cpu)
    if request.cpu:
        env["DS_ACCELERATOR"] = "cpu"
    useless = _without_use(request, machine, starter="DeepSpeed's launcher", decided=("multi_gpu",))
    return LaunchPlan(
        kind="deepspeed",
        argv=_argv(request, machine, buffered=False),
        env=env,
        without=_left_out(request, machine),
        starter="DeepSpeed's launcher",
        start=start,
        nodes=len(start.hosts),
        node_rank=request.machine_rank,
        processes_per_node=per_node,
        quiet=request.quiet,
        notes=(*request.notes, *useless, *start.notes),
    )


def _as_rank(request: LaunchRequest, process: Process) -> dict[str, str]:
    host, _, port = (process.address or "").rpartition(":")
    host = request.main_process_ip or host
    if not host:
        raise SettingError(
            explain(
                f"{process.world_size} processes on several machines ({request.origin('num_processes')}) must meet, and "
                "nothing says where.",
                accepted="the address or host name of the machine of rank 0",
                remedy="Set MASTER_ADDR on all of them (mpirun -x MASTER_ADDR=HOST ...), or pass --main_process_ip.",
            )
        )
    return {
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": str(process.local_rank),
        "LOCAL_WORLD_SIZE": str(process.local_world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(request.main_process_port or port or DEFAULT_PORT),
    }


def _left_out(request: LaunchRequest, machine: Machine) -> tuple[str, ...]:
    """Return the variables by which a single process would take itself for a rank of another run, and wait for it."""
    alone = request.origin("num_processes").startswith("from --")
    own = machine.rank_variables if alone or machine.is_worker else ()
    return tuple(dict.fromkeys((*own, *request.hidden)))


def _processes_per_node(request: LaunchRequest, machine: Machine) -> int:
    if request.num_processes is not None:
        return request.num_processes // request.num_machines
    asked = request.processes_per_machine
    if asked == "gpu" and machine.devices is not None and not machine.devices.count:
        raise SettingError(
            explain(
                f"{request.describe('processes_per_machine')} asks for one process on each device, and this machine shows "
                "none.",
                remedy="Make devices visible, or pass --nproc_per_node cpu or a number.",
            )
        )
    if asked == "cpu" or (asked == "auto" and not (machine.devices and machine.devices.count)):
        return machine.logical_cores
    if request.cpu or machine.devices is None:
        return 1
    count = len(request.gpu_ids) if request.gpu_ids and machine.devices.count else machine.devices.count
    if request.multi_gpu and count * request.num_machines < 2:
        raise _too_few(request, count)
    return max(1, count)


def _too_few(request: LaunchRequest, count: int) -> SettingError:
    return SettingError(
        explain(
            f"{request.describe('multi_gpu')} asks for several devices, and this machine shows {count}.",
            accepted="two visible devices or more",
            remedy="Make more devices visible, or leave --multi_gpu out.",
        )
    )


def _runs_on_cpu(request: LaunchRequest, machine: Machine, processes: int, notes: list[str]) -> bool:
    if request.cpu:
        return True
    if machine.devices is None or processes == 1:
        return False
    if machine.devices.count == 0:
        if request.multi_gpu:
            raise _too_few(request, 0)
        notes.append(
            f"No accelerator is visible here: {processes} processes will share the CPU. Say --cpu to ask for it."
        )
        return True
    here = processes // request.num_machines
    if request.gpu_ids is None and here > machine.devices.count:
        shown = "" if machine.visible is None else f" ({machine.devices.visible}={machine.visible} in the environment)"
        more = shown and f", show more of them in {machine.devices.visible}"
        raise SettingError(
            explain(
                f"{request.describe('num_processes')} asks for {here} processes on this machine, which shows "
                f"{machine.devices.count} {machine.devices.name} device(s){shown}.",
                accepted="one process for each device",
                remedy=f"Pass --num_processes {machine.devices.count * request.num_machines}{more}, or --cpu.",
            )
        )
    return False


def _check_numa(request: LaunchRequest, machine: Machine, on_cpu: bool) -> None:
    there = machine.devices is not None and machine.devices.name == "cuda" and machine.devices.count
    if request.numa_binding is None or (there and not on_cpu):
        return
    raise SettingError(
        explain(
            f"{request.describe('numa_binding')} binds each worker near its NVIDIA device, and this run has none.",
            remedy="Leave it out, or make devices visible.",
        )
    )


def _argv(request: LaunchRequest, machine: Machine, *, buffered: bool) -> tuple[str, ...]:
    if request.no_python:
        return (request.script, *request.script_args)
    # Several processes share one terminal: their lines are to appear when they are written.
    head = (machine.python,) if buffered else (machine.python, "-u")
    if request.run_path:
        return (*head, "-c", _RUN_PATH, request.script, *request.script_args)
    module = ("-m",) if request.module else ()
    return (*head, *module, request.script, *request.script_args)


_RUN_PATH = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def among_visible(request: LaunchRequest, machine: Machine) -> LaunchRequest:
    """Let a file pick devices among those that the environment shows, and none beside them; to be done before `plan`."""
    picks = request.gpu_ids is not None and not request.is_for_this_run("gpu_ids")
    if not picks or machine.visible is None or machine.devices is None:
        return request
    if set(request.gpu_ids or ()) <= {item.strip() for item in machine.visible.split(",")}:
        return request
    note = (
        f"{request.describe('gpu_ids')} is left aside: {machine.devices.visible}={machine.visible} in the environment "
        f"shows {'other' if machine.visible else 'no'} devices."
    )
    origins = {name: origin for name, origin in request.origins.items() if name != "gpu_ids"}
    return replace(request, gpu_ids=None, origins=origins, notes=(*request.notes, note))


def _environment(request: LaunchRequest, machine: Machine, processes_here: int, on_cpu: bool) -> dict[str, str]:
    values = {
        CPU_VARIABLE: _flag(on_cpu),
        "ACCELERATE_MIXED_PRECISION": request.mixed_precision,
        "ACCELERATE_DYNAMO_BACKEND": request.dynamo_backend.upper(),
        "ACCELERATE_DYNAMO_MODE": request.dynamo_mode,
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": _flag(request.dynamo_use_fullgraph),
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _flag(request.dynamo_use_regional_compilation),
        "ACCELERATE_DEBUG_MODE": _flag(request.debug),
    }
    if request.dynamo_use_dynamic is not None:  # unset lets torch find out by itself
        values["ACCELERATE_DYNAMO_USE_DYNAMIC"] = _flag(request.dynamo_use_dynamic)
    if request.gradient_accumulation_steps is not None:
        values["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(request.gradient_accumulation_steps)
    if request.was_given("resume"):
        values["ACCELERATE_RESUME"] = request.resume
    if request.save_on_signals is not None:
        values["ACCELERATE_SAVE_ON_SIGNALS"] = request.save_on_signals
    if request.enable_cpu_affinity:
        values["ACCELERATE_CPU_AFFINITY"] = "1"
    threads = _threads(request, machine, processes_here, on_cpu)
    if threads is not None:
        values["OMP_NUM_THREADS"] = str(threads)
    if request.gpu_ids is not None and not on_cpu and machine.devices is not None and machine.devices.visible:
        values[machine.devices.visible] = ",".join(request.gpu_ids)
    return {**values, **machine.network}


def on_loopback(machine: Machine, on_cpu: bool) -> dict[str, str]:
    """Return the variables for ranks that are all on this machine: nobody else has to reach them."""
    if machine.loopback is None:
        return {}
    names = ["GLOO_SOCKET_IFNAME", *([] if on_cpu or machine.names_interface else ["NCCL_SOCKET_IFNAME"])]
    return dict.fromkeys(names, machine.loopback)


def _threads(request: LaunchRequest, machine: Machine, processes_here: int, on_cpu: bool) -> int | str | None:
    if request.num_cpu_threads_per_process is not None:
        return request.num_cpu_threads_per_process
    if processes_here == 1:
        return None  # alone on the machine: as `python script.py` has it
    return max(1, machine.cores // processes_here) if on_cpu else 1


def where_to_meet(request: LaunchRequest, machine: Machine, notes: list[str]) -> Rendezvous:
    """Decide where the processes meet, adding to `notes` what the user is to know about it.

    Raises:
        SettingError: (a `ValueError`) for an option that the way to meet has no use for.
        LaunchError: If the port that other machines will look for is taken.
    """
    if request.num_machines > 1:
        found = _far_rendezvous(request, machine, notes)
        return found if request.local_addr is None else replace(found, local_address=request.local_addr)
    # Port 0 is bound where it is chosen, so that any number of launches can start at the same time.
    port = 0 if request.standalone else request.main_process_port or 0
    if port and machine.port_is_taken:
        notes.append(
            f"{request.describe('main_process_port')} is taken by another program: a free port is used instead."
        )
        port = 0
    if request.rdzv_backend in registry.OWN_BACKENDS:
        return Rendezvous(endpoint=f"127.0.0.1:{port}", local_address="127.0.0.1")
    host = _in_brackets(request.main_process_ip or "localhost")
    return Rendezvous(request.rdzv_backend, f"{host}:{port}", request.rdzv_conf, request.local_addr or "127.0.0.1")


def _far_rendezvous(request: LaunchRequest, machine: Machine, notes: list[str]) -> Rendezvous:
    port = request.main_process_port or DEFAULT_PORT
    backend = request.rdzv_backend
    if backend == "static" and (request.max_restarts or request.min_machines is not None):
        backend = "c10d"  # machines with fixed numbers meet once
        if request.is_for_this_run("rdzv_backend"):
            notes.append(f"{request.describe('rdzv_backend')} cannot meet a second time: c10d is used instead.")
    options, known_as = dict(request.rdzv_conf), machine.address
    if backend in registry.OWN_BACKENDS:
        options = registry.options_of(backend, options, request.origin("rdzv_conf"))
    is_numbered = backend == "static" or request.was_given("machine_rank")
    if is_numbered and request.machine_rank == 0 and machine.port_is_taken:
        raise LaunchError(
            explain(
                f"{request.describe('main_process_port')} is taken on this machine, where the others will look for it.",
                accepted="a free port, the same on all machines",
                remedy=f"End the program that listens there (`lsof -i :{port}`), or pass another --main_process_port.",
            )
        )
    if backend == "c10d" and is_numbered:
        # Otherwise torch compares host names, which fails where names do not resolve.
        is_host = request.machine_rank == 0
        options.setdefault("is_host", str(int(is_host)))
        known_as = request.main_process_ip if is_host else known_as
    if backend == "static" and request.local_addr is not None:
        notes.append(
            f"{request.describe('local_addr')} has no use: machines that meet by static use main_process_ip alone."
        )
    described = request.describe("main_process_ip")
    endpoint = f"{_in_brackets(request.main_process_ip or '')}:{port}"
    # A number for each machine may differ between them.
    is_total = request.was_given("num_processes") and not isinstance(request.processes_per_machine, int)
    processes = request.num_processes if is_total else None
    return Rendezvous(backend, endpoint, options, known_as, described, is_numbered, processes)


def _in_brackets(host: str) -> str:
    """Return an address as it stands before a port: one of IPv6 has colons of its own."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _flag(value: bool) -> str:
    return "true" if value else "false"
