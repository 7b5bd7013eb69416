"""`accelerate config`: ask, and write the configuration file.

Owns the order: what could go wrong is found before the first question, and the file is written after the last one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from ...core.enums import DistributedType
from ...core.errors import SettingError, explain
from ...launch import devices
from ...settings import config_file, env
from ...settings.config_file import BaseConfig, ClusterConfig
from .. import saving
from . import questions, terminal

NO_TERMINAL = (
    "Write a file without questions: accelerate config default [--mixed_precision bf16] [--config_file FILE]\n"
    "Or write none: `accelerate launch` uses all devices it finds, and takes every setting as a flag."
)


def config_command(args: argparse.Namespace) -> None:
    """Ask, and write the file. Nothing is written before the last answer.

    Raises:
        SettingError: (a `ValueError`) if there is no terminal to ask at, or the file cannot be written.
    """
    path = config_file.locate(args.config_file or None)
    reason = terminal.obstacle()
    if reason:
        raise SettingError(explain(f"the questions cannot be asked: {reason}.", remedy=NO_TERMINAL))
    saving.check_writable(path)
    try:
        config = get_user_input()
        if path.exists() and terminal.ask(questions.replace_file(path)) == questions.NO:
            print(f"{path} stays as it was.")
            return
    except (KeyboardInterrupt, EOFError):
        _give_up()
    save(config, path)
    print(f"accelerate configuration saved at {path}")
    named = f" --config_file {shlex.quote(args.config_file)}" if args.config_file else ""
    print(f"Run a script with it: accelerate launch{named} script.py")


def get_user_input() -> ClusterConfig:
    """Ask all questions at this terminal, and return the configuration that follows."""
    around = look_around()
    return questions.configuration(questions.ask_all(terminal.ask, around), around)


def look_around() -> questions.Surroundings:
    """Find out what can be offered on this machine."""
    found = devices.find(env.read())
    label = DistributedType.NO if not found.count else label_of(found)
    return questions.Surroundings(found, label, questions.installed_backends())


def label_of(found: devices.Devices) -> DistributedType:
    """Return how a run on several of these devices is called."""
    from ...hardware import named

    return named(found.name).label


def save(config: BaseConfig, path: Path) -> None:
    """Write a configuration: YAML, or JSON if the name of the file ends with .json. The file is replaced as a whole."""
    saving.save_text(path, as_json(config) if path.suffix == ".json" else _as_yaml(config))


def as_json(config: BaseConfig) -> str:
    """Return the text of a configuration as JSON, which is YAML too."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def _as_yaml(config: BaseConfig) -> str:
    import yaml

    return yaml.safe_dump(config.to_dict())


def _give_up() -> NoReturn:
    print("accelerate config: nothing was written.", file=sys.stderr)
    raise KeyboardInterrupt
