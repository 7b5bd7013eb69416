"""The configuration file of the launcher: where it lies, what it may say, and at which line it says it.

Owns `default_config.yaml`. Imports no torch, and yaml only when a file is read or written. Read by `launch.request`,
written by `accelerate config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..core.enums import ComputeEnvironment, DistributedType
from ..core.errors import SettingError, explain, nearest
from ..core.text import str_to_bool
from . import env

SIZE_LIMIT_BYTES = 1 << 20
"""A larger file is not a configuration."""

DYNAMO_KEYS = (
    "dynamo_backend",
    "dynamo_mode",
    "dynamo_use_fullgraph",
    "dynamo_use_dynamic",
    "dynamo_use_regional_compilation",
)
"""What `dynamo_config` may hold; the prefix may be left out."""

_LEGACY_KEYS = ("fp16", "dynamo_backend")
"""Keys of old files that are translated while reading."""


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of this library inside the cache folder of Hugging Face."""
    if environ.get("HF_HOME"):
        base = Path(environ["HF_HOME"])
    elif environ.get("XDG_CACHE_HOME"):
        base = Path(environ["XDG_CACHE_HOME"]) / "huggingface"
    else:
        base = Path("~/.cache/huggingface")
    return base.expanduser() / "accelerate"


def default_file() -> Path:
    """Return where the configuration lies when no file is named; it need not exist."""
    return cache_folder(env.read()) / "default_config.yaml"


@dataclass
class ClusterConfig:
    """What a configuration file says, one field per key."""

    compute_environment: ComputeEnvironment
    distributed_type: DistributedType
    mixed_precision: str | None
    use_cpu: bool
    debug: bool
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
        for name in _KINDS["dict"]:
            if getattr(self, name) is None:
                setattr(self, name, {})

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
    def from_json_file(cls, json_file: str | Path | None = None) -> ClusterConfig:
        """Read a file; without one, the default file."""
        return read(Path(json_file) if json_file is not None else default_file()).config

    @classmethod
    def from_yaml_file(cls, yaml_file: str | Path | None = None) -> ClusterConfig:
        """Read a file; without one, the default file."""
        return cls.from_json_file(yaml_file)


_KINDS: dict[str, tuple[str, ...]] = {
    "bool": (
        "use_cpu", "debug", "same_network", "enable_cpu_affinity", "downcast_bf16", "tpu_use_cluster", "tpu_use_sudo",
    ),
    "int": ("num_processes", "machine_rank", "num_machines", "main_process_port"),
    "dict": (
        "fp8_config", "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config", "mpirun_config",
        "dynamo_config",
    ),
    "list": ("commands", "tpu_vm", "tpu_env"),
}  # fmt: skip
"""The keys that are not text."""


@dataclass(frozen=True)
class ConfigFile:
    """A file that was read: its values, and where each stands."""

    path: Path
    config: ClusterConfig
    given: frozenset[str]
    """The keys that the file holds."""
    lines: Mapping[str, int] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Say where `key` stands: `mixed_precision in /home/me/config.yaml, line 7`."""
        return _place(self.path, key, self.lines)


def _place(path: Path, key: str, lines: Mapping[str, int]) -> str:
    line = lines.get(key)
    return f"{key} in {path}" + (f", line {line}" if line else "")


def read(path: Path) -> ConfigFile:
    """Read and check a configuration file.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it is not a configuration, names an unknown key, or a value has a wrong type.
    """
    values, lines = _parse(path)
    known = [item.name for item in fields(ClusterConfig)]
    for key in values:
        if key not in known and key not in _LEGACY_KEYS:
            raise SettingError(
                explain(
                    f"{key!r} is not a key of a configuration file ({_place(path, key, lines)}).{nearest(key, known)}",
                    accepted=f"the keys that `accelerate config default` writes, and {', '.join(_KINDS['dict'])}",
                    remedy="Correct or remove the line.",
                )
            )
    given = frozenset(values)
    values = _translate_legacy(values)
    _check_environment(path, values, lines)
    checked = {key: _typed(path, key, value, lines) for key, value in values.items() if value is not None}
    return ConfigFile(path, ClusterConfig(**_completed(checked)), given, lines)


def load_config_from_file(config_file: str | Path | None) -> ClusterConfig:
    """Read a configuration file; without one, the default file.

    Raises:
        FileNotFoundError: If the file does not exist.
        SettingError: (a `ValueError`) if it cannot be used.
    """
    return read(Path(config_file) if config_file is not None else default_file()).config


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the top-level values, and the line of every key (`dynamo_config.dynamo_mode` for nested ones)."""
    if not path.is_file():
        raise FileNotFoundError(
            explain(
                f"The configuration file {path} does not exist.",
                remedy="Write one with `accelerate config default --config_file FILE`, or leave --config_file out.",
            )
        )
    if path.stat().st_size > SIZE_LIMIT_BYTES:
        raise SettingError(
            explain(
                f"{path} has {path.stat().st_size} bytes, which is too large for a configuration file.",
                accepted=f"at most {SIZE_LIMIT_BYTES} bytes",
                remedy="Pass the file that `accelerate config` wrote.",
            )
        )
    try:
        text = path.read_text(encoding="utf-8")
        values, lines = _parse_json(text) if path.suffix == ".json" else _parse_yaml(path, text)
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        _refuse_text(path, str(error))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        _refuse_text(path, "it does not hold `key: value` lines")
    return values, lines


def _refuse_text(path: Path, reason: str) -> NoReturn:
    raise SettingError(
        explain(
            f"{path} is not a configuration file: {reason}.",
            accepted="YAML, or JSON in a file whose name ends with .json",
            remedy="See what `accelerate config default` writes.",
        )
    )


def _parse_json(text: str) -> tuple[Any, dict[str, int]]:
    values = json.loads(text)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for key in re.findall(r'"([A-Za-z0-9_]+)"\s*:', line):
            lines.setdefault(key, number)
    return values, lines


def _parse_yaml(path: Path, text: str) -> tuple[Any, dict[str, int]]:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        _note_lines(path, node, "", lines)
        return (loader.construct_document(node) if node is not None else None), lines
    except (yaml.YAMLError, RecursionError) as error:
        _refuse_text(path, " ".join(str(error).split()) or "it is nested too deeply")
    finally:
        loader.dispose()


def _note_lines(path: Path, node: Any, prefix: str, lines: dict[str, int]) -> None:
    if type(node).__name__ != "MappingNode":
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            _refuse_text(path, f"{key!r} stands at line {lines[key]} and again at line {line}")
        lines[key] = line
        if not prefix:
            _note_lines(path, value_node, f"{key}.", lines)


def _translate_legacy(values: dict[str, Any]) -> dict[str, Any]:
    translated = dict(values)
    half = translated.pop("fp16", None)
    if translated.get("mixed_precision") is None and half is True:
        translated["mixed_precision"] = "fp16"
    backend = translated.pop("dynamo_backend", None)
    if backend not in (None, False, "NO", "no"):
        translated["dynamo_config"] = {**(translated.get("dynamo_config") or {}), "dynamo_backend": backend}
    # An unquoted NO is a boolean in YAML; people write these by hand.
    for key, word in (("distributed_type", "NO"), ("mixed_precision", "no")):
        if translated.get(key) is False:
            translated[key] = word
    return translated


def _check_environment(path: Path, values: Mapping[str, Any], lines: Mapping[str, int]) -> None:
    environment = values.get("compute_environment", ComputeEnvironment.LOCAL_MACHINE.value)
    if environment == ComputeEnvironment.AMAZON_SAGEMAKER.value:
        from .options.absent import refuse

        refuse(
            f"compute_environment=AMAZON_SAGEMAKER ({_place(path, 'compute_environment', lines)})", "SageMaker support"
        )
    if environment not in [item.value for item in ComputeEnvironment]:
        raise SettingError(
            explain(
                f"compute_environment={environment!r} is not known ({_place(path, 'compute_environment', lines)}).",
                accepted=[item.value for item in ComputeEnvironment],
                remedy="For your own machines write LOCAL_MACHINE.",
            )
        )
    accepted = [item.value for item in DistributedType]
    kind = values.get("distributed_type")
    if kind not in [*accepted, "TPU"]:
        problem = "is missing" if kind is None else f"has the value {kind!r}, which is not known"
        raise SettingError(
            explain(
                f"The key distributed_type {problem} ({_place(path, 'distributed_type', lines)}).",
                accepted=accepted,
                remedy="For one process write 'NO'.",
            )
        )


def _typed(path: Path, key: str, value: Any, lines: Mapping[str, int]) -> Any:
    """Return `value` in the type of its key."""
    kind = next((name for name, keys in _KINDS.items() if key in keys), "text")
    try:
        if kind == "bool":
            return bool(str_to_bool(str(value)))
        if kind == "int" and not isinstance(value, bool) and not (isinstance(value, float) and value % 1):
            return int(value)
        if kind == "dict" and isinstance(value, dict):
            return value if key != "dynamo_config" else _dynamo(path, value, lines)
        if kind == "list" and isinstance(value, list):
            return [str(item) for item in value]
        if kind == "text" and not isinstance(value, (dict, list)):
            return str(value)
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingError) and kind == "dict":
            raise
    named = {"bool": "true or false", "int": "an integer", "dict": "nested keys", "list": "a list"}.get(kind, "text")
    raise _wrong_type(path, key, value, lines, named)


def _wrong_type(path: Path, key: str, value: Any, lines: Mapping[str, int], accepted: str) -> SettingError:
    return SettingError(
        explain(
            f"{key}={value!r} has a wrong type ({_place(path, key, lines)}).",
            accepted=accepted,
            remedy="Correct the line.",
        )
    )


def _switch(path: Path, key: str, value: Any, lines: Mapping[str, int]) -> bool:
    try:
        return bool(str_to_bool(str(value)))
    except ValueError:
        raise _wrong_type(path, key, value, lines, "true or false") from None


def _dynamo(path: Path, values: dict[str, Any], lines: Mapping[str, int]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in values.items():
        full = key if key.startswith("dynamo_") else f"dynamo_{key}"
        if full not in DYNAMO_KEYS:
            raise SettingError(
                explain(
                    f"{key!r} is not a key of dynamo_config ({_place(path, f'dynamo_config.{key}', lines)})."
                    f"{nearest(full, DYNAMO_KEYS)}",
                    accepted=DYNAMO_KEYS,
                    remedy="Correct or remove the line.",
                )
            )
        if "_use_" in full:
            named[full] = _switch(path, f"dynamo_config.{key}", value, lines)
        else:
            named[full] = "no" if value is False else str(value)
    return named


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Add what the dataclass requires and a file may leave out."""
    base: dict[str, Any] = {
        "compute_environment": ComputeEnvironment.LOCAL_MACHINE,
        "mixed_precision": None,
        "use_cpu": False,
        "debug": False,
    }
    if values["distributed_type"] == "NO":
        base["num_processes"] = 1
    return {**base, **values}
