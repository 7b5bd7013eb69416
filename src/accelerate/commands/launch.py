"""`accelerate launch`: start a script on this machine, or as one of several.

Owns the parser. What is asked for is carried out in `commands.launching`, which is loaded when that is known: `--help`
does without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .options import add_launch_options
from .utils import CustomArgumentParser

DESCRIPTION = "Run a script: in one process, on all devices of this machine, or on several machines."
EPILOG = (
    "Flags may be written with dashes or underscores. Flags come before the script; what follows it is the script's. "
    "--help-all shows the others, those of torchrun included."
)


def launch_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate launch`; as a sub-parser, if `subparsers` is given."""
    options: dict[str, Any] = {"description": DESCRIPTION, "epilog": EPILOG, "allow_abbrev": False}
    if subparsers is not None:
        parser = subparsers.add_parser("launch", **options)
    else:
        usage = "accelerate launch [flags] SCRIPT [the script's arguments]"
        parser = CustomArgumentParser("accelerate launch", usage=usage, **options)
    add_launch_options(parser)
    if subparsers is not None:
        parser.set_defaults(func=launch_command)
    return parser


def launch_command(args: argparse.Namespace) -> None:
    """Run what parsed flags ask for, and return when it has ended.

    Args:
        args: What `launch_command_parser().parse_args(...)` returned.

    Raises:
        SettingError: (a `ValueError`) if the flags or the configuration file are wrong.
        WorkersFailed: (a `RuntimeError`) if the script fails. Its `status` is the script's.
    """
    from . import launching

    launching.launch(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate launch` from a terminal."""
    args = launch_command_parser().parse_args(argv)
    from . import launching

    launching.launch_in_place(args)


if __name__ == "__main__":
    main()
