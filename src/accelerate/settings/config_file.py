"""The configuration file of the launcher: where it lies, what it may say, and at which line it says it.

Owns `default_config.yaml` and the classes that hold its values. Imports no torch. Read by `launch.request`, written by
`accelerate config`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.enums import ComputeEnvironment, DistributedType, SageMakerDistributedType
from ..core.errors import SettingError, explain, nearest
from ..core.text import str_to_bool
from . import config_text, env
from .config_keys import CHOICES, DYNAMO_KEYS, EXAMPLES, KINDS, LEGACY_KEYS, RETIRED, SECTIONS, WORDS, kind_of
from .config_text import SIZE_LIMIT_BYTES

__all__ = [
    "DYNAMO_KEYS",
    "SIZE_LIMIT_BYTES",
    "BaseConfig",
    "ClusterConfig",
    "ConfigFile",
    "SageMakerConfig",
    "cache_folder",
    "default_file",
    "expanded",
    "find",
    "load_config_from_file",
    "locate",
    "read",
]

NO_HOME = Path(os.sep, "nonexistent")
"""Stands for the home folder of a user who has none."""


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of this library inside the cache folder of Hugging Face.

    Where there is no home folder it lies in `NO_HOME`: nothing can be read there, and nothing may be written.
    """
    if environ.get("HF_HOME"):
        base = Path(environ["HF_HOME"])
    elif environ.get("XDG_CACHE_HOME"):
        base = Path(environ["XDG_CACHE_HOME"]) / "huggingface"
    elif environ.get("HOME") == "":  # as if it were /, where nothing of a user's belongs
        base = NO_HOME / ".cache" / "huggingface"
    else:
        base = Path("~/.cache/huggingface")
    try:
        return base.expanduser() / "accelerate"
    except RuntimeError:  # no HOME, and no entry in the list of users: containers run so
        return NO_HOME / ".cache" / "huggingface" / "accelerate"


def default_file() -> Path:
    """Return where the configuration lies when no file is named; it need not exist."""
    return cache_folder(env.read()) / "default_config.yaml"


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder, or as it is where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def locate(named: str | Path | None) -> Path:
    """Return the file that a command was given, or the default one.

    Raises:
        SettingError: (a `ValueError`) for an empty name, as an unset variable of a shell leaves it.
    """
    if named == "":
        raise SettingError(explain("--config_file is empty.", remedy="Name a file, or leave the flag out."))
    return default_file() if named is None else expanded(named)


@dataclass
class BaseConfig:
    """What every configuration file says."""

    compute_environment: ComputeEnvironment
    distributed_type: DistributedType | SageMakerDistributedType
    mixed_precision: str | None
    use_cpu: bool
    debug: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that a file would hold: enumerations as text, empty entries left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        texts = {key: getattr(value, "value", value) for key, value in values.items()}
        return {key: value for key, value in texts.items() if value is not None and value != {}}

    def to_json_file(self, json_file: str | Path) -> None:
        """Write the keys as JSON."""
        Path(json_file).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def to_yaml_file(self, yaml_file: str | Path) -> None:
        """Write the keys as YAML."""
        import yaml

        Path(yaml_file).write_text(yaml.safe_dump(self.to_dict()), encoding="utf-8")

    @classmethod
    def from_json_file(cls, json_file: str | Path | None = None) -> Any:
        """Read a file; without one, the default file."""
        return load_config_from_file(json_file)

    @classmethod
    def from_yaml_file(cls, yaml_file: str | Path | None = None) -> Any:
        """Read a file; without one, the default file."""
        return cls.from_json_file(yaml_file)


@dataclass
class ClusterConfig(BaseConfig):
    """What a file for machines of one's own says, one field per key."""

    num_processes: int = -1
    machine_rank: int = 0
    num_machines: int = 1
    gpu_ids: str | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    rdzv_backend: str | None = "static"
    same_network: bool | None = False
    main_training_function: str = "main"
    enable_cpu_affinity: bool = False
    fp8_config: dict[str, Any] | None = None
    deepspeed_config: dict[str, Any] | None = None
    fsdp_config: dict[str, Any] | None = None
    parallelism_config: dict[str, Any] | None = None
    megatron_lm_config: dict[str, Any] | None = None
    mpirun_config: dict[str, Any] | None = None
    downcast_bf16: bool = False
    tpu_name: str | None = None
    tpu_zone: str | None = None
    tpu_use_cluster: bool = False
    tpu_use_sudo: bool = False
    command_file: str | None = None
    commands: list[str] | None = None
    tpu_vm: list[str] | None = None
    tpu_env: list[str] | None = None
    dynamo_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.compute_environment = ComputeEnvironment(self.compute_environment)
        self.distributed_type = DistributedType(self.distributed_type)
        for name in KINDS["section"]:
            if getattr(self, name, {}) is None:
                setattr(self, name, {})


@dataclass
class SageMakerConfig(BaseConfig):
    """What a file for Amazon SageMaker says, one field per key."""

    ec2_instance_type: str
    iam_role_name: str
    image_uri: str | None = None
    profile: str | None = None
    region: str = "us-east-1"
    num_machines: int = 1
    gpu_ids: str = "all"
    base_job_name: str = "accelerate-sagemaker-1"
    pytorch_version: str = "1.10.2"
    transformers_version: str = "4.17.0"
    py_version: str = "py38"
    sagemaker_inputs_file: str | None = None
    sagemaker_metrics_file: str | None = None
    additional_args: dict[str, Any] | None = None
    dynamo_config: dict[str, Any] | None = None
    enable_cpu_affinity: bool = False

    def __post_init__(self) -> None:
        self.compute_environment = ComputeEnvironment(self.compute_environment)
        self.distributed_type = SageMakerDistributedType(self.distributed_type)
        for name in ("additional_args", "dynamo_config"):
            if getattr(self, name) is None:
                setattr(self, name, {})


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigFile:
    """A file that was read: its values, and where each stands."""

    path: Path
    config: ClusterConfig | SageMakerConfig
    given: frozenset[str]
    """The keys to which the file gives a value, in today's words."""
    lines: Mapping[str, int] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    """Key -> how the file writes it, where that is another word."""
    notes: tuple[str, ...] = ()
    """What is left out, in words for the user."""

    def origin(self, key: str) -> str:
        """Say where `key` stands: `mixed_precision in /home/me/config.yaml, line 7`."""
        return _place(self.path, self.written.get(key, key), self.lines)


def _place(path: Path, key: str, lines: Mapping[str, int]) -> str:
    line = lines.get(key)
    return f"{key} in {path}" + (f", line {line}" if line else "")


def load_config_from_file(config_file: str | Path | None) -> ClusterConfig | SageMakerConfig:
    """Read a configuration file; without one, the default file.

    Raises:
        FileNotFoundError: If the file does not exist.
        SettingError: (a `ValueError`) if it cannot be used.
    """
    return read(locate(config_file)).config


def find(named: str | Path | None) -> ConfigFile | None:
    """Read the file that a command was given, or else the default one, if it exists.

    Raises:
        FileNotFoundError: If the file that was given does not exist.
        SettingError: (a `ValueError`) if a file cannot be used.
    """
    path = locate(named)
    return read(path) if named is not None or os.path.isfile(path) else None


def read(path: Path) -> ConfigFile:
    """Read and check a configuration file.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it is not a configuration, names an unknown key, or a value has a wrong type.
    """
    values, lines = config_text.parse(path)
    return _Reader(path, lines).read(values)


class _Reader:
    """Checks the values of one file; every error names the key and its line."""

    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path = path
        self.lines = lines
        self.written: dict[str, str] = {}
        self.notes: list[str] = []

    def read(self, values: Mapping[str, Any]) -> ConfigFile:
        kind = self._class(values)
        known = [item.name for item in fields(kind)]
        for key in values:
            if key not in known and key not in (*LEGACY_KEYS, *RETIRED):
                raise self._unknown(key, key, known, "of a configuration file")
        translated = self._translated(values)
        self._check_type(kind, translated)
        checked = {key: self._typed(key, value) for key, value in translated.items() if value is not None}
        config = kind(**self._completed(kind, checked))
        return ConfigFile(self.path, config, frozenset(checked), self.lines, self.written, tuple(self.notes))

    def _translated(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of an old file in today's words."""
        translated = {key: value for key, value in values.items() if not self._is_retired(key)}
        half = translated.pop("fp16", None)
        if half is not None and self._scalar("fp16", half, "bool"):
            precision = translated.get("mixed_precision")
            if precision is None:
                translated["mixed_precision"], self.written["mixed_precision"] = "fp16", "fp16"
            elif precision != "fp16":
                self.notes.append(f"{self._place('fp16')} is left out: {self._place('mixed_precision')} says more.")
        backend = translated.pop("dynamo_backend", None)
        section = translated.get("dynamo_config") or {}
        for key in ("dynamo_backend", "backend"):
            if backend is not None and isinstance(section, dict) and key in section:
                raise self._twice("dynamo_backend", f"dynamo_config.{key}")
        if backend not in (None, False, "NO", "no") and isinstance(section, dict):
            translated["dynamo_config"] = {"dynamo_backend": backend, **section}
            self.written["dynamo_config.dynamo_backend"] = "dynamo_backend"
        # An unquoted NO is a boolean in YAML; people write these by hand.
        for key, word in (("distributed_type", "NO"), ("mixed_precision", "no")):
            if translated.get(key) is False:
                translated[key] = word
        return translated

    def _is_retired(self, key: str) -> bool:
        if key in RETIRED:
            self.notes.append(f"{self._place(key)} is left out: {RETIRED[key]}.")
        return key in RETIRED

    def _class(self, values: Mapping[str, Any]) -> type[ClusterConfig | SageMakerConfig]:
        environment = values.get("compute_environment", ComputeEnvironment.LOCAL_MACHINE.value)
        accepted = [item.value for item in ComputeEnvironment]
        if environment not in accepted:
            raise SettingError(
                explain(
                    f"compute_environment={_short(environment)} is not known ({self._place('compute_environment')}).",
                    accepted=accepted,
                    remedy="For your own machines write LOCAL_MACHINE.",
                )
            )
        return SageMakerConfig if environment == ComputeEnvironment.AMAZON_SAGEMAKER.value else ClusterConfig

    def _check_type(self, kind: type, values: Mapping[str, Any]) -> None:
        accepted = [item.value for item in (SageMakerDistributedType if kind is SageMakerConfig else DistributedType)]
        given = values.get("distributed_type")
        if given in accepted or (given == "TPU" and kind is ClusterConfig):
            return
        problem = "is missing" if given is None else f"has the value {_short(given)}, which is not known"
        raise SettingError(
            explain(
                f"The key distributed_type {problem} ({self._place('distributed_type')}).",
                accepted=accepted,
                remedy="For one process write 'NO'.",
            )
        )

    def _completed(self, kind: type, values: dict[str, Any]) -> dict[str, Any]:
        """Add what the class requires and a file may leave out."""
        base: dict[str, Any] = {
            "compute_environment": ComputeEnvironment.LOCAL_MACHINE,
            "mixed_precision": None,
            "use_cpu": False,
            "debug": False,
        }
        if kind is ClusterConfig and values["distributed_type"] == "NO":
            base["num_processes"] = 1
        for key in ("ec2_instance_type", "iam_role_name"):
            if kind is SageMakerConfig and key not in values:
                raise SettingError(
                    explain(f"The key {key} is missing in {self.path}.", remedy="A job on SageMaker cannot do without.")
                )
        return {**base, **values}

    def _typed(self, key: str, value: Any) -> Any:
        """Return `value` in the type of its key."""
        kind = kind_of(key)
        if kind == "section":
            if not isinstance(value, dict):
                raise self._wrong_type(key, value, WORDS[kind])
            return self._section(key, value) if key in SECTIONS else value
        if kind == "list":
            if not isinstance(value, list) or any(isinstance(item, (dict, list)) for item in value):
                raise self._wrong_type(key, value, WORDS[kind])
            return [str(item) for item in value]
        return self._word(key, key, self._scalar(key, value, kind))

    def _section(self, name: str, values: Mapping[Any, Any]) -> dict[str, Any]:
        section = SECTIONS[name]
        places: dict[str, str] = {}
        checked: dict[str, Any] = {}
        for key, value in values.items():
            place = self.written.get(f"{name}.{key}", f"{name}.{key}")
            full = section.full_name(str(key))
            if self._is_retired(place):
                continue
            if full not in section.keys:
                raise self._unknown(str(key), place, section.keys, f"of {name}", full)
            if full in places:
                raise self._twice(places[full], place)
            places[full] = place
            typed = None if value is None else self._scalar(place, value, section.keys[full])
            if name == "dynamo_config":
                checked[full] = None if typed is None else self._word(full, place, typed)
            else:
                checked[key] = value  # as it was written, so that the file is written back the same
        self.written |= {f"{name}.{full}": place for full, place in places.items()}
        return {key: value for key, value in checked.items() if name != "dynamo_config" or value is not None}

    def _scalar(self, place: str, value: Any, kind: str) -> Any:
        if kind == "anything":
            return value
        if isinstance(value, (dict, list)):
            raise self._wrong_type(place, value, WORDS.get(kind) or EXAMPLES.get(place, "text"))
        if kind.endswith(" or auto"):
            kind = kind.removesuffix(" or auto")
            if value == "auto":
                return value
        try:
            if kind == "bool":
                return bool(str_to_bool(str(value)))
            if kind == "int" and (isinstance(value, bool) or (isinstance(value, float) and value % 1)):
                raise ValueError
            if kind in ("int", "number"):
                return int(value) if kind == "int" else float(value)
        except (TypeError, ValueError):
            raise self._wrong_type(place, value, WORDS[kind]) from None
        return "no" if value is False and place.endswith("backend") else str(value)

    def _word(self, key: str, place: str, value: Any) -> Any:
        """Check a value of which there are only some."""
        accepted = CHOICES.get(key)
        if accepted is None or str(value).lower() in accepted:
            return value
        raise SettingError(
            explain(
                f"{place}={_short(value)} is not known ({self._place(place)}).{nearest(str(value), accepted)}",
                accepted=accepted,
                remedy="Correct the line.",
            )
        )

    def _place(self, key: str) -> str:
        return _place(self.path, self.written.get(key, key), self.lines)

    def _twice(self, first: str, second: str) -> SettingError:
        return SettingError(
            explain(
                f"{self._place(first)}, and {self._place(second)}, are two spellings of one key.",
                remedy="Remove one of the two lines.",
            )
        )

    def _unknown(self, key: str, place: str, known: Any, whose: str, full: str | None = None) -> SettingError:
        return SettingError(
            explain(
                f"{_short(key)} is not a key {whose} ({self._place(place)}).{nearest(full or key, known)}",
                accepted=known,
                remedy="Correct or remove the line.",
            )
        )

    def _wrong_type(self, key: str, value: Any, accepted: str) -> SettingError:
        return SettingError(
            explain(
                f"{key}={_short(value)} has a wrong type ({self._place(key)}).",
                accepted=accepted,
                remedy="Correct the line.",
            )
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
