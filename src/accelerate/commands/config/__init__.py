"""`accelerate config`: write the configuration file of `accelerate launch`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..utils import fail, run
from .config_args import default_config_file, load_config_from_file
from .default import default_command_parser

__all__ = ["default_config_file", "get_config_parser", "load_config_from_file", "main"]

QUESTIONS = (
    "the questions are not in this version yet.\n"
    "Write a file without questions with `accelerate config default [--mixed_precision bf16]`, or leave it out: "
    "`accelerate launch` uses all devices it finds, and takes every setting as a flag."
)


def get_config_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate config`; as a sub-parser, if `subparsers` is given."""
    description = "Write the configuration file of `accelerate launch`."
    if subparsers is not None:
        parser = subparsers.add_parser("config", description=description)
    else:
        parser = argparse.ArgumentParser("accelerate config", description=description, allow_abbrev=False)
    parser.set_defaults(func=_ask)
    default_command_parser(parser.add_subparsers(title="subcommands", metavar="default"), [])
    return parser


def _ask(_args: argparse.Namespace) -> None:
    fail("accelerate config", QUESTIONS, 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate config` from a terminal."""
    args = get_config_parser().parse_args(argv)
    run(args.func, args, "accelerate config")


if __name__ == "__main__":
    main()
