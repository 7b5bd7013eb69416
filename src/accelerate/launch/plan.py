"""How a launch will be carried out.

Owns the decisions, as one pure function of the request and the machine. Starts nothing, reads no environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.errors import LaunchError, SettingError, explain
from .machine import Machine
from .request import LaunchRequest

DEFAULT_PORT = 29500
"""The port at which several machines meet when none is named."""


@dataclass(frozen=True)
class Rendezvous:
    """Where and how the processes of a run meet."""

    backend: str = "static"
    endpoint: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    local_address: str | None = None
    """The address under which this machine is known to the others; `None` lets torch ask the network."""


@dataclass(frozen=True)
class LaunchPlan:
    """What will be run; those who run it decide nothing."""

    kind: str
    """`inline`: the script takes the place of this process; `elastic`: torch starts and watches the workers."""
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Variables that the processes get in addition to those of the launcher."""
    without: tuple[str, ...] = ()
    """Variables of the launcher that a single process does not get."""
    nodes: int = 1
    node_rank: int = 0
    processes_per_node: int = 1
    rendezvous: Rendezvous = Rendezvous()
    grace_seconds: int | None = None
    """How long workers may take to end when the launcher is asked to; `None` is torch's default, 30."""
    max_restarts: int = 0
    monitor_interval: float = 0.1
    tee: str = "0"
    log_dir: str | None = None
    role: str = "default"
    quiet: bool = False
    notes: tuple[str, ...] = ()
    """What was decided in another way than asked, in words for the user."""


def plan(request: LaunchRequest, machine: Machine) -> LaunchPlan:
    """Decide how to carry out `request` on `machine`.

    Raises:
        SettingError: (a `ValueError`) if the machine has not what the request needs.
        LaunchError: If the port that other machines will look for is taken.
    """
    notes: list[str] = []
    per_node = _processes_per_node(request, machine)
    on_cpu = _runs_on_cpu(request, machine, per_node * request.num_machines, notes)
    if per_node * request.num_machines == 1 and not _needs_watching(request):
        return LaunchPlan(
            kind="inline",
            argv=_argv(request, machine, buffered=True),
            env=_environment(request, machine, 1, on_cpu),
            without=_left_out(request, machine),
            quiet=request.quiet,
            notes=tuple(notes),
        )
    return LaunchPlan(
        kind="elastic",
        argv=_argv(request, machine, buffered=False),
        env=_environment(request, machine, per_node, on_cpu),
        nodes=request.num_machines,
        node_rank=request.machine_rank,
        processes_per_node=per_node,
        rendezvous=_rendezvous(request, machine, notes),
        grace_seconds=request.grace_seconds,
        max_restarts=request.max_restarts,
        monitor_interval=request.monitor_interval,
        # A folder for logs is named in order to have them.
        tee="3" if request.log_dir and request.tee == "0" else request.tee,
        log_dir=request.log_dir,
        role=request.role,
        quiet=request.quiet,
        notes=tuple(notes),
    )


def _left_out(request: LaunchRequest, machine: Machine) -> tuple[str, ...]:
    """Return the variables by which a single process would take itself for a rank of another run, and wait for it."""
    alone = request.origins.get("num_processes") == "from --num_processes"
    return machine.rank_variables if alone or machine.is_worker else ()


def _needs_watching(request: LaunchRequest) -> bool:
    """Tell whether a single process was given options that only torch's agent can carry out."""
    asked = (
        request.max_restarts > 0,
        request.tee != "0",
        request.log_dir,
        request.role != "default",
        request.rdzv_conf,
    )
    return any(asked) or request.rdzv_backend != "static"


def _processes_per_node(request: LaunchRequest, machine: Machine) -> int:
    if request.num_processes is not None:
        return request.num_processes // request.num_machines
    if request.cpu or machine.devices is None:
        return 1
    count = len(request.gpu_ids) if request.gpu_ids is not None else machine.devices.count
    if request.multi_gpu and count * request.num_machines < 2:
        raise SettingError(
            explain(
                f"{request.describe('multi_gpu')} asks for several devices, and this machine shows {count}.",
                accepted="two visible devices or more",
                remedy="Pass --num_processes, make more devices visible, or leave --multi_gpu out.",
            )
        )
    return max(1, count)


def _runs_on_cpu(request: LaunchRequest, machine: Machine, processes: int, notes: list[str]) -> bool:
    if request.cpu:
        return True
    if machine.devices is None or processes == 1:
        return False
    if machine.devices.count == 0:
        notes.append(
            f"No accelerator is visible here: {processes} processes will share the CPU. Say --cpu to ask for it."
        )
        return True
    here = processes // request.num_machines
    if request.gpu_ids is None and here > machine.devices.count:
        raise SettingError(
            explain(
                f"{request.describe('num_processes')} asks for {here} processes on this machine, which shows "
                f"{machine.devices.count} {machine.devices.name} device(s).",
                accepted="one process for each device",
                remedy=f"Pass --num_processes {machine.devices.count * request.num_machines}, or --cpu.",
            )
        )
    return False


def _argv(request: LaunchRequest, machine: Machine, *, buffered: bool) -> tuple[str, ...]:
    if request.no_python:
        return (request.script, *request.script_args)
    # Several processes share one terminal: their lines are to appear when they are written.
    head = (machine.python,) if buffered else (machine.python, "-u")
    module = ("-m",) if request.module else ()
    return (*head, *module, request.script, *request.script_args)


def _environment(request: LaunchRequest, machine: Machine, processes_here: int, on_cpu: bool) -> dict[str, str]:
    values = {
        "ACCELERATE_USE_CPU": _flag(on_cpu),
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
    return values


def _threads(request: LaunchRequest, machine: Machine, processes_here: int, on_cpu: bool) -> int | str | None:
    if request.num_cpu_threads_per_process is not None:
        return request.num_cpu_threads_per_process
    if processes_here == 1:
        return None  # alone on the machine: as `python script.py` has it
    return max(1, machine.cores // processes_here) if on_cpu else 1


def _rendezvous(request: LaunchRequest, machine: Machine, notes: list[str]) -> Rendezvous:
    if request.num_machines > 1:
        return _far_rendezvous(request, machine)
    wanted = request.main_process_port
    if request.rdzv_backend == "static" and wanted and not machine.port_is_taken:
        return Rendezvous("static", f"127.0.0.1:{wanted}", request.rdzv_conf, "127.0.0.1")
    if wanted and machine.port_is_taken:
        notes.append(
            f"{request.describe('main_process_port')} is taken by another program: a free port is used instead."
        )
    # Port 0 is bound where it is chosen, so that any number of launches can start at the same time.
    backend = "c10d" if request.rdzv_backend == "static" else request.rdzv_backend
    port = 0 if machine.port_is_taken else wanted or 0
    return Rendezvous(backend, f"localhost:{port}", request.rdzv_conf, "127.0.0.1")


def _far_rendezvous(request: LaunchRequest, machine: Machine) -> Rendezvous:
    port = request.main_process_port or DEFAULT_PORT
    if request.machine_rank == 0 and machine.port_is_taken:
        raise LaunchError(
            explain(
                f"{request.describe('main_process_port')} is taken on this machine, where the others will look for it.",
                accepted="a free port, the same on all machines",
                remedy=f"End the program that listens there (`lsof -i :{port}`), or pass another --main_process_port.",
            )
        )
    options, known_as = dict(request.rdzv_conf), None
    if request.rdzv_backend == "c10d" and request.was_given("machine_rank"):
        # Otherwise torch compares and publishes host names, which fails where names do not resolve.
        is_host = request.machine_rank == 0
        options.setdefault("is_host", str(int(is_host)))
        known_as = request.main_process_ip if is_host else None
    return Rendezvous(request.rdzv_backend, f"{request.main_process_ip}:{port}", options, known_as)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def show(planned: LaunchPlan, request: LaunchRequest) -> str:
    """Print a plan for people, with the origin of what was asked for."""
    lines = [f"command      {' '.join(_quoted(word) for word in planned.argv)}"]
    total = planned.processes_per_node * planned.nodes
    if planned.kind == "inline":
        lines.append("processes    1, in the place of the launcher")
    else:
        lines.append(f"processes    {total}: {planned.processes_per_node} on each of {planned.nodes} machine(s)")
        lines.append(f"this machine number {planned.node_rank}")
        meeting = planned.rendezvous
        options = "".join(f" {key}={value}" for key, value in meeting.options.items())
        lines.append(f"rendezvous   {meeting.backend} at {meeting.endpoint}{options}")
    lines.append("environment")
    lines += [f"  {name}={value}" for name, value in sorted(planned.env.items())]
    lines += [f"  {name} is not passed on" for name in planned.without]
    if request.origins:
        lines.append("asked for")
        lines += [f"  {request.describe(name)}" for name in sorted(request.origins)]
    if planned.notes:
        lines.append("notes")
        lines += [f"  {note}" for note in planned.notes]
    return "\n".join(lines)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
