"""`accelerate`: finds the command and hands over.

Owns the list of commands. Loads the module of the one command that is asked for, and no torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import nearest
from ..core.versions import __version__


class Command(NamedTuple):
    """One command."""

    module: str
    """Its module in this folder, which has `main`."""
    parser: str
    """The function there that makes its parser."""
    text: str
    """What it does, in a line."""


COMMANDS = {
    "launch": Command(
        "launch", "launch_command_parser", "Run a script on one process, several devices or several machines."
    ),
    "test": Command("test", "test_command_parser", "Check that training works on this machine."),
    "env": Command("env", "env_command_parser", "Describe this machine, for a bug report."),
    "config": Command(
        "config", "get_config_parser", "Write the configuration file of `launch`, with questions or without."
    ),
    "checkpoint": Command(
        "checkpoint", "checkpoint_command_parser", "Look into checkpoints, check them, write them in another form."
    ),
    "merge-weights": Command("merge", "merge_command_parser", "Make one file of a sharded checkpoint of FSDP."),
    "estimate-memory": Command("estimate", "estimate_command_parser", "Say how much memory a model needs."),
    "to-fsdp2": Command("to_fsdp2", "to_fsdp2_command_parser", "Rewrite a configuration file of FSDP 1 for FSDP 2."),
    "tpu-config": Command("tpu", "tpu_command_parser", "Run commands on all machines of a TPU pod."),
    "completion": Command(
        "completion", "completion_command_parser", "Print a script that completes all this in a shell."
    ),
}


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<16}{command.text}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "accelerate",
        usage="accelerate COMMAND [ARGS]",
        description=f"commands:\n{listing}",
        epilog="`accelerate COMMAND --help` says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"accelerate {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `accelerate`."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not words:
        parser.print_help()
        sys.exit(1)
    if words[0].startswith("-"):
        parser.parse_args(words)  # --help and --version end here
        parser.error(f"{words[0]} stands where a command is expected: {', '.join(COMMANDS)}")
    name = words[0]
    if name not in COMMANDS:
        parser.error(f"{name!r} is not a command.{nearest(name, COMMANDS)} Available: {', '.join(COMMANDS)}.")
    importlib.import_module(f"accelerate.commands.{COMMANDS[name].module}").main(words[1:])


if __name__ == "__main__":
    main()
