"""`accelerate env`: what a bug report should say about this machine; with `--explain`, the settings it gives a run.

Owns the list of facts. Prints no variable of the environment but this library's: others hold keys and tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

from ..core.errors import AccelerateError
from ..core.text import convert_bytes
from ..core.versions import __version__
from ..launch import machine, show
from ..launch.plan import among_visible, plan
from ..launch.request import LaunchRequest
from ..settings import config_file, env, origins, variables
from .launching import about_unknown
from .utils import CustomArgumentParser, run

DESCRIPTION = "Describe this machine, for a bug report."


def env_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate env`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("env", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate env", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config_file", metavar="FILE", help="The configuration file to describe.")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="Print what a launch without flags would be here, and where each setting comes from: the place, a variable, a "
        "line of a file, or the default. Loads no torch.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    if subparsers is not None:
        parser.set_defaults(func=env_command)
    return parser


def env_command(args: argparse.Namespace) -> dict[str, Any]:
    """Print the facts, and return them; with `--explain`, the settings."""
    if getattr(args, "explain", False):
        with env.applied(origins.before_launch(env.read())):  # as `accelerate launch` would see it
            return _explain(args)
    facts = _facts()
    named = args.config_file is not None
    key = f"`Accelerate` {'config passed' if named else 'default config'}"
    facts[key] = _config(args.config_file)
    if getattr(args, "json", False):
        print(json.dumps(facts, indent=2))
        return facts
    print("\nPaste the lines below into your report:\n")
    for name, value in facts.items():
        if isinstance(value, dict):
            lines = "\n".join(f"\t- {item}: {text}" for item, text in value.items())
            print(f"- {name}:\n{lines}")
        else:
            print(f"- {name}: {value}")
    return facts


def _explain(args: argparse.Namespace) -> dict[str, Any]:
    environ = env.read()
    file = config_file.find(args.config_file)
    request = LaunchRequest.merge({}, file, environ, script="")
    around = machine.survey(request, environ)
    request = among_visible(request, around)
    described = show.describe(plan(request, around), request)
    del described["command"]  # there is no script
    found = {
        "file": str(file.path) if file else None,
        **described,
        "variables of workers": {name: environ[name] for name in variables.OF_WORKERS if environ.get(name)},
        "notes": [*described["notes"], *variables.about_ignored(environ), *about_unknown(environ)],
    }
    if getattr(args, "json", False):
        print(json.dumps(found, indent=2))
        return found
    print("What a launch without flags would be:\n")
    default = config_file.default_file()
    absent = f"none: {default} {'is not a file' if os.path.exists(default) else 'does not exist'}"
    print(f"file         {found['file'] or absent}")
    print("\n".join(show.lines(found)))
    if found["variables of workers"]:
        print("variables that each worker reads")
    for name, value in found["variables of workers"].items():
        print(f"  {name}={value}")
    return found


def _facts() -> dict[str, Any]:
    import psutil
    import torch

    from ..hardware import CPU, detect

    family = detect()
    facts: dict[str, Any] = {
        "`Accelerate` version": __version__,
        "Platform": platform.platform(),
        "`accelerate` bash location": shutil.which("accelerate") or "Not found",
        "Python version": platform.python_version(),
        "Numpy version": importlib.metadata.version("numpy"),
        "PyTorch version": str(torch.__version__),
        "PyTorch accelerator": "N/A" if family is CPU else family.name.upper(),
        "System RAM": convert_bytes(psutil.virtual_memory().total),
    }
    if family is not CPU:
        kind = "GPU" if family.name in ("cuda", "mps") else family.name.upper()
        name = getattr(family.module, "get_device_name", None)
        facts[f"{kind} type"] = f"{name() if name else family.name} ({family.count()} visible)"
    return facts


def _config(named: str | None) -> dict[str, Any] | str:
    try:
        found = config_file.find(named)
    except AccelerateError as error:  # a report is needed most where something is broken
        return f"cannot be used: {error}"
    return found.config.to_dict() if found else "Not found"


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate env` from a terminal."""
    run(env_command, env_command_parser().parse_args(argv), "accelerate env")


if __name__ == "__main__":
    main()
