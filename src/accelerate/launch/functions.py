"""Run a function in several processes, from a notebook or a test.

Owns `notebook_launcher` and `debug_launcher`. Workers are forked, so the function and its arguments need not be
picklable; they learn who they are from the variables that torchrun sets.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ..core.enums import PrecisionType
from ..core.errors import SettingError, UnsupportedCombination, explain
from ..runtime import state
from ..settings import env
from ..settings.preemption import SIGNALS
from . import devices, elastic
from .machine import is_port_free, physical_cores
from .plan import DEFAULT_PORT, LaunchPlan, Rendezvous
from .report import Failure, WorkersFailed


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Run `function(*args)` in several processes, one for each device, and wait.

    With one process the function runs right here. Without an accelerator the processes share the CPU. What the
    function returns is dropped: let it save what matters.

    Args:
        function: What to run. Everything, the `Accelerator` included, is made inside it.
        args: Its arguments.
        num_processes: Processes on this machine.
        mixed_precision: The default of `Accelerator(mixed_precision=...)` inside: `no`, `fp16`, `bf16` or `fp8`.
        use_port: Port of the first machine. On a single machine 29500 stands for any free port.
        master_addr: Address of the first machine.
        node_rank: Which machine this is, of `num_nodes`.
        num_nodes: Machines that take part.
        rdzv_backend: How machines find each other: `static`, `c10d` or another name torch knows.
        rdzv_endpoint: Where they do, `host:port`; by default `master_addr:use_port`.
        rdzv_conf: Options for it.
        rdzv_id: A name that the machines of this run share.
        max_restarts: How often failed workers are started again.
        monitor_interval: Seconds between two looks at the workers.
        log_line_prefix_template: What stands before each line that torch copies from a worker.

    Raises:
        SettingError: (a `ValueError`) if an argument is wrong, or an `Accelerator` exists already.
        UnsupportedCombination: (a `ValueError`) if this process already uses the accelerator.
        WorkersFailed: (a `RuntimeError`) if a worker fails, with its rank and traceback.

    Example:
        >>> notebook_launcher(train, args=(dataset, 3), num_processes=2)  # doctest: +SKIP
    """
    if num_processes is None:
        raise _wrong("num_processes", None, "a number of processes", "Pass the number of devices to use.")
    _check_count("num_processes", num_processes)
    precision = _precision(mixed_precision)
    if not 0 <= node_rank < num_nodes:
        raise _wrong(
            "node_rank", node_rank, f"0 to {num_nodes - 1}, as num_nodes={num_nodes}", "Count machines from 0."
        )
    variables = {"ACCELERATE_MIXED_PRECISION": precision}
    if num_processes * num_nodes == 1:
        with env.applied(variables):
            function(*args)
        return
    _refuse_late_start("notebook_launcher", num_processes)
    variables |= _worker_variables(num_processes)
    plan = LaunchPlan(
        kind="elastic",
        argv=(),
        env=variables,
        nodes=num_nodes,
        node_rank=node_rank,
        processes_per_node=num_processes,
        rendezvous=_meeting(rdzv_backend, rdzv_endpoint, rdzv_conf, master_addr, int(use_port), num_nodes),
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
    )
    # Torch's own look at the devices would start the driver here, and forked workers could not use it any more.
    with env.applied({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        config = elastic.launch_config(
            plan, run_id=rdzv_id, start_method="fork", log_line_prefix=log_line_prefix_template
        )
        elastic.start(plan, _with_own_handlers(function), tuple(args), config)


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Run `function(*args)` in several processes on the CPU, to try distributed code without devices.

    Args:
        function: What to run.
        args: Its arguments.
        num_processes: How many processes.

    Raises:
        SettingError: (a `ValueError`) if an `Accelerator` exists already.
        WorkersFailed: (a `RuntimeError`) if a worker fails, with its rank and traceback.

    Example:
        >>> def check():
        ...     assert Accelerator().num_processes == 2
        >>> debug_launcher(check)  # doctest: +SKIP
    """
    _check_count("num_processes", num_processes)
    _refuse_started("debug_launcher")
    elastic.hush()
    # The store listens before the workers exist: no port can be lost between choosing and using it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = _worker_variables(num_processes) | {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        with env.applied(variables):
            start_processes(_Worker(function), args=(tuple(args),), nprocs=num_processes, start_method="fork")
    except ProcessRaisedException as error:
        failure = Failure(error.error_index, error.error_pid, 1, str(error).partition("error:\n")[2])
        raise WorkersFailed.among([failure], num_processes) from None
    except ProcessExitedException as error:
        failure = Failure(error.error_index, error.error_pid, error.exit_code)
        raise WorkersFailed.among([failure], num_processes) from None


def _with_own_handlers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let forked workers handle signals as this process does now: they inherit what the launcher sets for itself.

    Torch's handler raises, which would end a worker that is to save itself.
    """
    handlers = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, SIGNALS)}

    def work(*args: Any) -> None:
        for number, handler in handlers.items():
            if handler is not None:  # not set by Python, and nobody in Python has replaced it
                signal.signal(number, handler)
        function(*args)

    return work


class _Worker:
    """Calls the function in a forked process that knows its rank."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, rank: int, args: tuple[Any, ...]) -> None:
        with env.applied({"RANK": str(rank), "LOCAL_RANK": str(rank)}):
            self.function(*args)


def _worker_variables(processes_here: int) -> dict[str, str]:
    variables = {"FORK_LAUNCHED": "1"}
    if devices.find(env.read()).count == 0:
        variables["ACCELERATE_USE_CPU"] = "true"
    if env.get("OMP_NUM_THREADS") is None:
        variables["OMP_NUM_THREADS"] = str(max(1, physical_cores() // processes_here))
    return variables


def _meeting(
    backend: str, endpoint: str, options: Mapping[str, Any] | None, address: str, port: int, nodes: int
) -> Rendezvous:
    named = dict(options or {})
    if endpoint:
        return Rendezvous(backend, endpoint, named)
    if nodes > 1:
        return Rendezvous(backend, f"{address}:{port}", named)
    if port in (0, DEFAULT_PORT) or not is_port_free(port):
        return Rendezvous("c10d" if backend == "static" else backend, "localhost:0", named, "127.0.0.1")
    return Rendezvous(backend, f"{address}:{port}", named, "127.0.0.1")


def _refuse_late_start(launcher: str, processes: int) -> None:
    _refuse_started(launcher)
    found = devices.find(env.read())
    if found.count == 0:
        return
    if processes > found.count:
        accepted = f"at most {found.count}, the {found.name} devices visible here"
        raise _wrong("num_processes", processes, accepted, "Start fewer processes.")
    from ..hardware import named

    if named(found.name).is_initialized():
        raise UnsupportedCombination(
            explain(
                f"{launcher} cannot start {processes} processes: this process already uses {found.name}, and a forked "
                "copy of it could not.",
                accepted=f"a notebook in which no cell has touched {found.name} yet",
                remedy="Restart the kernel, and move everything that uses the device into the function.",
            )
        )


def _refuse_started(launcher: str) -> None:
    if state.is_started():
        raise SettingError(
            explain(
                f"{launcher} cannot start processes: an Accelerator or PartialState exists in this one, and the "
                "workers would take it for theirs.",
                remedy="Restart the kernel, and create the Accelerator inside the function.",
            )
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise _wrong(name, value, "1 or more", "Pass the number of devices to use.")


def _precision(value: str) -> str:
    name = str(value).lower()
    if name not in PrecisionType:
        raise _wrong("mixed_precision", value, ", ".join(PrecisionType.list()), "Pass 'no' for plain fp32.")
    return name


def _wrong(name: str, value: object, accepted: str, remedy: str) -> SettingError:
    return SettingError(explain(f"{name}={value!r} (the argument) cannot be used.", accepted=accepted, remedy=remedy))
