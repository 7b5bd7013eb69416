"""What `accelerate launch` does once its command line is read.

Of the flags it makes a `LaunchRequest`, of that a plan, and `launch.inline`, `launch.elastic` or `launch.runner` carries
it out.
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
from ..launch import machine, registry, torchrun
from ..launch.plan import LaunchPlan, among_visible, plan
from ..launch.report import WorkersFailed
from ..launch.request import FIELD_OF, LaunchRequest
from ..settings import config_file, env, origins, variables
from ..settings.options.absent import refuse
from ..topology import network
from .options import ENGINE_FLAGS, OPTIONS, REQUEST_FIELDS
from .utils import leave, run


def launch(args: argparse.Namespace) -> None:
    """Run what parsed flags ask for, and return when it has ended. Errors are those of `launch_command`."""
    with env.applied(origins.before_launch(env.read())):
        planned = prepared(args)
        if planned is not None:
            _carry_out(planned)


def launch_in_place(args: argparse.Namespace) -> None:
    """Run what parsed flags ask for from a terminal: a single process takes the place of this one."""
    with env.applied(origins.before_launch(env.read())):
        run(_in_place, args, "accelerate launch")


def _carry_out(planned: LaunchPlan) -> None:
    if planned.kind == "inline":
        from ..launch import inline

        inline.run(planned)
    elif planned.kind == "deepspeed":
        from ..launch import runner

        runner.run(planned)
    else:
        from ..launch import elastic

        elastic.run(planned)


def _in_place(args: argparse.Namespace) -> None:
    planned = prepared(args)
    if planned is None:
        return
    if planned.kind == "inline":
        from ..launch import inline

        inline.become(planned)
    status = 0
    try:
        _carry_out(planned)
    except WorkersFailed as error:
        status = error.status
        if said := error.shown(quiet=planned.quiet):
            sys.stdout.flush()
            print(said, file=sys.stderr)
    leave(status)


def prepared(args: argparse.Namespace) -> LaunchPlan | None:
    """Return the plan; `None` if it was only to be printed."""
    environ = env.read()
    _check_form(args)
    request = request_from(args)
    registry.check_names(vars(request), request.origins)
    found = machine.survey(request, environ)
    request = among_visible(request, found)
    planned = plan(request, found)
    told = variables.about_ignored(environ)
    notes = (*planned.notes, *_set_aside(args, request, planned, environ), *told, *about_unknown(environ))
    planned = replace(
        planned, notes=notes, env={**planned.env, origins.VARIABLE: _remarks(planned, request, environ, told)}
    )
    if getattr(args, "preflight", False):
        from ..launch import preflight

        planned = preflight.before(planned, sys.executable)
    if args.dry_run:
        from ..launch import show

        print(show.as_json(planned, request) if getattr(args, "json", False) else show.as_text(planned, request))
        return None
    if not planned.quiet and (planned.process is None or planned.process.rank == 0):  # one of several tasks says it
        for note in planned.notes:
            print(f"accelerate launch: {note}", file=sys.stderr)
    return planned


def about_unknown(environ: Mapping[str, str]) -> list[str]:
    """Say, a sentence for each, which variables look like a launcher's and have no effect."""
    return [*variables.about_unknown(environ, [option.name for option in OPTIONS]), *torchrun.about_unknown(environ)]


def _check_form(args: argparse.Namespace) -> None:
    if getattr(args, "json", False) and not args.dry_run:
        raise SettingError(explain("--json is the form in which --dry-run prints.", remedy="Add --dry-run."))


def _remarks(planned: LaunchPlan, request: LaunchRequest, environ: Mapping[str, str], told: Sequence[str]) -> str:
    """Return what the workers are told about the variables that the launcher sets for them."""
    behind: dict[str, origins.Remark] = {}
    for name, value in planned.env.items():
        if name in network.VARIABLES:
            behind[name] = (value, None, environ.get(name))
        elif name in FIELD_OF:
            was_asked = request.was_given(FIELD_OF[name]) and not planned.decides(name, request)
            given = request.origin(FIELD_OF[name]) if was_asked else None
            # What the user has put into the environment needs no remark.
            if given is None or not given.startswith("from the variable"):
                behind[name] = (value, given, environ.get(name))
    return origins.pack(behind, told)


def request_from(args: argparse.Namespace) -> LaunchRequest:
    """Make a request of a namespace: what was given on the command line, or changed afterwards."""
    _refuse_absent_engines(args)
    flags = _flags(args)
    # The default file describes the accelerators of this machine.
    file = None if args.config_file is None and flags.get("cpu") else config_file.find(args.config_file)
    request = LaunchRequest.merge(
        flags, file, env.read(), script=args.training_script, script_args=tuple(args.training_script_args)
    )
    _check_script(request)
    return request


def _refuse_absent_engines(args: argparse.Namespace) -> None:
    for option in ENGINE_FLAGS:
        other = (
            option.kind is bool and getattr(args, option.name, None) is not option.const
        )  # --no_x, where this is --x
        if _was_given(args, option.name) and not other:
            refuse(option.spelling, option.engine or "")  # values may be secrets


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in REQUEST_FIELDS if _was_given(args, name)}


_DEFAULTS: dict[str, Any] = {option.name: option.default for option in reversed(OPTIONS)}


def _was_given(args: argparse.Namespace, name: str) -> bool:
    """Tell whether a flag stood on the command line, or was changed in the namespace afterwards."""
    return name in getattr(args, "nondefault", ()) or getattr(args, name, _DEFAULTS[name]) != _DEFAULTS[name]


def _set_aside(
    args: argparse.Namespace, request: LaunchRequest, planned: LaunchPlan, environ: Mapping[str, str]
) -> list[str]:
    """Say that the default configuration file was not read, if that made a difference."""
    if args.config_file is not None or not args.cpu:
        return []
    default = config_file.default_file()
    try:
        with_file = LaunchRequest.merge(
            _flags(args), config_file.find(None), environ, script=request.script, script_args=request.script_args
        )
    except (AccelerateError, OSError) as error:
        why = str(error).partition("\n")[0]
        return [f"--cpu leaves {default} aside, which could not be used: {why}"]
    else:
        # What nobody says is counted, and the file may say the same.
        counted = {"num_processes": planned.world_size, "processes_per_machine": planned.processes_per_node}
        changed = [
            item.name
            for item in fields(request)
            if item.compare
            and getattr(with_file, item.name) not in (getattr(request, item.name), counted.get(item.name))
        ]
    if not changed:
        return []
    about = f"which has something to say about: {', '.join(changed)}"
    return [f"--cpu leaves {default} aside, {about}. Name it with --config_file to have it used."]


def _check_script(request: LaunchRequest) -> None:
    """Refuse a script that is not there, before anything heavy is loaded."""
    if request.module:
        return
    there = os.path.exists(request.script)
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
    if os.path.isfile(request.script):  # a name without a folder is looked for on the PATH alone, as shells do
        raise SettingError(
            explain(
                f"{request.script!r} is not on the PATH (the program after --no_python).",
                accepted=what,
                remedy=f"Write ./{request.script} for the one in this folder.",
            )
        )
    raise SettingError(
        explain(
            f"{request.script!r:.200} does not exist (the script on the command line, looked for from {Path.cwd()}).",
            accepted=f"{what}; with --module the name of a module",
            remedy="Check the path. Flags of accelerate come before the script, with two dashes.",
        )
    )
