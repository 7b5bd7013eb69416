"""Each outside thing has one owner: the environment, devices, process groups, pickles, optional packages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from . import exceptions, rules
from .source import Module, module, modules


def outside(check: Callable[[Module], Iterable[int]], *owners: str) -> list[str]:
    """Return `path:line` of what `check` finds outside the owners, which are files or folders ending in `/`."""
    return [
        f"{source.path}:{line}"
        for source in modules()
        if not any(source.path == owner or owner.endswith("/") and source.path.startswith(owner) for owner in owners)
        for line in check(source)
    ]


def found(check: Callable[[Module], Iterable[int]], text: str) -> list[int]:
    return list(check(module("runtime/x.py", text)))


# The environment ------------------------------------------------------------------------------------------------


def test_the_environment_has_one_owner():
    assert outside(rules.environment_uses, "settings/env.py") == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['A']",
        "import os\nos.getenv('A')",
        "from os import environ",
        "import os\nos.putenv('A', '1')",
    ],
)
def test_the_environment_rule_can_fail(text):
    assert found(rules.environment_uses, text)


# Devices --------------------------------------------------------------------------------------------------------


def test_kinds_of_devices_are_hardwares_business():
    assert outside(rules.device_uses, "hardware/") == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.cuda.is_available()",
        "import torch.cuda",
        "from torch import xpu",
        "from torch.cuda import Stream",
        "torch.accelerator.current_accelerator()",
        "torch.get_device_module('cuda')",
        "device.type == 'cuda'",
        "'cuda' != model.device.type",
        "device.type in ('cuda', 'xpu')",
        "match device.type:\n    case 'cuda': pass",
    ],
)
def test_the_device_rule_can_fail(text):
    assert found(rules.device_uses, text)


def test_the_device_rule_lets_devices_be_passed():
    assert found(rules.device_uses, "torch.device('cpu')\nfamily = named(device.type)") == []


# Kinds of distribution --------------------------------------------------------------------------------------------


def test_nobody_asks_how_the_run_is_distributed():
    assert outside(rules.distributed_type_comparisons, "hardware/", *exceptions.DISTRIBUTED_TYPE) == []


@pytest.mark.parametrize(
    "text",
    [
        "kind == DistributedType.NO",
        "DistributedType.FSDP != self.kind",
        "kind in (DistributedType.NO, DistributedType.XLA)",
        "kind is enums.DistributedType.NO",
        "match kind:\n    case DistributedType.NO: pass",
    ],
)
def test_the_distribution_rule_can_fail(text):
    assert found(rules.distributed_type_comparisons, text)


def test_the_distribution_rule_lets_values_be_set():
    assert found(rules.distributed_type_comparisons, "kind = DistributedType.NO") == []


# Process groups ---------------------------------------------------------------------------------------------------

GROUP_OWNERS = (
    "topology/connect.py",
    "topology/mesh.py",
    "collectives/",
    "parallel/",
    "checkpoint/sharded.py",
    "launch/agent.py",
    "launch/elastic.py",
    "launch/rendezvous.py",
    "launch/functions.py",
    "launch/logs.py",
    "launch/loopback.py",
    "launch/watching.py",
)


def groups(source: Module) -> Iterable[int]:
    return rules.uses_of(source, "torch.distributed")


def test_process_groups_have_few_owners():
    assert outside(groups, *GROUP_OWNERS, *exceptions.TORCH_DISTRIBUTED) == []


@pytest.mark.parametrize(
    "text", ["import torch.distributed as dist", "from torch import distributed", "torch.distributed.barrier()"]
)
def test_the_group_rule_can_fail(text):
    assert found(groups, text)


def test_exceptions_to_the_group_rule_are_still_needed():
    for path in exceptions.TORCH_DISTRIBUTED:
        assert any(source.path == path and list(groups(source)) for source in modules()), path


# Pickles ------------------------------------------------------------------------------------------------------------

PICKLES = ("pickle", "cPickle", "dill", "marshal", "shelve", "torch.load", "torch.save", "joblib")


def pickles(source: Module) -> Iterable[int]:
    return rules.uses_of(source, *PICKLES)


def test_pickles_have_few_owners():
    # The second one: between a launcher and its own workers, through a folder that nobody else can read.
    assert outside(pickles, "checkpoint/trust.py", "launch/cargo.py") == []


@pytest.mark.parametrize("text", ["import pickle", "from pickle import loads", "torch.load(f)", "torch.save(x, f)"])
def test_the_pickle_rule_can_fail(text):
    assert found(pickles, text)


# Optional packages ----------------------------------------------------------------------------------------------------


def owners_of_optional_packages(sources: Iterable[Module]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {}
    for source in sources:
        for package in rules.optional_packages(source):
            owners.setdefault(package, []).append(source.path)
    return owners


def test_each_optional_package_is_imported_by_one_file():
    owners = owners_of_optional_packages(modules())
    assert "tqdm" in owners
    assert {package: files for package, files in owners.items() if len(files) > 1} == {}


def test_the_optional_package_rule_can_fail():
    twice = [module("runtime/a.py", "import rich"), module("data/b.py", "def f():\n    from rich import print")]
    assert owners_of_optional_packages(twice) == {"rich": ["runtime/a.py", "data/b.py"]}
    assert owners_of_optional_packages([module("a.py", "import os, torch.nn, yaml\nfrom . import b")]) == {}


def test_the_prompt_library_is_imported_by_one_file_and_only_where_a_question_is_asked():
    users = [source.path for source in modules() if list(rules.uses_of(source, "questionary", "prompt_toolkit"))]
    assert users == ["commands/config/terminal.py"]
    assert list(rules.uses_of(module("data/a.py", "from prompt_toolkit import prompt"), "prompt_toolkit"))


def test_required_packages_are_those_of_the_project_file():
    import tomllib

    from .source import ROOT

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.split(">")[0].split("=")[0].strip() for line in listed}
    assert {"pyyaml" if name == "yaml" else name for name in rules.REQUIRED} == names
