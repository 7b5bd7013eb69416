"""`accelerate completion`: a script with which a shell completes commands and flags.

Owns shtab, which writes the script from the parsers. The script knows all flags by itself: completing starts no Python.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..core.available import require
from .accelerate_cli import COMMANDS
from .utils import CustomArgumentParser, run

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = "Print a script that completes commands and flags of `accelerate` in a shell."
EPILOG = """to have it in every new shell:
  bash   accelerate completion bash > ~/.local/share/bash-completion/completions/accelerate
  zsh    accelerate completion zsh > FOLDER/_accelerate     (a folder of $fpath)
  fish   accelerate completion fish > ~/.config/fish/completions/accelerate.fish
or in this one:
  eval "$(accelerate completion bash)"
"""


def completion_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate completion`; as a sub-parser, if `subparsers` is given."""
    options: dict[str, Any] = {
        "description": DESCRIPTION,
        "epilog": EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    if subparsers is not None:
        parser = subparsers.add_parser("completion", **options)
    else:
        parser = CustomArgumentParser("accelerate completion", allow_abbrev=False, **options)
    parser.add_argument("shell", choices=SHELLS, help="For which shell.")
    if subparsers is not None:
        parser.set_defaults(func=completion_command)
    return parser


def completion_command(args: argparse.Namespace) -> None:
    """Print the script.

    Raises:
        MissingPackage: (an `ImportError`) without shtab.
    """
    require("shtab", setting="`accelerate completion`", install="'accelerate[completion]'")
    import shtab

    print(shtab.complete(_whole_parser(shtab.FILE, shtab.DIRECTORY), shell=args.shell))


class _Named:
    """Sub-parsers that get the text of the list of commands: shtab offers no command without one."""

    def __init__(self, subparsers: Any) -> None:
        self.subparsers = subparsers

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        return self.subparsers.add_parser(name, help=COMMANDS[name].text, **options)


def _whole_parser(file: Any, folder: Any) -> argparse.ArgumentParser:
    """Make one parser of all commands, whose flags say where a file or a folder is expected."""
    parser = CustomArgumentParser("accelerate", allow_abbrev=False)
    parser.add_argument("--version", action="version", version="", help="Print the version.")
    subparsers: Any = _Named(parser.add_subparsers())
    for command in COMMANDS.values():
        module = importlib.import_module(f"{__package__}.{command.module}")
        getattr(module, command.parser)(subparsers)
    for action in _actions(parser):
        _keep_one_spelling(action)
        action.help = None if action.help is argparse.SUPPRESS else action.help  # what is rare is completed too
        wanted = f"{action.metavar} {action.dest}".lower()
        if "folder" in wanted or "directory" in wanted:
            action.complete = folder  # pyright: ignore[reportAttributeAccessIssue]
        elif any(word in wanted for word in ("file", "script", "path", "output", "model")):
            action.complete = file  # pyright: ignore[reportAttributeAccessIssue]
    return parser


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _keep_one_spelling(action: argparse.Action) -> None:
    # With both, the tab key would stop at every dash to ask which of the two is meant.
    long = [name for name in action.option_strings if name.startswith("--")]
    action.option_strings = [name for name in action.option_strings if not name.startswith("--")] + long[:1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate completion` from a terminal."""
    run(completion_command, completion_command_parser().parse_args(argv), "accelerate completion")


if __name__ == "__main__":
    main()
