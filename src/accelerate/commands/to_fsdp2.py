"""`accelerate to-fsdp2`: rewrite the FSDP options of a configuration file for the second version of FSDP.

Owns the table of what became of each option. Loads no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import AccelerateError, SettingError, explain
from ..settings import config_file, config_text
from .saving import save_text
from .utils import CustomArgumentParser, run

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Write a configuration file of FSDP 1 for FSDP 2. Options that FSDP 2 does not have are named and left out; "
    "keys that nobody knows are kept."
)
ELSEWHERE = "Name another file with --output_file."

REMOVED = {
    "fsdp_backward_prefetch": "FSDP2 prefetches by itself",
    "fsdp_forward_prefetch": "FSDP2 has no setting for it yet",
    "fsdp_sync_module_states": "FSDP2 sends weights from rank 0 where that is needed",
    "fsdp_use_orig_params": "FSDP2 always keeps the original parameters",
}
"""Options without a successor -> why."""

RENAMED = {"fsdp_sharding_strategy": "fsdp_reshard_after_forward"}

STRATEGIES = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "NO_SHARD": False,
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
}
"""Strategy of FSDP 1, in the order of its numbers from 1 -> whether FSDP 2 reshards after the forward pass."""

_LOST = {
    "NO_SHARD": "FSDP2 always shards; for plain data parallelism choose distributed_type MULTI_GPU.",
    "HYBRID_SHARD": "On how many groups weights are replicated is said by dp_replicate_size in parallelism_config.",
    "HYBRID_SHARD_ZERO2": "On how many groups weights are replicated is said by dp_replicate_size in parallelism_config.",
}


class OutputExists(AccelerateError, FileExistsError):
    """A file is there already, and nobody said that it may be overwritten."""


def to_fsdp2_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate to-fsdp2`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("to-fsdp2", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate to-fsdp2", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        *("--config_file", "--config-file"), required=True, metavar="FILE", help="The file to read: YAML, or JSON."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the file that is written to.")
    parser.add_argument(
        *("--output_file", "--output-file"), metavar="FILE", help="Where to write; by default into the file itself."
    )
    if subparsers is not None:
        parser.set_defaults(func=to_fsdp2_command)
    return parser


def convert_config_to_fsdp2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a configuration file with options of FSDP 2 in place of those of FSDP 1.

    What is left out, and what FSDP 2 does in another way, is logged as a warning.

    Args:
        config: The content of a file. Without `fsdp_config`, or with one of FSDP 2, nothing changes.

    Raises:
        SettingError: (a `ValueError`) if the options cannot be understood.
    """
    options = config.get("fsdp_config")
    if not options:
        return dict(config)
    if not isinstance(options, Mapping):
        raise SettingError(explain(f"fsdp_config={options!r} has a wrong type.", accepted="nested keys"))
    named: dict[str, Any] = {}
    for key, value in options.items():
        if named.setdefault(_full(key), value) != value:
            raise SettingError(
                explain(
                    f"{_full(key)}={named[_full(key)]!r} contradicts {key}={value!r}: both are the same option.",
                    remedy="Remove one of the two lines.",
                )
            )
    if str(named.get("fsdp_version", 1)) == "2":
        logger.warning(
            "fsdp_version is 2 already: nothing is converted. If the options are those of version 1, write 1 and try again."
        )
        return dict(config)
    converted: dict[str, Any] = {}
    for key, value in named.items():
        if key in REMOVED:
            logger.warning("%s is left out: %s.", key, REMOVED[key])
            continue
        new = RENAMED.get(key, key)
        if new == "fsdp_reshard_after_forward":
            value = _reshards(key, value)
            if converted.get(new, value) != value:
                raise SettingError(
                    explain(
                        f"fsdp_sharding_strategy={named['fsdp_sharding_strategy']!r} contradicts "
                        f"fsdp_reshard_after_forward={named['fsdp_reshard_after_forward']!r}.",
                        remedy="Remove one of the two lines.",
                    )
                )
        if key == "fsdp_state_dict_type" and value == "LOCAL_STATE_DICT":
            logger.warning("fsdp_state_dict_type=LOCAL_STATE_DICT is unknown to FSDP2: choose SHARDED_STATE_DICT.")
        converted[new] = value
    return {**config, "fsdp_config": {**converted, "fsdp_version": 2}}


def _full(key: str) -> str:
    # In this section the prefix may be left out.
    known = {*REMOVED, *RENAMED, "fsdp_reshard_after_forward", "fsdp_version", "fsdp_state_dict_type"}
    return f"fsdp_{key}" if f"fsdp_{key}" in known else key


def _reshards(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    names = list(STRATEGIES)
    word = str(value).strip().upper()
    if word in ("TRUE", "FALSE") and key == "fsdp_reshard_after_forward":
        return word == "TRUE"
    if word.isdigit() and 1 <= int(word) <= len(names):
        word = names[int(word) - 1]
    if word not in STRATEGIES:
        raise SettingError(explain(f"{key}={value!r} is not known.", accepted=names, remedy="Correct the line."))
    if word in _LOST:
        logger.warning("%s=%s: %s", key, value, _LOST[word])
    return STRATEGIES[word]


def to_fsdp2_command(args: argparse.Namespace) -> None:
    """Convert one file.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it cannot be understood, or nobody said where to write.
        OutputExists: (a `FileExistsError`) if the output is there, and `--overwrite` is not given.
    """
    if not args.overwrite and args.output_file is None:
        raise SettingError(
            explain(
                f"Nobody said where to write what becomes of {args.config_file}.",
                remedy="Pass --output_file FILE, or --overwrite to replace it.",
            )
        )
    source = config_file.expanded(args.config_file)
    content = load_config(source)
    output = source if args.output_file is None else config_file.expanded(args.output_file)
    if output.exists() and not args.overwrite:
        raise OutputExists(
            explain(
                f"{output} exists already.", remedy="Pass --overwrite to replace it, or name another --output_file."
            )
        )
    config = convert_config_to_fsdp2(content)
    save_text(output, _text(config, output), remedy=ELSEWHERE)
    is_about = bool(config.get("fsdp_config"))
    print(
        f"The configuration for FSDP2 is in {output}."
        if is_about
        else f"{source} says nothing about FSDP; {output} is the same."
    )


def load_config(config_file_path: str | Path) -> dict[str, Any]:
    """Return the content of a configuration file as it stands there, unknown keys too.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it is empty, or neither YAML nor JSON.
    """
    values, _ = config_text.parse(Path(config_file_path))
    # An unquoted NO is a boolean in YAML.
    words = {"distributed_type": "NO", "mixed_precision": "no"}
    return {key: words.get(key, value) if value is False else value for key, value in values.items()}


def _text(config: Mapping[str, Any], output: Path) -> str:
    if output.suffix == ".json":
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
    import yaml

    return yaml.safe_dump(dict(config))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate to-fsdp2` from a terminal."""
    run(to_fsdp2_command, to_fsdp2_command_parser().parse_args(argv), "accelerate to-fsdp2")


if __name__ == "__main__":
    main()
