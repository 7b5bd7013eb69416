"""`accelerate config default`: a configuration file that fits this machine, without questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...core.enums import ComputeEnvironment, DistributedType
from ...core.errors import SettingError, explain
from ...launch import devices
from ...settings import env
from ...settings.config_file import ClusterConfig
from .config_args import default_json_config_file

description = "Write a configuration file that fits this machine."

PRECISIONS = ("no", "fp16", "bf16")


def write_basic_config(mixed_precision: str = "no", save_location: str = default_json_config_file) -> Path | bool:
    """Write a configuration that uses all devices of this machine.

    An existing file is never overwritten.

    Args:
        mixed_precision: `no`, `fp16`, `bf16` or `fp8`.
        save_location: Where to write; folders are made.

    Returns:
        The path, or `False` if there was a file already.

    Raises:
        SettingError: (a `ValueError`) if `mixed_precision` is not known.
    """
    path = Path(save_location).expanduser()
    if path.exists():
        print(f"{path} exists already and is not overwritten. Remove it, or name another file with --config_file.")
        return False
    precision = mixed_precision.lower()
    if precision not in (*PRECISIONS, "fp8"):
        raise SettingError(
            explain(
                f"mixed_precision={mixed_precision!r} is not known (the argument of write_basic_config).",
                accepted=(*PRECISIONS, "fp8"),
                remedy="Pass 'no' for plain fp32.",
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON is YAML too, so one form serves both names.
    _fitting(precision).to_json_file(path)
    return path


def _fitting(precision: str) -> ClusterConfig:
    found = devices.find(env.read())
    several = found.count > 1
    return ClusterConfig(
        compute_environment=ComputeEnvironment.LOCAL_MACHINE,
        distributed_type=_label(found) if several else DistributedType.NO,
        mixed_precision=precision,
        use_cpu=found.count == 0,
        debug=False,
        num_processes=max(1, found.count),
    )


def _label(found: devices.Devices) -> DistributedType:
    from ...hardware import named

    return named(found.name).label


def default_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the sub-command `default` to the sub-parsers `parser`."""
    added = parser.add_parser("default", parents=parents, help=description, description=description, allow_abbrev=False)
    added.add_argument(
        "--config_file",
        "--config-file",
        default=default_json_config_file,
        dest="save_location",
        metavar="FILE",
        help="Where to write; by default where `accelerate launch` looks.",
    )
    added.add_argument(
        "--mixed_precision",
        "--mixed-precision",
        choices=PRECISIONS,
        default="no",
        help="In which numbers models compute.",
    )
    added.set_defaults(func=default_config_command)
    return added


def default_config_command(args: argparse.Namespace) -> None:
    """Run `accelerate config default`."""
    written = write_basic_config(args.mixed_precision, args.save_location)
    if written:
        print(f"accelerate configuration saved at {written}")
