"""What clients of Accelerate 1.15 import and call is here, under the same names and with the same parameters.

`frozen_api.json` is made by `freeze.py` from a description of the peer. Parameters, fields and members may be added
behind the frozen ones if they have defaults; each addition stands in `ADDED` with its reason, each difference in
`CHANGED`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
from enum import Enum
from typing import Any

import pytest
import torch

from accelerate.core.errors import UnsupportedCombination

from .freeze import FROZEN, freeze, portable

DATA = json.loads(FROZEN.read_text())
DEFINITIONS: dict[str, Any] = DATA["definitions"]

ADDED = {
    "accelerate.accelerator.Accelerator.scheduler_units": "what one step of a schedule stands for, said outright",
    "accelerate.accelerator.Accelerator.accumulate.num_steps": "models with windows of their own, as in a GAN",
    "accelerate.accelerator.Accelerator.backward.num_items": "gradients as of one batch of all items of the window",
    "accelerate.scheduler.AcceleratedScheduler.shards": "how many ranks read different data",
    "accelerate.scheduler.AcceleratedScheduler.units": "scheduler_units of Accelerator",
    "accelerate.scheduler.AcceleratedScheduler.one_pass": "to tell a schedule that was made for other steps",
    "accelerate.accelerator.Accelerator.save_state.blocking": "a checkpoint is written while training goes on",
    "accelerate.accelerator.Accelerator.save_state.allow_pickle": "what JSON and tensors cannot express, if asked for",
    "accelerate.accelerator.Accelerator.load_state.allow_pickle": "to read that again runs code, so it is asked for too",
    "accelerate.accelerator.Accelerator.load_state.verify": "a checkpoint is compared with its manifest before it is read",
    "accelerate.accelerator.Accelerator.gather_for_metrics.pad_index": "results of different widths are padded inside",
    "accelerate.accelerator.Accelerator.gather_for_metrics.dataloader": "says which of several loops results are from",
    "accelerate.utils.dataclasses.AutocastKwargs.outputs_to_fp32": "keeps half-precision outputs, which saves a copy",
    "accelerate.utils.dataclasses.DataLoaderConfiguration.global_batch_size": "the total, whatever the number of ranks",
    "accelerate.utils.dataclasses.ProjectConfiguration.save_on_signals": "a run that saves itself when it is to end",
    "accelerate.utils.dataclasses.DataLoaderConfiguration.prefetch": "batches reach the device ahead of their use",
    "accelerate.data_loader.prepare_data_loader.global_batch_size": "the same option, for loaders prepared by hand",
    "accelerate.data_loader.prepare_data_loader.prefetch": "the same option, for loaders prepared by hand",
    "accelerate.utils.dataclasses.DistributedType.TPU": "the name before XLA, as an alias of it",
    "accelerate.launchers.notebook_launcher.start_method": "forks or new interpreters, if the choice is not liked",
    "accelerate.launchers.notebook_launcher.return_results": "what the function returned, which was dropped",
    "accelerate.launchers.debug_launcher.return_results": "what the function returned, which was dropped",
    "accelerate.utils.memory.find_executable_batch_size.accelerator": "what forgets failed attempts and accumulates",
    "accelerate.utils.memory.find_executable_batch_size.agree": "one size for all processes, or each by itself",
    "accelerate.utils.memory.find_executable_batch_size.keep_global_batch": "accumulates more as the batch shrinks",
    "accelerate.utils.memory.find_executable_batch_size.probe": "finds the size by bisection, up and down",
}

CHANGED = {
    "accelerate.__version__": "our own version",
    "accelerate.accelerator.Accelerator.init_trackers": "the peer's decorator hides the signature; ours shows it",
    "accelerate.accelerator.Accelerator.log": "the peer's decorator hides the signature; ours shows it",
}

MISSING = {
    "accelerate.accelerator.prepare_data_loader": "one client replaces it there and on accelerate.data_loader at once; "
    "prepare looks on the latter",
}
"""Frozen names that are not here, with the reason."""


def find(name: str) -> Any:
    """Import the object with this full name, as a client would."""
    module, _, short = name.rpartition(".")
    return getattr(importlib.import_module(module), short)


# Signatures ------------------------------------------------------------------------------------------------------


def parameters(signature: str) -> list[tuple[str, str, str | None]]:
    """Return (name, kind, default) of each parameter in a printed signature."""
    # Objects print as <...>, which is no expression.
    quoted = re.sub(r"<[^<>]*>", lambda match: repr(_printed(match.group())), signature)
    arguments = ast.parse(f"def f{quoted}: pass").body[0].args  # type: ignore[attr-defined]
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    found = [(item.arg, "plain", _text(default)) for item, default in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "*", None))
    found += [
        (item.arg, "keyword", _text(default))
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "**", None))
    return [item for item in found if item[0] != "self"]


def _text(default: ast.expr | None) -> str | None:
    return None if default is None else ast.unparse(default)


def _printed(text: str) -> str:
    text = re.sub(r" at 0x\w+", "", text)
    enum_member = re.fullmatch(r"<(\w+\.\w+): .*>", text)
    return enum_member.group(1) if enum_member else text


def signature_of(function: Any) -> str:
    """Print a signature without annotations, as the specification does."""
    signature = inspect.signature(function)
    bare = [item.replace(annotation=inspect.Parameter.empty) for item in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return portable(re.sub(r"<(\w+\.\w+): [^<>]*>", r"\1", text))


def differences(name: str, frozen: str, ours: str) -> list[str]:
    """Return how a printed signature differs from the frozen one, apart from what `ADDED` lists."""
    wanted, found = parameters(frozen), parameters(ours)
    added = [item for item in found if f"{name}.{item[0]}" in ADDED]
    faults = [f"{name}: added {item[0]} has no default" for item in added if item[2] is None]
    found = [item for item in found if item not in added]
    if wanted != found:
        faults.append(f"{name}: frozen {wanted}, found {found}")
    return faults


# Members ---------------------------------------------------------------------------------------------------------

_KINDS = {"contextmanager": "method", "dunder": "method"}


def kind_of(owner: type, member: str) -> str:
    """Return how a class offers a member: method, staticmethod, classmethod, property, property+setter or attr."""
    found = inspect.getattr_static(owner, member)
    if isinstance(found, property):
        return "property+setter" if found.fset else "property"
    if isinstance(found, (staticmethod, classmethod)):
        return type(found).__name__
    return "method" if callable(found) else "attr"


def member_faults(name: str, owner: type, members: dict[str, Any]) -> list[str]:
    faults = []
    for member, frozen in members.items():
        full = f"{name}.{member}"
        if full in CHANGED:
            continue
        if inspect.getattr_static(owner, member, None) is None:
            faults.append(f"{full} is missing")
            continue
        wanted = _KINDS.get(frozen["kind"], frozen["kind"])
        kind = kind_of(owner, member)
        if kind != wanted:
            faults.append(f"{full} is a {kind}, frozen is {wanted}")
        elif "signature" in frozen:
            faults += differences(full, frozen["signature"], signature_of(getattr(owner, member)))
    return faults


def faults_of(name: str, frozen: dict[str, Any], found: Any) -> list[str]:
    """Return how an object differs from its frozen description."""
    faults: list[str] = []
    if frozen["kind"] == "enum":
        ours = {
            member: repr(item.value) for member, item in found.__members__.items() if f"{name}.{member}" not in ADDED
        }
        return [] if ours == frozen["members"] else [f"{name}: {ours} for {frozen['members']}"]
    if frozen["kind"] == "constant":
        return [] if portable(repr(found)) == frozen["value"] else [f"{name} is {found!r} for {frozen['value']}"]
    if "signature" in frozen:
        faults += differences(name, frozen["signature"], signature_of(found))
    if "fields" in frozen:
        ours = {item.name: _default(item) for item in dataclasses.fields(found)}
        ours = {field: default for field, default in ours.items() if f"{name}.{field}" not in ADDED}
        if list(ours.items()) != list(frozen["fields"].items()):
            faults.append(f"{name}: fields {ours} for {frozen['fields']}")
    faults += member_faults(name, found, frozen.get("members", {}))
    return faults


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not dataclasses.MISSING:
        return f"factory:{item.default_factory()!r}"
    if isinstance(item.default, Enum):
        return f"{type(item.default).__name__}.{item.default.name}"
    return repr(item.default)


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if name not in CHANGED and name not in MISSING])
def test_a_frozen_name_is_as_it_was(name):
    assert faults_of(name, DEFINITIONS[name], find(name)) == []


@pytest.mark.parametrize("name", [name for name in DATA["reexports"] if name not in MISSING])
def test_a_frozen_name_can_be_imported_from_where_it_was(name):
    assert find(name) is find(DATA["reexports"][name])


# Attributes of instances -----------------------------------------------------------------------------------------


def instances() -> dict[str, Any]:
    from accelerate import Accelerator, PartialState, data_loader
    from accelerate.state import AcceleratorState, GradientState

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    samples = list(range(4))
    batches = torch.utils.data.BatchSampler(samples, batch_size=2, drop_last=False)
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    made = {
        "accelerate.accelerator.Accelerator": accelerator,
        "accelerate.state.PartialState": PartialState(),
        "accelerate.state.AcceleratorState": AcceleratorState(),
        "accelerate.state.GradientState": GradientState(),
        "accelerate.optimizer.AcceleratedOptimizer": optimizer,
        "accelerate.scheduler.AcceleratedScheduler": scheduler,
        "accelerate.data_loader.BatchSamplerShard": data_loader.BatchSamplerShard(batches),
        "accelerate.data_loader.IterableDatasetShard": data_loader.IterableDatasetShard(samples),
        "accelerate.data_loader.DataLoaderShard": data_loader.prepare_data_loader(loader),
        "accelerate.data_loader.DataLoaderDispatcher": data_loader.prepare_data_loader(
            loader, put_on_device=True, dispatch_batches=True
        ),
    }
    assert set(made) == {name for name, frozen in DEFINITIONS.items() if "attributes" in frozen}
    return made


def test_instances_have_the_frozen_attributes():
    missing = [
        f"{name}.{attribute}"
        for name, made in instances().items()
        for attribute in DEFINITIONS[name]["attributes"]
        if not hasattr(made, attribute)
    ]
    assert missing == []


# Names that wait for an engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA["waiting"])
def test_a_name_that_waits_is_absent_or_says_so(name):
    """A class of a missing engine may be imported, so that scripts load; using it must raise."""
    try:
        found = find(name)
    except (ImportError, AttributeError):
        return
    with pytest.raises(UnsupportedCombination, match=r"does not have yet|needs"):
        found()


# The tables, and the test itself ---------------------------------------------------------------------------------


def test_the_tables_name_what_exists():
    for name in MISSING:
        assert name in DEFINITIONS or name in DATA["reexports"]
        with pytest.raises(AttributeError):
            find(name)
    for name in CHANGED:
        assert name in DEFINITIONS or name.rpartition(".")[2] in DEFINITIONS[name.rpartition(".")[0]]["members"]
    for name in ADDED:
        owner, _, added = name.rpartition(".")
        frozen, found = DEFINITIONS.get(owner), None
        if frozen is None:  # a method
            kind, _, method = owner.rpartition(".")
            frozen, found = DEFINITIONS[kind]["members"][method], getattr(find(kind), method)
        found = found or find(owner)
        ours = found.__members__ if frozen["kind"] == "enum" else inspect.signature(found).parameters
        assert added in ours
        assert added not in frozen.get("members", frozen.get("signature"))
    for name, reason in CHANGED.items():
        frozen = DEFINITIONS.get(name)
        assert reason
        assert frozen is None or faults_of(name, frozen, find(name)), f"{name} does not differ any more"


def test_the_list_covers_what_clients_use():
    assert len(DEFINITIONS) > 90
    assert len(DEFINITIONS["accelerate.accelerator.Accelerator"]["members"]) > 60
    assert not set(DEFINITIONS) & set(DATA["waiting"])


def test_signatures_are_compared_strictly():
    assert differences("f", "(self, a, b=1)", "(self, a, b=1)") == []
    for other in (
        "(self, a, b=2)",
        "(self, b=1, a=1)",
        "(self, a, *, b=1)",
        "(self, a)",
        "(self, a, b=1, c=2)",
        "(self, x, b=1)",
    ):
        assert differences("f", "(self, a, b=1)", other), other
    assert differences("f", "(x=<object object>)", "(x=<object object at 0x7f00>)") == []


def test_other_kinds_are_compared_strictly():
    class Kind(Enum):
        A = "a"

    class Thing:
        @property
        def held(self):
            return 1

        def act(self, a):
            return a

    assert faults_of("k", {"kind": "enum", "members": {"A": "'a'", "B": "'b'"}}, Kind)
    assert not faults_of("k", {"kind": "enum", "members": {"A": "'a'"}}, Kind)
    assert faults_of("c", {"kind": "constant", "value": "'x'"}, "y")
    assert member_faults("t", Thing, {"gone": {"kind": "method"}})
    assert member_faults("t", Thing, {"held": {"kind": "method"}})
    assert member_faults("t", Thing, {"held": {"kind": "property+setter"}})
    assert member_faults("t", Thing, {"act": {"kind": "method", "signature": "(self, b)"}})
    assert not member_faults(
        "t", Thing, {"held": {"kind": "property"}, "act": {"kind": "method", "signature": "(self, a)"}}
    )


def test_freezing_loses_no_name():
    """A name of tier A or B is frozen or waiting; one of tier C is neither."""
    spec = {
        "accelerate_version": "1",
        "modules": {
            "accelerate": {"defines": {}, "reexports": {"f": "accelerate.x.f|C", "g": "accelerate.x.g|A"}},
            "accelerate.utils": {"reexports": {}},
            "accelerate.x": {
                "defines": {
                    "f": {"tier": "A", "k": "function", "s": "()"},
                    "g": {"tier": "C", "k": "function", "s": "()"},
                }
            },
            "accelerate.hooks": {"defines": {"h": {"tier": "B", "k": "function", "s": "()"}}},
        },
    }
    made = freeze(spec)
    assert list(made["definitions"]) == ["accelerate.x.f"]
    assert made["reexports"] == {"accelerate.f": "accelerate.x.f"}
    assert made["waiting"] == {"accelerate.hooks.h": "offload"}
