"""What a launch was asked to do.

Owns the precedence flag > variable > configuration file > default, the place each value came from, and the
contradictions that are refused before anything starts. Never asks the machine; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from ..core import engines
from ..core.enums import PrecisionType
from ..core.errors import SettingError, explain
from ..core.text import is_host, str_to_bool
from ..settings import variables
from ..settings.config_file import ClusterConfig, ConfigFile, SageMakerConfig
from ..settings.config_keys import CHOICES
from ..settings.options.absent import refuse
from ..settings.preemption import names_of
from . import clusters, deepspeed, devices, registry, streams, torchrun
from .clusters import Place
from .source import Source, over
from .torchrun import AGENT_FIELDS

OF_AGENT = (
    "grace_seconds", "local_addr", "log_dir", "max_restarts", "monitor_interval", "rdzv_backend", "rdzv_conf", "role",
    "run_id", "standalone", "tee", *AGENT_FIELDS,
)  # fmt: skip
"""The settings that torch's agent carries out, which starts processes, watches them and keeps their output."""


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """One launch, as asked for. `None` means that nobody said, and the plan decides."""

    script: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    no_python: bool = False
    run_path: bool = False
    cpu: bool = False
    multi_gpu: bool = False
    num_processes: int | None = None
    processes_per_machine: int | str | None = None
    """The same for one machine; `auto`, `gpu` and `cpu` count what this one has."""
    num_machines: int = 1
    min_machines: int | None = None
    """With how many machines the run may begin, and go on, where their number may change."""
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    same_network: bool = False
    standalone: bool = False
    local_addr: str | None = None
    run_id: str | None = None
    mpirun_hostfile: str | None = None
    deepspeed_hostfile: str | None = None
    deepspeed_inclusion_filter: str | None = None
    deepspeed_exclusion_filter: str | None = None
    deepspeed_multinode_launcher: str | None = None
    gpu_ids: tuple[str, ...] | None = None
    mixed_precision: str = "no"
    gradient_accumulation_steps: int | None = None
    num_cpu_threads_per_process: int | str | None = None
    enable_cpu_affinity: bool = False
    dynamo_backend: str = "no"
    dynamo_mode: str = "default"
    dynamo_use_fullgraph: bool = False
    dynamo_use_dynamic: bool | None = None
    dynamo_use_regional_compilation: bool = False
    debug: bool = False
    quiet: bool = False
    rdzv_backend: str = "static"
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    resume: str = "off"
    save_on_signals: str | None = None
    grace_seconds: int | None = None
    max_restarts: int = 0
    monitor_interval: float = 0.1
    tee: str = "0"
    log_dir: str | None = None
    role: str = "default"
    start_method: str | None = None
    event_log_handler: str | None = None
    numa_binding: str | None = None
    signals_to_handle: str | None = None
    duplicate_stdout_filters: str | None = None
    duplicate_stderr_filters: str | None = None
    virtual_local_rank: bool = False
    redirects: str | None = None
    local_ranks_filter: str | None = None
    logs_specs: str | None = None
    place: Place | None = field(default=None, compare=False)
    """Where the launcher was started, if the environment says so and the flags do not ask for something else."""
    hidden: tuple[str, ...] = field(default=(), compare=False)
    """The variables of a place that the flags leave aside."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was decided between sources that contradict each other, in words for the user."""
    several: str = field(default="", compare=False)
    """The line of the file by which several processes are asked for."""
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Field name -> where its value came from; a field without an entry has its default."""

    def was_given(self, name: str) -> bool:
        """Tell whether anybody said something about `name`."""
        return name in self.origins

    def origin(self, name: str) -> str:
        """Say where the value of `name` came from."""
        return self.origins.get(name, "the default")

    def is_for_this_run(self, name: str) -> bool:
        """Tell whether a flag or a variable said something about `name`; a file speaks for all runs."""
        return self.origin(name).startswith(("from --", "from the variable"))

    def is_usual(self, name: str) -> bool:
        """Tell whether `name` has the value that it has where nobody says anything."""
        usual = _FIELDS[name]
        return getattr(self, name) == (usual.default if usual.default is not MISSING else {})

    @property
    def of_agent(self) -> tuple[str, ...]:
        """The settings that only torch's agent can carry out, as far as they ask for something.

        A file names the way to meet for all runs, those included that have no need to.
        """
        asked = (name for name in OF_AGENT if not self.is_usual(name))
        return tuple(name for name in asked if name != "rdzv_backend" or self.is_for_this_run(name))

    @property
    def deepspeed(self) -> str | None:
        """The setting that asks for DeepSpeed's launcher, if one does."""
        return deepspeed.asked_by(vars(self))

    @property
    def agent(self) -> dict[str, Any]:
        """The options of torch's agent that were given, by their names there."""
        return {name: getattr(self, name) for name in AGENT_FIELDS if self.was_given(name)}

    def describe(self, name: str) -> str:
        """Say a value and its origin: `num_processes=4 (from --num_processes)`."""
        return f"{name}={printed(self.shown(name))} ({self.origin(name)})"

    def shown(self, name: str) -> Any:
        """Return a value as it is printed: devices that were not picked from are `all`."""
        value = getattr(self, name)
        return "all" if value is None and self.was_given(name) else value

    @classmethod
    def merge(
        cls,
        flags: Mapping[str, Any],
        file: ConfigFile | None,
        environ: Mapping[str, str],
        *,
        script: str,
        script_args: tuple[str, ...] = (),
    ) -> LaunchRequest:
        """Put together what the command line, the environment and a configuration file ask for.

        Args:
            flags: The flags that were given, by field name. Flags left at their default are absent.
            file: The configuration file, if one is in use.
            environ: The environment of the launcher.
            script: The script, module or program to run.
            script_args: What it is given.

        Raises:
            SettingError: (a `ValueError`) for a value that is not accepted, or for two that contradict each other.
            UnsupportedCombination: (a `ValueError`) for a setting whose engine this version does not have.
        """
        variables.refuse_absent(environ)
        written = _from_file(file)
        if flags.get("multi_gpu"):
            written.pop("cpu", None)  # the flag and the file answer the same question
        asked = over(_from_environment(environ), torchrun.in_our_words(_from_flags(flags)))
        standing = clusters.weigh(clusters.find(environ), written, asked)
        values = {name: value for name, (value, _) in standing.source.items()}
        origins = {name: origin for name, (_, origin) in standing.source.items()}
        request = cls(
            script=script,
            script_args=script_args,
            place=standing.place,
            hidden=standing.hidden,
            notes=(*(file.notes if file else ()), *standing.notes),
            several=_several(file),
            origins=origins,
            **_in_types(values, origins),
        )
        check(request)
        return request


_FIELDS = LaunchRequest.__dataclass_fields__


def _from_flags(flags: Mapping[str, Any]) -> Source:
    return {name: (value, f"from --{name}") for name, value in flags.items()}


def _threads(text: str) -> int | str:
    # OpenMP takes lists too, such as 4,2 for nested regions; what is no number is passed on as it is.
    try:
        return int(text)
    except ValueError:
        return text


_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "num_processes": ("ACCELERATE_NUM_PROCESSES", int),
    "cpu": ("ACCELERATE_USE_CPU", lambda text: bool(str_to_bool(text))),
    "mixed_precision": ("ACCELERATE_MIXED_PRECISION", str),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", int),
    "num_cpu_threads_per_process": ("OMP_NUM_THREADS", _threads),
    "enable_cpu_affinity": ("ACCELERATE_CPU_AFFINITY", lambda text: bool(str_to_bool(text))),
    "resume": ("ACCELERATE_RESUME", str),
    "save_on_signals": ("ACCELERATE_SAVE_ON_SIGNALS", str),
    "debug": ("ACCELERATE_DEBUG_MODE", lambda text: bool(str_to_bool(text))),
    "dynamo_backend": ("ACCELERATE_DYNAMO_BACKEND", str),
    "dynamo_mode": ("ACCELERATE_DYNAMO_MODE", str),
    "dynamo_use_fullgraph": ("ACCELERATE_DYNAMO_USE_FULLGRAPH", lambda text: bool(str_to_bool(text))),
    "dynamo_use_dynamic": ("ACCELERATE_DYNAMO_USE_DYNAMIC", lambda text: bool(str_to_bool(text))),
    "dynamo_use_regional_compilation": (
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
        lambda text: bool(str_to_bool(text)),
    ),
}
"""Field -> the variable that sets it, and how its text is read."""

FIELD_OF = {variable: name for name, (variable, _) in _VARIABLES.items()}
"""The other way round."""


def _from_environment(environ: Mapping[str, str]) -> Source:
    found: Source = {}
    for name, (variable, parse) in _VARIABLES.items():
        text = environ.get(variable)
        if not text:
            continue
        try:
            found[name] = (parse(text), f"from the variable {variable}")
        except ValueError:
            accepted = "an integer" if parse is int else "true or false"
            raise variables.unreadable(variable, text, accepted) from None
    return found


_FILE_KEYS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "same_network",
    "gpu_ids",
    "mixed_precision",
    "enable_cpu_affinity",
    "debug",
    "rdzv_backend",
)


def _from_file(file: ConfigFile | None) -> Source:
    if file is None:
        return {}
    config = _own_machines(file)
    _refuse_absent_engines(file, config)
    found: Source = {}
    for key in _FILE_KEYS:
        value = getattr(config, key)
        if key in file.given and value is not None and not (key == "num_processes" and value == -1):
            found[key] = (value, f"from {file.origin(key)}")
    if config.num_machines == 1 and config.machine_rank == 0:
        # Such files are copied to all machines. Of several, they do not say that each is the first one.
        found.pop("machine_rank", None)
    if "use_cpu" in file.given:
        found["cpu"] = (config.use_cpu, f"from {file.origin('use_cpu')}")
    if config.distributed_type.value == "MULTI_CPU" and not config.use_cpu:
        found["cpu"] = (True, f"from {file.origin('distributed_type')}")
    elif config.distributed_type.value == "NO":
        _check_single(file, config)
        found.setdefault("num_processes", (1, f"from {file.origin('distributed_type')}"))
    hosts = (config.mpirun_config or {}).get("mpirun_hostfile")
    if hosts:
        found["mpirun_hostfile"] = (hosts, f"from {file.origin('mpirun_config.mpirun_hostfile')}")
    for key, value in (config.deepspeed_config or {}).items():
        if value:
            found[key] = (value, f"from {file.origin(f'deepspeed_config.{key}')}")
    for key, value in (config.dynamo_config or {}).items():
        found[key] = (value, f"from {file.origin(f'dynamo_config.{key}')}")
    return found


def _several(file: ConfigFile | None) -> str:
    if file is None or not (kind := file.config.distributed_type.value).startswith("MULTI_"):
        return ""
    return f"distributed_type={kind} (from {file.origin('distributed_type')})"


def _own_machines(file: ConfigFile) -> ClusterConfig:
    if isinstance(file.config, SageMakerConfig):
        refuse(f"compute_environment=AMAZON_SAGEMAKER ({file.origin('compute_environment')})", engines.SAGEMAKER)
    return file.config


def _check_single(file: ConfigFile, config: ClusterConfig) -> None:
    if config.num_processes > 1:
        raise SettingError(
            explain(
                f"num_processes={config.num_processes} ({file.origin('num_processes')}) contradicts "
                f"distributed_type=NO ({file.origin('distributed_type')}).",
                accepted="num_processes: 1 with NO, or a type such as MULTI_GPU or MULTI_CPU",
                remedy="Change one of the two lines.",
            )
        )


_ABSENT_TYPES = {
    "FSDP": engines.FSDP,
    "DEEPSPEED": engines.DEEPSPEED,
    "MEGATRON_LM": engines.MEGATRON,
    "XLA": engines.XLA,
}

_ABSENT_KEYS = {
    "fsdp_config": engines.FSDP,
    "megatron_lm_config": engines.MEGATRON,
    "parallelism_config": engines.MESH,
    "fp8_config": engines.FP8,
    "downcast_bf16": engines.XLA,
    "tpu_name": engines.TPU,
    "tpu_zone": engines.TPU,
    "tpu_use_cluster": engines.TPU,
    "tpu_use_sudo": engines.TPU,
    "tpu_vm": engines.TPU,
    "tpu_env": engines.TPU,
    "command_file": engines.TPU,
    "commands": engines.TPU,
}


def _refuse_absent_engines(file: ConfigFile, config: ClusterConfig) -> None:
    label = config.distributed_type.value
    if label in _ABSENT_TYPES:
        refuse(f"distributed_type={label} ({file.origin('distributed_type')})", _ABSENT_TYPES[label])
    for key, engine in _ABSENT_KEYS.items():
        if getattr(config, key):
            refuse(f"{key} ({file.origin(key)})", engine)
    for key, value in (config.deepspeed_config or {}).items():
        if value is not None and key not in deepspeed.SETTINGS:
            refuse(f"{key} ({file.origin(f'deepspeed_config.{key}')})", engines.DEEPSPEED)
    if config.main_training_function != "main":
        name = config.main_training_function
        refuse(f"main_training_function={name!r} ({file.origin('main_training_function')})", engines.TPU)


def _in_types(values: Mapping[str, Any], origins: dict[str, str]) -> dict[str, Any]:
    """Turn the texts of flags and files into the types of the fields."""
    typed = dict(values)
    ids = typed.get("gpu_ids")
    if isinstance(ids, str):
        typed["gpu_ids"] = None if ids.strip().lower() == "all" else tuple(part.strip() for part in ids.split(","))
    for name in ("mixed_precision", "dynamo_backend"):
        if name in typed:
            typed[name] = str(typed[name]).lower()
    per_machine = typed.get("processes_per_machine")
    if isinstance(per_machine, int):
        total = per_machine * typed.get("num_machines", 1)
        if typed.get("num_processes", total) != total:
            raise SettingError(
                explain(
                    f"num_processes={typed['num_processes']} ({origins['num_processes']}) contradicts {per_machine} on each "
                    f"of {typed.get('num_machines', 1)} machine(s) ({origins['processes_per_machine']}).",
                    remedy="Leave one of the two out.",
                )
            )
        typed["num_processes"], origins["num_processes"] = total, origins["processes_per_machine"]
    for name in ("mpirun_hostfile", "deepspeed_hostfile"):
        if typed.get(name) is not None:
            typed[name] = os.path.expanduser(str(typed[name]))
    if "rdzv_conf" in typed:
        typed["rdzv_conf"] = torchrun.read_pairs(typed["rdzv_conf"], origins["rdzv_conf"])
    return typed


# --- what is refused ---------------------------------------------------------------------------------------


def check(request: LaunchRequest) -> None:
    """Refuse values and combinations that cannot work, naming where both came from."""
    rules = (
        _check_words, _check_numbers, _check_program, _check_counts, _check_devices, _check_alone, _check_machines,
        _check_watched,
    )  # fmt: skip
    for rule in rules:
        rule(request)
    torchrun.check_agent(request.agent, request.origins)
    if request.rdzv_backend in registry.OWN_BACKENDS:
        registry.check_options(request.rdzv_conf, request.origin("rdzv_conf"))
    streams.check(vars(request), request.origins)


def _check_words(request: LaunchRequest) -> None:
    for name, accepted in CHOICES.items():
        if getattr(request, name) not in accepted:
            raise SettingError(
                explain(
                    f"{request.describe(name)} is not known.",
                    accepted=accepted,
                    remedy=f"Pass --{name} {accepted[0]} for the default.",
                )
            )
    for name in ("main_process_ip", "local_addr"):
        if getattr(request, name) and not is_host(getattr(request, name)):
            accepted = "an address or a host name"
            raise SettingError(explain(f"{request.describe(name)} is no address.", accepted=accepted))
    if request.mixed_precision == PrecisionType.FP8.value:
        refuse(request.describe("mixed_precision"), engines.FP8)
    if request.save_on_signals is not None:
        names_of(request.save_on_signals, request.origins["save_on_signals"])


_MINIMUM = {
    "num_processes": 1,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "gradient_accumulation_steps": 1,
    "num_cpu_threads_per_process": 1,
    "grace_seconds": 0,
    "max_restarts": 0,
    "monitor_interval": 0.001,
}
MOST = 1_000_000
"""The largest number that a launch takes for anything."""
_HIGHEST_PORT = 65535


def _check_numbers(request: LaunchRequest) -> None:
    for name, least in _MINIMUM.items():
        value = getattr(request, name)
        most, also = (_HIGHEST_PORT, "; 0 takes a free port") if name == "main_process_port" else (MOST, "")
        if value is None or isinstance(value, str) or least <= value <= most:
            continue
        raise SettingError(
            explain(
                f"{request.describe(name)} is out of range.",
                accepted=f"{least} to {most}{also}",
                remedy=f"Pass another --{name}.",
            )
        )


def _check_program(request: LaunchRequest) -> None:
    pairs = (
        ("module", "no_python", "a module is run by Python"),
        ("run_path", "no_python", "runpy is Python's"),
        ("run_path", "module", "a module has no path"),
    )
    for first, second, reason in pairs:
        if getattr(request, first) and getattr(request, second):
            _refuse_pair(request, first, second, reason, "Leave one of the two out.")


def _check_counts(request: LaunchRequest) -> None:
    words = request.processes_per_machine
    if isinstance(words, str) and request.num_processes is not None:
        reason = "one is a number, the other asks this machine for one"
        _refuse_pair(request, "processes_per_machine", "num_processes", reason, "Leave one of the two out.")
    if words == "gpu" and request.cpu:
        _refuse_pair(request, "processes_per_machine", "cpu", "a CPU run uses no device", "Leave one of the two out.")


def _check_alone(request: LaunchRequest) -> None:
    """Refuse what contradicts a run on this machine only, or a run on a number of machines that changes."""
    if request.standalone:
        for name in ("num_machines", "main_process_ip", "main_process_port", "rdzv_backend"):
            if not request.is_usual(name):
                reason = "a run on this machine only meets on a port of its own"
                _refuse_pair(request, "standalone", name, reason, "Leave one of the two out.")
    # Every file that `accelerate config` writes says static, which the plan changes where it has to.
    said = request.is_for_this_run("rdzv_backend")
    if request.min_machines is not None and request.rdzv_backend == "static" and said:
        remedy = "Pass --rdzv_backend c10d, by which machines can come and go."
        _refuse_pair(request, "min_machines", "rdzv_backend", "`static` waits for a fixed number", remedy)


def _check_devices(request: LaunchRequest) -> None:
    several = "to ask for several devices"
    asked_by_flag = request.origins.get("cpu") == "from --cpu"
    # ACCELERATE_USE_CPU with --multi_gpu and a number is how several CPU processes were once asked for.
    if request.cpu and request.multi_gpu and (asked_by_flag or request.num_processes is None):
        _refuse_pair(request, "cpu", "multi_gpu", "one asks for no device", "Leave one of the two out.")
    if request.multi_gpu and request.num_processes == 1:
        remedy = "Pass --num_processes 2 or more, or leave --multi_gpu out."
        _refuse_pair(request, "multi_gpu", "num_processes", f"--multi_gpu is {several}", remedy)
    if request.gpu_ids is None:
        return
    devices.check_ids(request.gpu_ids, request.describe("gpu_ids"))
    if request.cpu and request.origins.get("gpu_ids") == "from --gpu_ids":
        _refuse_pair(request, "gpu_ids", "cpu", "a CPU run uses no device", "Leave one of the two out.")
    if request.multi_gpu and len(request.gpu_ids) == 1 and request.num_machines == 1:
        _refuse_pair(request, "gpu_ids", "multi_gpu", f"--multi_gpu is {several}", "Name two devices, or leave it out.")
    here = -(-(request.num_processes or 1) // request.num_machines)
    if request.place is not None and request.place.process is not None:
        here = request.place.process.local_world_size
    spread = request.mpirun_hostfile is not None and not request.was_given("num_machines")  # as the file has it
    if not request.cpu and here > len(request.gpu_ids) and not spread:
        remedy = "Name one device for each process on this machine."
        _refuse_pair(request, "gpu_ids", "num_processes", f"{here} processes need {here} devices", remedy)


def _check_machines(request: LaunchRequest) -> None:
    if request.deepspeed is not None:
        changed = {
            name: value for name, value in vars(request).items() if name in _FIELDS and not request.is_usual(name)
        }
        deepspeed.check(request.deepspeed, changed, request.describe)
        return
    is_task = request.place is not None and request.place.process is not None
    if request.machine_rank >= request.num_machines and not is_task:
        remedy = "Give every machine its own --machine_rank, from 0."
        _refuse_pair(request, "machine_rank", "num_machines", "ranks count from 0", remedy)
    if request.mpirun_hostfile is not None:
        _check_mpirun(request)
        return
    if request.num_machines == 1 or is_task:
        return
    if not request.main_process_ip:
        raise SettingError(
            explain(
                f"{request.describe('num_machines')} needs the address of the first machine: main_process_ip is unset.",
                accepted="an address or host name that all machines reach",
                remedy="Pass --main_process_ip, or write the key main_process_ip into the configuration file.",
            )
        )
    if request.main_process_port == 0:
        remedy = "Pass a fixed port, the same on all machines."
        _refuse_pair(request, "main_process_port", "num_machines", "the other machines must know the port", remedy)
    if request.num_processes is not None and request.num_processes % request.num_machines:
        remedy = "Pass a multiple of the number of machines: num_processes counts the processes of all of them."
        _refuse_pair(request, "num_processes", "num_machines", "every machine runs the same number", remedy)


def _check_mpirun(request: LaunchRequest) -> None:
    if request.num_processes is None:
        raise SettingError(
            explain(
                f"{request.describe('mpirun_hostfile')} asks for mpirun, and nothing says how many processes it shall start.",
                remedy="Pass --num_processes: the processes on all hosts together.",
            )
        )
    if request.num_processes % request.num_machines:
        remedy = "Pass a multiple of the number of machines: num_processes counts the processes of all of them."
        _refuse_pair(request, "num_processes", "num_machines", "every machine runs the same number", remedy)


def _check_watched(request: LaunchRequest) -> None:
    """Refuse what only torch's agent does where something else starts the processes."""
    process = request.place.process if request.place is not None else None
    starter = "mpirun_hostfile" if request.mpirun_hostfile else request.deepspeed
    for name in request.of_agent if starter or process else ():
        if starter:
            program = "mpirun" if request.mpirun_hostfile else "DeepSpeed's launcher"
            remedy = f"Leave one of the two out; {program} has options of its own."
            _refuse_pair(request, name, starter, f"{program} starts the processes, not torch", remedy)
        elif process:
            here = f"{process.local_world_size} on this machine"
            raise SettingError(
                explain(
                    f"{request.describe(name)} cannot be done: this task is one of {process.world_size} processes "
                    f"({request.origin('num_processes')}), {here}, and nothing of ours watches it.",
                    remedy="Start one task on each machine (with SLURM: --ntasks-per-node=1), or leave it out.",
                )
            )


def _refuse_pair(request: LaunchRequest, first: str, second: str, reason: str, remedy: str) -> None:
    raise SettingError(
        explain(f"{request.describe(first)} contradicts {request.describe(second)}: {reason}.", remedy=remedy)
    )


def printed(value: Any) -> str:
    """Return a value as messages show it."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(value) if isinstance(value, (tuple, list)) else str(value)
