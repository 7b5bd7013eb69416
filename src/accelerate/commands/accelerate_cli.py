"""`accelerate`: finds the command and hands over.

Owns the list of commands. Loads the module of the one command that is asked for, and no torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..core.errors import nearest
from ..core.versions import __version__

COMMANDS = {
    "launch": ("launch", "Run a script on one process, several devices or several machines."),
    "checkpoint": ("checkpoint", "Look into checkpoints, check them, write them in another form."),
    "config": ("config", "Write the configuration file of `launch`."),
    "env": ("env", "Describe this machine, for a bug report."),
    "merge-weights": ("merge", "Make one file of a sharded checkpoint of FSDP."),
    "test": ("test", "Check that training works on this machine."),
}
"""Command -> (its module, what it does)."""

ABSENT = ("estimate-memory", "tpu-config", "to-fsdp2")
"""Commands of other versions that this one does not have yet."""


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items())
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
    if name in ABSENT:
        parser.error(f"the command {name!r} is not in accelerate {__version__} yet. Available: {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        parser.error(f"{name!r} is not a command.{nearest(name, COMMANDS)} Available: {', '.join(COMMANDS)}.")
    importlib.import_module(f"accelerate.commands.{COMMANDS[name][0]}").main(words[1:])


if __name__ == "__main__":
    main()
