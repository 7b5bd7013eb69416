"""A launch plan for people and for programs: what `--dry-run` and `accelerate env --explain` print, with all sources.

Pure; decides nothing.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..settings import origins
from .plan import LaunchPlan
from .request import FIELD_OF, LaunchRequest, printed

_NOT_SETTINGS = ("script", "script_args", "place", "hidden", "notes", "several", "origins")


def describe(planned: LaunchPlan, request: LaunchRequest) -> dict[str, Any]:
    """Return a plan as plain values, every setting and variable with its source."""
    machines, ranks = _machines(planned, request), planned.ranks
    found: dict[str, Any] = {
        "command": list(planned.command),
        "place": request.place.name if request.place else None,
        "processes": {
            "total": planned.world_size,
            "on_each_machine": planned.processes_per_node if machines["total"] or planned.process else None,
            "source": _count_source(planned, request),
        },
        "machines": machines,
        "ranks": {"first": ranks[0], "last": ranks[-1]} if ranks else None,
        "started_by": planned.starter or planned.kind,
        "environment": {
            name: {"value": value, "source": _variable_source(name, planned, request)}
            for name, value in sorted(planned.env.items())
        },
        "not_passed_on": list(planned.without),
        "settings": {**settings(request), **_counted(planned, request)},
        "notes": list(planned.notes),
    }
    if planned.start is not None:
        found["hosts"] = {host: list(slots) for host, slots in planned.start.hosts.items()}
    if planned.kind == "elastic":
        meeting = planned.rendezvous
        found["rendezvous"] = {
            "backend": meeting.backend,
            "endpoint": meeting.endpoint,
            "options": dict(meeting.options),
            "local_address": meeting.local_address,
            "least_machines": planned.min_nodes or planned.nodes,
            "run": planned.run_id,
        }
        found["agent"] = dict(planned.agent)
    return found


def settings(request: LaunchRequest) -> dict[str, dict[str, Any]]:
    """Return every setting of a request with its source."""
    names = [item.name for item in fields(request) if item.name not in _NOT_SETTINGS]
    return {name: {"value": _plain(request.shown(name)), "source": request.origin(name)} for name in names}


def _counted(planned: LaunchPlan, request: LaunchRequest) -> dict[str, dict[str, Any]]:
    """Return the settings that nobody gave and the plan has counted."""
    counts = {"num_processes": planned.world_size, "processes_per_machine": planned.processes_per_node}
    if planned.starter:
        return {}  # it counts
    source = _count_source(planned, request)
    return {
        name: {"value": value, "source": source} for name, value in counts.items() if getattr(request, name) is None
    }


def _variable_source(name: str, planned: LaunchPlan, request: LaunchRequest) -> str:
    """Say where the value of a variable for the workers came from."""
    if planned.decides(name, request):
        return "the launcher: no accelerator is visible"
    field = FIELD_OF.get(name) or ("gpu_ids" if name.endswith(("_DEVICES", "_MASK", "_MODULES", "_CORES")) else "")
    if not field:
        return "the launcher"
    if request.was_given(field):
        return request.origin(field)
    return "the default" if name.startswith("ACCELERATE_") else "the launcher: cores of this machine for each process"


def as_json(planned: LaunchPlan, request: LaunchRequest) -> str:
    """Print a plan for programs."""
    return json.dumps(describe(planned, request), indent=2)


def as_text(planned: LaunchPlan, request: LaunchRequest) -> str:
    """Print a plan for people."""
    found = describe(planned, request)
    return "\n".join([f"command      {shlex.join(found['command'])}", *lines(found)])


def lines(found: Mapping[str, Any]) -> list[str]:
    """Print what `describe` found, but for the command: what somebody decided before what was left at its default."""
    count, machines = found["processes"], found["machines"]
    where = f"{machines['total']} ({machines['source']})" if machines["total"] else f"as {machines['source']} has them"
    number = "" if machines["this"] is None else f"; this is number {machines['this']}"
    if "rendezvous" in found and machines["this"] is None:
        number = "; numbered when they meet"
    shown = [
        *([f"place        {found['place']}"] if found["place"] else []),
        f"processes    {count['total']}, {_by_whom(found)} ({count['source']})",
        f"machines     {where}{number}",
    ]
    if "hosts" in found:
        slots = (f"{host} (slots {','.join(map(str, used))})" for host, used in found["hosts"].items())
        shown.append(f"hosts        {', '.join(slots)}")
    if ranks := found["ranks"]:
        shown.append(
            f"ranks here   {ranks['first']}" + (f" to {ranks['last']}" if ranks["last"] > ranks["first"] else "")
        )
    if "rendezvous" in found:
        meeting = found["rendezvous"]
        options = "".join(f" {key}={value}" for key, value in meeting["options"].items())
        elsewhere = meeting["local_address"] and meeting["backend"] != "loopback"
        known_as = f", this machine as {meeting['local_address']}" if elsewhere else ""
        shown.append(f"rendezvous   {meeting['backend']} at {meeting['endpoint']}{options}{known_as}")
        if meeting["least_machines"] < machines["total"]:
            shown.append(f"             {meeting['least_machines']} machine(s) are enough")
    shown.append("environment")
    shown += [
        f"  {name}={item['value']:.80} ({item['source']})"
        for name, item in found["environment"].items()
        if name != origins.VARIABLE
    ]
    shown += [f"  {name} is not passed on" for name in found["not_passed_on"]]
    shown += _by_giver(found["settings"])
    if found["notes"]:
        shown += ["notes", *(f"  {note}" for note in found["notes"])]
    return shown


def _by_whom(found: Mapping[str, Any]) -> str:
    if found["started_by"] == "inline":
        return "in the place of the launcher"
    if found["started_by"] == "elastic":
        return f"{found['processes']['on_each_machine']} on each machine"
    return f"started by {found['started_by']}"


def _by_giver(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Print first what somebody said, then what nobody did."""
    given, left, unset = [], [], []
    for name, item in settings.items():
        if item["source"] != "the default":
            given.append(f"  {name}={printed(item['value'])} ({item['source']})")
        elif item["value"] is None:
            unset.append(name)
        else:
            left.append(f"{name}={printed(item['value'])}")
    return [*(["settings"] if given else []), *given, *_wrapped("defaults", left), *_wrapped("unset", unset)]


def _wrapped(title: str, words: list[str]) -> list[str]:
    return textwrap.wrap(f"{title:<12} {', '.join(words)}", 118, subsequent_indent=" " * 13, break_on_hyphens=False)


def _machines(planned: LaunchPlan, request: LaunchRequest) -> dict[str, Any]:
    """Say how many machines there are, as far as it is us who know."""
    total, source = planned.nodes, request.origin("num_machines")
    if planned.start is not None:
        return {"total": total, "source": f"the hosts of {planned.start.hostfile}", "this": None}
    if planned.starter:
        known = request.was_given("num_machines")
        return {
            "total": total if known else None,
            "source": source if known else request.describe("mpirun_hostfile"),
            "this": None,
        }
    if planned.process is not None and request.place is not None:
        return {"total": None, "source": request.place.name, "this": None}
    this = planned.node_rank if planned.rendezvous.is_numbered else None
    return {"total": total, "source": source, "this": this}


def _count_source(planned: LaunchPlan, request: LaunchRequest) -> str:
    if planned.start is not None:
        return f"the slots of {planned.start.hostfile}"
    for name in ("num_processes", "processes_per_machine"):
        if request.was_given(name):
            return request.origin(name)
    if planned.processes_per_node == 1:
        return "the default"
    return (
        f"one for each of {request.describe('gpu_ids')}" if request.gpu_ids else "one for each device that is visible"
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if hasattr(value, "items") else value
