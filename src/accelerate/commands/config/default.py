"""`accelerate config default`: a configuration file that fits this machine, without questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...core import engines
from ...core.enums import ComputeEnvironment, DistributedType, PrecisionType
from ...core.errors import SettingError, explain
from ...settings.config_file import ClusterConfig, expanded
from ...settings.options.absent import refuse
from .. import saving
from .config import as_json, look_around
from .config_args import default_json_config_file

description = "Write a configuration file that fits this machine."

PRECISIONS = ("no", "fp16", "bf16")


def write_basic_config(mixed_precision: str = "no", save_location: str = default_json_config_file) -> Path | bool:
    """Write a configuration that uses all devices of this machine.

    An existing file is never overwritten.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`.
        save_location: Where to write; folders are made.

    Returns:
        The path, or `False` if there was a file already.

    Raises:
        SettingError: (a `ValueError`) if `mixed_precision` is not known, or the file cannot be written.
        UnsupportedCombination: (a `ValueError`) for `fp8`, whose engine this version does not have.
    """
    path = expanded(save_location)
    precision = mixed_precision.lower()
    if precision == PrecisionType.FP8.value:
        refuse(f"mixed_precision={mixed_precision!r} (the argument of write_basic_config)", engines.FP8)
    if precision not in PRECISIONS:
        raise SettingError(
            explain(
                f"mixed_precision={mixed_precision!r} is not known (the argument of write_basic_config).",
                accepted=PRECISIONS,
                remedy="Pass 'no' for plain fp32.",
            )
        )
    if path.exists():
        print(f"{path} exists already and is not overwritten. Remove it, or name another file with --config_file.")
        return False
    # JSON is YAML too, so one form serves both names.
    saving.save_text(path, as_json(_fitting(precision)))
    return path


def _fitting(precision: str) -> ClusterConfig:
    around = look_around()
    count = around.devices.count
    return ClusterConfig(
        compute_environment=ComputeEnvironment.LOCAL_MACHINE,
        distributed_type=around.label if count > 1 else DistributedType.NO,
        mixed_precision=precision,
        use_cpu=count == 0,
        debug=False,
        num_processes=max(1, count),
    )


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
    before = getattr(args, "config_file", None)  # `accelerate config --config_file FILE default`
    is_named = args.save_location != default_json_config_file
    written = write_basic_config(args.mixed_precision, before if before and not is_named else args.save_location)
    if written:
        print(f"accelerate configuration saved at {written}")
