"""What a launch was asked to do.

Owns the precedence flag > variable > configuration file > default, the place each value came from, and the
contradictions that are refused before anything starts. Never asks the machine; imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.enums import DynamoBackend, PrecisionType
from ..core.errors import SettingError, explain
from ..core.text import str_to_bool
from ..settings.config_file import ConfigFile
from ..settings.preemption import names_of

DYNAMO_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """One launch, as asked for. `None` means that nobody said, and the plan decides."""

    script: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    no_python: bool = False
    cpu: bool = False
    multi_gpu: bool = False
    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    same_network: bool = False
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
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Field name -> where its value came from; a field without an entry has its default."""

    def was_given(self, name: str) -> bool:
        """Tell whether anybody said something about `name`."""
        return name in self.origins

    def describe(self, name: str) -> str:
        """Say a value and its origin: `num_processes=4 (from --num_processes)`."""
        return f"{name}={_printed(getattr(self, name))} ({self.origins.get(name, 'the default')})"

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
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        written = _from_file(file)
        if flags.get("multi_gpu"):
            written.pop("cpu", None)  # the flag and the file answer the same question
        for source in (written, _from_environment(environ), _from_flags(flags)):
            for name, (value, origin) in source.items():
                values[name], origins[name] = value, origin
        request = cls(script=script, script_args=script_args, origins=origins, **_in_types(values, origins))
        check(request)
        return request


Source = dict[str, tuple[Any, str]]


def _from_flags(flags: Mapping[str, Any]) -> Source:
    return {name: (value, f"from --{name}") for name, value in flags.items()}


def _threads(text: str) -> int | str:
    # OpenMP takes lists too, such as 4,2 for nested regions; what is no number is passed on as it is.
    try:
        return int(text)
    except ValueError:
        return text


_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
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


def _from_environment(environ: Mapping[str, str]) -> Source:
    found: Source = {}
    for name, (variable, parse) in _VARIABLES.items():
        text = environ.get(variable)
        if not text:
            continue
        try:
            found[name] = (parse(text), f"from the variable {variable}")
        except ValueError:
            raise SettingError(
                explain(
                    f"{variable}={text!r} in the environment cannot be read.",
                    accepted="an integer" if parse is int else "true or false",
                    remedy="Correct or unset the variable.",
                )
            ) from None
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
    _refuse_absent_engines(file)
    config = file.config
    found: Source = {}
    for key in _FILE_KEYS:
        value = getattr(config, key)
        if key in file.given and value is not None and not (key == "num_processes" and value == -1):
            found[key] = (value, f"from {file.origin(key)}")
    if config.distributed_type.value == "MULTI_CPU":
        found["cpu"] = (True, f"from {file.origin('distributed_type')}")
    elif config.distributed_type.value == "NO":
        _check_single(file)
    if config.use_cpu:
        found["cpu"] = (True, f"from {file.origin('use_cpu')}")
    for key, value in (config.dynamo_config or {}).items():
        found[key] = (value, f"from {file.origin(f'dynamo_config.{key}')}")
    return found


def _check_single(file: ConfigFile) -> None:
    if file.config.num_processes > 1:
        raise SettingError(
            explain(
                f"num_processes={file.config.num_processes} ({file.origin('num_processes')}) contradicts "
                f"distributed_type=NO ({file.origin('distributed_type')}).",
                accepted="num_processes: 1 with NO, or a type such as MULTI_GPU or MULTI_CPU",
                remedy="Change one of the two lines.",
            )
        )


_ABSENT_TYPES = {
    "FSDP": "the FSDP engine",
    "DEEPSPEED": "the DeepSpeed engine",
    "MEGATRON_LM": "the Megatron-LM engine",
    "XLA": "the XLA engine",
}

_ABSENT_KEYS = {
    "fsdp_config": "the FSDP engine",
    "deepspeed_config": "the DeepSpeed engine",
    "megatron_lm_config": "the Megatron-LM engine",
    "parallelism_config": "device meshes with several axes",
    "fp8_config": "an fp8 engine",
    "mpirun_config": "the MPI launcher",
    "downcast_bf16": "the XLA engine",
    "tpu_name": "the TPU launcher",
    "tpu_zone": "the TPU launcher",
    "tpu_use_cluster": "the TPU launcher",
    "tpu_use_sudo": "the TPU launcher",
    "tpu_vm": "the TPU launcher",
    "tpu_env": "the TPU launcher",
    "command_file": "the TPU launcher",
    "commands": "the TPU launcher",
}


def _refuse_absent_engines(file: ConfigFile) -> None:
    from ..settings.options.absent import refuse

    label = file.config.distributed_type.value
    if label in _ABSENT_TYPES:
        refuse(f"distributed_type={label} ({file.origin('distributed_type')})", _ABSENT_TYPES[label])
    for key, engine in _ABSENT_KEYS.items():
        if getattr(file.config, key):
            refuse(f"{key} ({file.origin(key)})", engine)
    if file.config.main_training_function != "main":
        name = file.config.main_training_function
        refuse(f"main_training_function={name!r} ({file.origin('main_training_function')})", "the TPU launcher")


def _in_types(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """Turn the texts of flags and files into the types of the fields."""
    typed = dict(values)
    ids = typed.get("gpu_ids")
    if isinstance(ids, str):
        typed["gpu_ids"] = None if ids.strip().lower() == "all" else tuple(part.strip() for part in ids.split(","))
    for name in ("mixed_precision", "dynamo_backend"):
        if name in typed:
            typed[name] = str(typed[name]).lower()
    if "rdzv_conf" in typed:
        typed["rdzv_conf"] = _pairs(typed["rdzv_conf"], origins["rdzv_conf"])
    return typed


def _pairs(text: str, origin: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        key, sign, value = part.partition("=")
        if not (key and sign and value):
            raise SettingError(
                explain(
                    f"rdzv_conf={text!r} cannot be read at {part!r} ({origin}).",
                    accepted="key=value pairs, separated by commas",
                    remedy="For example --rdzv_conf timeout=900,join_timeout=600",
                )
            )
        pairs[key.strip()] = value.strip()
    return pairs


# --- what is refused ---------------------------------------------------------------------------------------


def check(request: LaunchRequest) -> None:
    """Refuse values and combinations that cannot work, naming where both came from."""
    for rule in (_check_words, _check_numbers, _check_program, _check_devices, _check_machines):
        rule(request)


def _check_words(request: LaunchRequest) -> None:
    words = {
        "mixed_precision": PrecisionType.list(),
        "dynamo_backend": [name.lower() for name in DynamoBackend.list()],
        "dynamo_mode": list(DYNAMO_MODES),
    }
    for name, accepted in words.items():
        if getattr(request, name) not in accepted:
            raise SettingError(
                explain(
                    f"{request.describe(name)} is not known.",
                    accepted=accepted,
                    remedy=f"Pass --{name} {accepted[0]} for the default.",
                )
            )
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
_HIGHEST_PORT = 65535


def _check_numbers(request: LaunchRequest) -> None:
    for name, least in _MINIMUM.items():
        value = getattr(request, name)
        most = _HIGHEST_PORT if name == "main_process_port" else None
        if value is None or isinstance(value, str) or (value >= least and (most is None or value <= most)):
            continue
        raise SettingError(
            explain(
                f"{request.describe(name)} is out of range.",
                accepted=f"{least} or more" if most is None else f"{least} to {most}; 0 takes a free port",
                remedy=f"Pass another --{name}.",
            )
        )


def _check_program(request: LaunchRequest) -> None:
    if request.module and request.no_python:
        _refuse_pair(request, "module", "no_python", "a module is run by Python", "Leave one of the two out.")


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
    if request.cpu and request.origins.get("gpu_ids") == "from --gpu_ids":
        _refuse_pair(request, "gpu_ids", "cpu", "a CPU run uses no device", "Leave one of the two out.")
    if request.multi_gpu and len(request.gpu_ids) == 1 and request.num_machines == 1:
        _refuse_pair(request, "gpu_ids", "multi_gpu", f"--multi_gpu is {several}", "Name two devices, or leave it out.")
    here = -(-(request.num_processes or 1) // request.num_machines)
    if not request.cpu and here > len(request.gpu_ids):
        remedy = "Name one device for each process on this machine."
        _refuse_pair(request, "gpu_ids", "num_processes", f"{here} processes need {here} devices", remedy)


def _check_machines(request: LaunchRequest) -> None:
    if request.machine_rank >= request.num_machines:
        remedy = "Give every machine its own --machine_rank, from 0."
        _refuse_pair(request, "machine_rank", "num_machines", "ranks count from 0", remedy)
    if request.num_machines == 1:
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


def _refuse_pair(request: LaunchRequest, first: str, second: str, reason: str, remedy: str) -> None:
    raise SettingError(
        explain(f"{request.describe(first)} contradicts {request.describe(second)}: {reason}.", remedy=remedy)
    )


def _printed(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
