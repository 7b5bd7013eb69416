"""`accelerate test`: run the shipped self test through the launcher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .launch import launch_command, launch_command_parser
from .utils import run

DESCRIPTION = "Check on this machine that processes meet, data is shared out and training equals plain torch."
SCRIPT = Path(__file__).parents[1] / "test_utils" / "scripts" / "test_script.py"


def test_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:  # noqa: PT028  (not a test)
    """Make the parser of `accelerate test`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("test", description=DESCRIPTION)
    else:
        parser = argparse.ArgumentParser("accelerate test", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config_file", "--config-file", metavar="FILE", help="The configuration file to test with.")
    if subparsers is not None:
        parser.set_defaults(func=test_command)
    return parser


def test_command(args: argparse.Namespace) -> None:
    """Launch the self test as `accelerate launch` would launch a script."""
    named = [] if args.config_file is None else ["--config_file", args.config_file]
    launch_command(launch_command_parser().parse_args([*named, str(SCRIPT)]))
    print("Test is a success! This machine is ready for training.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate test` from a terminal."""
    run(test_command, test_command_parser().parse_args(argv), "accelerate test")


if __name__ == "__main__":
    main()
