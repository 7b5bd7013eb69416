"""`accelerate config`: write the configuration file of `accelerate launch`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..utils import CustomArgumentParser, run
from .config import config_command
from .config_args import default_config_file, load_config_from_file
from .default import default_command_parser
from .update import update_command_parser

__all__ = ["default_config_file", "get_config_parser", "load_config_from_file", "main"]


def get_config_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate config`; as a sub-parser, if `subparsers` is given."""
    description = "Ask what this machine shall do, and write the configuration file of `accelerate launch`."
    if subparsers is not None:
        parser = subparsers.add_parser("config", description=description)
    else:
        parser = CustomArgumentParser("accelerate config", description=description, allow_abbrev=False)
    parser.add_argument(
        *("--config_file", "--config-file"),
        metavar="FILE",
        help="Where to write; by default where `accelerate launch` looks. JSON if the name ends with .json, else YAML.",
    )
    parser.set_defaults(func=config_command)
    commands = parser.add_subparsers(title="without questions", metavar="default|update")
    default_command_parser(commands, [])
    update_command_parser(commands, [])
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate config` from a terminal."""
    args = get_config_parser().parse_args(argv)
    run(args.func, args, "accelerate config")


if __name__ == "__main__":
    main()
