"""`accelerate env`: what a bug report should say about this machine.

Owns the list of facts. Prints no variable of the environment: those hold keys and tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.text import convert_bytes
from ..core.versions import __version__
from ..settings import config_file
from .utils import run

DESCRIPTION = "Describe this machine, for a bug report."


def env_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate env`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("env", description=DESCRIPTION)
    else:
        parser = argparse.ArgumentParser("accelerate env", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config_file", "--config-file", metavar="FILE", help="The configuration file to describe.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    if subparsers is not None:
        parser.set_defaults(func=env_command)
    return parser


def env_command(args: argparse.Namespace) -> dict[str, Any]:
    """Print the facts, and return them."""
    facts = _facts()
    named = args.config_file is not None
    key = f"`Accelerate` {'config passed' if named else 'default config'}"
    facts[key] = _config(Path(args.config_file) if named else config_file.default_file(), required=named)
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


def _config(path: Path, *, required: bool) -> dict[str, Any] | str:
    if not required and not path.is_file():
        return "Not found"
    return config_file.read(path).config.to_dict()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate env` from a terminal."""
    run(env_command, env_command_parser().parse_args(argv), "accelerate env")


if __name__ == "__main__":
    main()
