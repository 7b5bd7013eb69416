"""Imports go strictly down, and nowhere in circles."""

from __future__ import annotations

from . import exceptions, rules
from .source import FOLDER, module, modules, own_names, own_targets

NAMES = own_names()


def test_imports_go_strictly_down():
    wrong = [
        f"{importer} imports {target} (line {line})"
        for source in modules()
        for importer, target, line in rules.wrong_layers(source, NAMES)
        if (importer, target) not in exceptions.UPWARD
    ]
    assert wrong == []


def test_exceptions_to_the_layers_are_still_needed():
    found = {(importer, target) for source in modules() for importer, target, _ in rules.wrong_layers(source, NAMES)}
    assert set(exceptions.UPWARD) <= found


def test_every_folder_has_a_layer():
    folders = [path.name for path in FOLDER.iterdir() if (path / "__init__.py").exists()]
    assert len(folders) > 10
    assert rules.unknown_folders(NAMES, folders) == set()
    assert rules.unknown_folders({"helpers.x"}, ["helpers"]) == {"helpers"}


def test_no_import_goes_in_a_circle():
    edges = {source.name: {target for target, _ in own_targets(source, NAMES)} for source in modules()}
    assert sum(len(targets) for targets in edges.values()) > 200
    assert rules.cycle(edges) == []


def wrong(path: str, text: str) -> list[str]:
    return [target for _, target, _ in rules.wrong_layers(module(path, text), NAMES)]


def test_the_layer_rule_sees_each_way_to_write_an_import():
    assert wrong("core/x.py", "from ..runtime import state") == ["runtime.state"]
    assert wrong("core/x.py", "from ..runtime.state import Runtime") == ["runtime.state"]
    assert wrong("core/x.py", "import accelerate.runtime.state") == ["runtime.state"]
    assert wrong("core/x.py", "def f():\n    from accelerate.runtime import state") == ["runtime.state"]
    assert wrong("core/__init__.py", "from ..settings import env") == ["settings.env"]
    assert wrong("settings/options/x.py", "from ...parallel import base") == ["parallel.base"]


def test_the_layer_rule_keeps_siblings_apart():
    assert wrong("settings/x.py", "from ..hardware import named") == ["hardware"]
    assert wrong("precision/x.py", "from ..checkpoint import layout") == ["checkpoint.layout"]


def test_the_layer_rule_keeps_faces_above():
    assert wrong("session/x.py", "from ..state import PartialState") == ["state"]
    assert wrong("accelerator.py", "from .utils import gather") == ["utils"]
    assert wrong("accelerator.py", "from . import Accelerator") == [""]
    assert wrong("state.py", "from .session.state import AcceleratorState") == []


def test_the_layer_rule_allows_the_own_folder_and_what_is_below():
    assert wrong("runtime/x.py", "from . import state\nfrom ..collectives import Collectives\nimport torch") == []


def test_the_circle_rule_finds_a_circle():
    assert set(rules.cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert rules.cycle({"a": {"b"}, "b": set()}) == []
