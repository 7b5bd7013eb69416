"""Run a function in several processes, from a notebook or a test.

Owns `notebook_launcher` and `debug_launcher`. Workers learn who they are from the variables that torchrun sets. They
are forks of this process, so that the function and its arguments need not be picklable; or new interpreters, where this
process already uses an accelerator, which a fork could not.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import SettingError, UnsupportedCombination, explain
from ..runtime import state
from ..settings import env
from ..settings.arguments import PRECISION_VARIABLE
from ..settings.options.absent import refuse
from ..settings.preemption import SIGNALS
from . import cargo, devices, elastic, family, machine, worker
from .asked import ANY_PORT, FIXED, NO_NAME, NO_PRECISION, THIS_MACHINE, Asked, check_call, wrong
from .plan import LaunchPlan, on_loopback, where_to_meet
from .report import WorkersFailed
from .voices import Voices, marks

START_METHODS = ("fork", "spawn")


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = NO_PRECISION,
    use_port: str | int = ANY_PORT,
    master_addr: str = THIS_MACHINE,
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = FIXED,
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = NO_NAME,
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
    *,
    start_method: str | None = None,
    return_results: bool = False,
) -> list[Any] | None:
    """Run `function(*args)` in several processes, one for each device, and wait.

    What the processes print appears here while they run, the lines of all but this machine's first one behind
    `[rank N] `. With one process, and no `start_method`, the function runs right here. Without an accelerator, or with
    ACCELERATE_USE_CPU=true, the processes share the CPU. Arguments that change nothing in a run are told.

    Args:
        function: What to run. Everything, the `Accelerator` included, is made inside it.
        args: Its arguments.
        num_processes: Processes on this machine; by default one for each visible device, and one without any.
        mixed_precision: The default of `Accelerator(mixed_precision=...)` inside: `no`, `fp16` or `bf16`. Left out,
            ACCELERATE_MIXED_PRECISION counts.
        use_port: Port of the first machine. Left out, it is 29500, and any free port on a single machine.
        master_addr: Address of the first machine.
        node_rank: Which machine this is, of `num_nodes`.
        num_nodes: Machines that take part. The call is made on each of them.
        rdzv_backend: How machines find each other: `static`, `c10d` or another name torch knows.
        rdzv_endpoint: Where they do, `host:port`; by default `master_addr:use_port`.
        rdzv_conf: Options for it.
        rdzv_id: A name that the machines of this run share.
        max_restarts: How often failed workers are started again.
        monitor_interval: Seconds between two looks at the workers.
        log_line_prefix_template: A text before all lines instead, with `${rank}`, `${local_rank}` or `${role_name}`.
        start_method: `fork` or `spawn`. By default `fork`, and `spawn` if this process already uses an accelerator.
            New interpreters take longer to start, and need the package cloudpickle (`accelerate[notebook]`).
        return_results: Whether to return what the function returned, a list in the order of the ranks; of those on this
            machine, if there are several.

    Returns:
        The results, if they were asked for; otherwise `None`.

    Raises:
        SettingError: (a `ValueError`) if an argument is wrong, or an `Accelerator` exists already.
        UnsupportedCombination: (a `ValueError`) if forks are asked for and this process already uses the accelerator.
        MissingPackage: (an `ImportError`) if new interpreters are needed and cloudpickle is not installed.
        WrongTypeError: (a `TypeError`) if an argument is of a wrong type, or cannot be sent to new interpreters.
        WorkersFailed: (a `RuntimeError`) if a worker fails, with its rank and traceback.
        KeyboardInterrupt: If the call was interrupted. All processes have ended then.

    Example:
        >>> notebook_launcher(train, args=(dataset, 3), num_processes=2)  # doctest: +SKIP
    """
    _refuse_tpu()
    check_call(function, args, log_line_prefix_template)
    here = _one_for_each_device() if num_processes is None else num_processes
    call = Asked(
        num_processes=here, mixed_precision=mixed_precision, use_port=use_port, master_addr=master_addr,
        node_rank=node_rank, num_nodes=num_nodes, rdzv_backend=rdzv_backend, rdzv_endpoint=rdzv_endpoint,
        rdzv_conf=rdzv_conf, rdzv_id=rdzv_id, max_restarts=max_restarts, monitor_interval=monitor_interval,
    )  # fmt: skip
    in_place = here * num_nodes == 1 and start_method is None
    _tell(call.without_use(in_place=in_place))
    if in_place:
        with env.applied(call.variables(env.read())):
            value = function(*args)
        return [value] if return_results else None
    _refuse_started("notebook_launcher")
    method = _method(start_method, here)
    before_lines = marks(node_rank * here, here, log_line_prefix_template)
    return _Call(function, args, return_results, before_lines).make(_planned(call), method)


def _method(wanted: str | None, processes_here: int) -> str:
    start = choose_start(wanted, _device_in_use(processes_here), multiprocessing.get_all_start_methods())
    _tell([start.why])
    return start.method


def _planned(call: Asked) -> LaunchPlan:
    request, notes = call.request(), []
    found = machine.survey(request, env.read())
    near = on_loopback(found, _devices().count == 0) if call.num_nodes == 1 else {}
    plan = LaunchPlan(
        kind="elastic",
        argv=(),
        env=call.variables(env.read(), {**_worker_variables(call.num_processes), **found.network, **near}),
        nodes=call.num_nodes,
        node_rank=call.node_rank,
        processes_per_node=call.num_processes,
        rendezvous=where_to_meet(request, found, notes),
        run_id=request.run_id,
        max_restarts=call.max_restarts,
        monitor_interval=call.monitor_interval,
    )
    _tell(notes)
    return plan


def _tell(notes: Sequence[str]) -> None:
    for note in filter(None, notes):
        print(f"notebook_launcher: {note}")


@dataclass(frozen=True)
class _Call:
    """A function that is to run in the workers of a plan."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    returns: bool
    before_lines: tuple[str, ...]

    def make(self, plan: LaunchPlan, method: str) -> list[Any] | None:
        """Start the workers, wait for them, and return what they returned, if that was asked for."""
        with _desk(self.before_lines, self.returns) as (desk, ears):
            try:
                self._run(plan, method, desk, ears)
            except WorkersFailed as error:
                if error.status == 128 + signal.SIGINT:
                    raise KeyboardInterrupt from None  # what a notebook's stop button means everywhere
                raise
            here = plan.processes_per_node
            return desk.results(plan.node_rank * here, here) if self.returns else None

    def _run(self, plan: LaunchPlan, method: str, desk: worker.Desk, ears: Voices) -> None:
        # Torch's own look at the devices would start the driver here, and forked workers could not use it any more.
        with env.applied({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}), warnings.catch_warnings():
            # Forks begin with the notebook's sys.stderr, which need not be a file; torch would like it to be one.
            warnings.filterwarnings("ignore", message="Unable to enable fault handler")
            config = elastic.launch_config(plan, start_method=method)
            if method == "spawn":
                cargo.pack_call(self.function, self.arguments, desk.folder / worker.CALL_FILE)
                program, *words = worker.command(desk)
                elastic.start(plan, program, words, config, desk.folder)
            else:
                with worker.forks_for_work():
                    work = _fork(desk, ears, self.function)
                    elastic.start(plan, work, tuple(self.arguments), config, desk.folder)


@dataclass(frozen=True)
class Start:
    """How workers are made."""

    method: str
    why: str = ""
    """What the user is told, if it is not the usual way."""


def choose_start(asked: str | None, in_use: str | None, possible: Sequence[str]) -> Start:
    """Decide how workers are made.

    Args:
        asked: What the user asked for.
        in_use: The accelerator that this process already uses, if it does.
        possible: What this system can do, as Python names it.

    Raises:
        SettingError: (a `ValueError`) if `asked` is not known, or not possible here.
        UnsupportedCombination: (a `ValueError`) if `asked` is `fork`, and a fork could not use the accelerator.
    """
    usable = [name for name in START_METHODS if name in possible]
    if asked is not None and asked not in usable:
        raise wrong("start_method", asked, " or ".join(usable), "Leave it out.")
    if asked == "fork" and in_use is not None:
        raise UnsupportedCombination(
            explain(
                f"start_method='fork' (the argument) cannot be used: this process already uses {in_use}, and a fork of "
                "it could not.",
                accepted=f"'spawn'; or 'fork' in a notebook in which no cell has touched {in_use} yet",
                remedy="Leave it out.",
            )
        )
    if asked is not None:
        return Start(asked)
    if in_use is not None:
        return Start("spawn", f"{in_use} is in use in this process, so the function runs in new interpreters (spawn).")
    if "fork" not in usable:
        return Start("spawn", "this system cannot fork, so the function runs in new interpreters (spawn).")
    return Start("fork")


def debug_launcher(
    function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2, *, return_results: bool = False
) -> list[Any] | None:
    """Run `function(*args)` in several processes on the CPU, to try distributed code without devices.

    The processes are forks of this one. What they print appears here while they run, the lines of all but the first
    behind `[rank N] `. They compute in float32 unless the function asks for another precision: a test shall not depend
    on ACCELERATE_MIXED_PRECISION.

    Args:
        function: What to run.
        args: Its arguments.
        num_processes: How many processes.
        return_results: Whether to return what the function returned, a list in the order of the ranks.

    Returns:
        The results, if they were asked for; otherwise `None`.

    Raises:
        SettingError: (a `ValueError`) if an `Accelerator` exists already, or there is no process to start.
        WrongTypeError: (a `TypeError`) if an argument is of a wrong type.
        WorkersFailed: (a `RuntimeError`) if a worker fails, with its rank and traceback.
        KeyboardInterrupt: If the call was interrupted. All processes have ended then.

    Example:
        >>> def check():
        ...     assert Accelerator().num_processes == 2
        >>> debug_launcher(check)  # doctest: +SKIP
    """
    check_call(function, args)
    _refuse_started("debug_launcher")
    call = Asked(num_processes=num_processes, monitor_interval=_DEBUG_INTERVAL_SECONDS)
    with env.applied({"ACCELERATE_USE_CPU": "true", PRECISION_VARIABLE: "no"}):
        return _Call(function, args, return_results, marks(0, num_processes)).make(_planned(call), "fork")


_DEBUG_INTERVAL_SECONDS = 0.02
"""Tests are short: their end is looked for more often."""


@contextmanager
def _desk(before_lines: tuple[str, ...], returns: bool) -> Iterator[tuple[worker.Desk, Voices]]:
    with tempfile.TemporaryDirectory(prefix="accelerate-notebook-", ignore_cleanup_errors=True) as folder:
        desk = worker.Desk(Path(folder), returns)
        with Voices(desk.folder, before_lines) as ears:
            yield desk, ears


def _fork(desk: worker.Desk, ears: Voices, function: Callable[..., Any]) -> Callable[..., None]:
    """Return what a forked worker runs: the function, with this process's handlers and not the launcher's.

    Torch's handlers raise, which would end a worker that is to save itself.
    """
    numbers = (signal.SIGINT, *map(signal.Signals.__getitem__, SIGNALS))
    handlers = {number: signal.getsignal(number) for number in numbers}

    def begin(*args: Any) -> None:
        family.lead()
        for number, handler in handlers.items():
            if handler is not None:  # not set by Python, and nobody in Python has replaced it
                signal.signal(number, handler)
        ears.forget()
        worker.work(desk, lambda: (function, args))

    return begin


def _worker_variables(processes_here: int) -> dict[str, str]:
    variables = {"FORK_LAUNCHED": "1"}
    if _devices().count == 0:
        variables["ACCELERATE_USE_CPU"] = "true"
    if env.get("OMP_NUM_THREADS") is None:
        variables["OMP_NUM_THREADS"] = str(max(1, machine.physical_cores() // processes_here))
    return variables


def _devices() -> devices.Devices:
    environ = env.read()
    return devices.NONE if env.flag(environ, "ACCELERATE_USE_CPU") else devices.find(environ)


def _one_for_each_device() -> int:
    found = _devices()
    what = f"{found.count} {found.name} device(s) are visible" if found.count else "no accelerator is visible"
    number = max(1, found.count)
    print(f"notebook_launcher: {what}, so num_processes={number}.")
    return number


def _device_in_use(processes: int) -> str | None:
    """Return the name of the accelerator if this process uses it already; refuse more processes than there are devices."""
    found = _devices()
    if found.count == 0:
        return None
    if processes > found.count:
        accepted = f"at most {found.count}, the {found.name} devices visible here"
        raise wrong("num_processes", processes, accepted, "Start fewer processes.")
    from ..hardware import named

    return found.name if named(found.name).is_initialized() else None


_TPU_VARIABLES = ("COLAB_TPU_ADDR", "TPU_NAME", "TPU_WORKER_ID")
"""What notebook services set on machines with TPUs, which have no other accelerator."""


def _refuse_tpu() -> None:
    environ = env.read()
    named = next((name for name in _TPU_VARIABLES if name in environ), None)
    if environ.get("PJRT_DEVICE", "").upper() == "TPU":
        refuse("notebook_launcher with PJRT_DEVICE=TPU (in the environment)", "the TPU launcher")
    if named is not None and devices.find(environ).count == 0:
        refuse(f"notebook_launcher on a TPU machine ({named} is in the environment)", "the TPU launcher")


def _refuse_started(launcher: str) -> None:
    if state.is_started():
        raise SettingError(
            explain(
                f"{launcher} cannot start processes: an Accelerator or PartialState exists in this one, and the "
                "workers would take it for theirs.",
                remedy="Restart the kernel, and create the Accelerator inside the function.",
            )
        )
