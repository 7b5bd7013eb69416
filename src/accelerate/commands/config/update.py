"""`accelerate config update`: bring a configuration file up to date."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...core.errors import SettingError, explain
from ...settings import config_file
from . import config

description = (
    "Rewrite a configuration file in today's form: old keys are translated, and missing ones get their defaults."
)


def update_config(args: argparse.Namespace) -> Path:
    """Bring the file up to date that `args.config_file` names, or the default one, and return its path.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it cannot be understood, or written. It stays as it was.
    """
    named = args.config_file
    if not named and "config_file" in getattr(args, "nondefault", ()):
        # argparse lets the sub-command's default take the place of what stood before it.
        raise SettingError(
            explain("--config_file stands before `update`.", remedy="Write it behind: update --config_file")
        )
    found = config_file.read(config_file.locate(named or None))
    for note in found.notes:
        print(note)
    config.save(found.config, found.path)
    return found.path


def update_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the sub-command `update` to the sub-parsers `parser`."""
    added = parser.add_parser("update", parents=parents, help=description, description=description, allow_abbrev=False)
    added.add_argument(
        *("--config_file", "--config-file"),
        metavar="FILE",
        help="The file to rewrite; by default the one that `accelerate launch` reads.",
    )
    added.set_defaults(func=update_config_command)
    return added


def update_config_command(args: argparse.Namespace) -> None:
    """Run `accelerate config update`."""
    print(f"Successfully updated the configuration file at {update_config(args)}.")
