"""`accelerate launch`: start a script on this machine, or as one of several.

Owns the parser. What is asked for becomes a `LaunchRequest`, a plan is made of it, and `launch.inline` or
`launch.elastic` carries it out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..core.errors import AccelerateError, SettingError, explain
from ..launch import machine
from ..launch.plan import LaunchPlan, plan, show
from ..launch.report import WorkersFailed
from ..launch.request import LaunchRequest
from ..settings import config_file, env
from .options import REQUEST_FIELDS, add_launch_options
from .utils import CustomArgumentParser, run

DESCRIPTION = "Run a script: in one process, on all devices of this machine, or on several machines."
EPILOG = (
    "Flags may be written with dashes or underscores. Flags come before the script; what follows it is the script's."
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
    planned = _prepared(args)
    if planned is None:
        return
    if planned.kind == "inline":
        from ..launch import inline

        inline.run(planned)
    else:
        from ..launch import elastic

        elastic.run(planned)


def _launch_in_place(args: argparse.Namespace) -> None:
    """Run what parsed flags ask for from a terminal: a single process takes the place of this one."""
    planned = _prepared(args)
    if planned is None:
        return
    if planned.kind == "inline":
        from ..launch import inline

        inline.become(planned)
    from ..launch import elastic

    try:
        elastic.run(planned)
    except WorkersFailed as error:
        if planned.quiet:
            sys.exit(error.status)
        raise


def _prepared(args: argparse.Namespace) -> LaunchPlan | None:
    """Return the plan; `None` if it was only to be printed."""
    environ = env.read()
    request = request_from(args)
    planned = plan(request, machine.survey(request, environ))
    planned = replace(planned, notes=(*planned.notes, *_set_aside(args, request, environ)))
    if args.dry_run:
        print(show(planned, request))
        return None
    if not planned.quiet:
        for note in planned.notes:
            print(f"accelerate launch: {note}", file=sys.stderr)
    return planned


def request_from(args: argparse.Namespace) -> LaunchRequest:
    """Make a request of a namespace: what was given on the command line, or changed afterwards."""
    flags = _flags(args)
    file = _file(args, on_cpu=bool(flags.get("cpu")))
    request = LaunchRequest.merge(
        flags, file, env.read(), script=args.training_script, script_args=tuple(args.training_script_args)
    )
    _check_script(request)
    return request


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in REQUEST_FIELDS if _was_given(args, name)}


_DEFAULTS: dict[str, Any] = {}


def _was_given(args: argparse.Namespace, name: str) -> bool:
    if name in getattr(args, "nondefault", ()):
        return True
    if not _DEFAULTS:
        _DEFAULTS.update(vars(launch_command_parser().parse_args(["script"])))
    return getattr(args, name, _DEFAULTS[name]) != _DEFAULTS[name]


def _file(args: argparse.Namespace, *, on_cpu: bool) -> config_file.ConfigFile | None:
    if args.config_file is not None:
        return config_file.read(Path(args.config_file))
    default = config_file.default_file()
    return config_file.read(default) if not on_cpu and default.is_file() else None


def _set_aside(args: argparse.Namespace, request: LaunchRequest, environ: Mapping[str, str]) -> list[str]:
    """Say that the default configuration file was not read, if that made a difference."""
    default = config_file.default_file()
    if args.config_file is not None or not args.cpu or not default.is_file():
        return []
    try:
        read = config_file.read(default)
        with_file = LaunchRequest.merge(
            _flags(args), read, environ, script=request.script, script_args=request.script_args
        )
    except (AccelerateError, OSError):
        return [f"--cpu leaves {default} aside, which could not be used."]
    else:
        names = [item.name for item in fields(request) if item.compare]
        changed = [name for name in names if getattr(with_file, name) != getattr(request, name)]
    if not changed:
        return []
    about = f"which has something to say about: {', '.join(changed)}"
    return [f"--cpu leaves {default} aside, {about}. Name it with --config_file to have it used."]


def _check_script(request: LaunchRequest) -> None:
    """Refuse a script that is not there, before anything heavy is loaded."""
    if request.module:
        return
    there = Path(request.script).exists()
    if shutil.which(request.script) if request.no_python else there:
        return
    if there and request.no_python and os.path.dirname(request.script):
        raise SettingError(
            explain(
                f"{request.script!r} cannot be run: it is not an executable file (the program after --no_python).",
                remedy=f"Run `chmod +x {request.script}`, or leave --no_python out if it is a Python file.",
            )
        )
    what = "a program on the PATH, or the path of one" if request.no_python else "the path of a Python file"
    raise SettingError(
        explain(
            f"{request.script!r} does not exist (the script on the command line, looked for from {Path.cwd()}).",
            accepted=f"{what}; with --module the name of a module",
            remedy="Check the path. Flags of accelerate come before the script, with two dashes.",
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate launch` from a terminal."""
    args = launch_command_parser().parse_args(argv)
    run(_launch_in_place, args, "accelerate launch")


if __name__ == "__main__":
    main()
