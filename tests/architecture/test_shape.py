"""The shape of files: faces hold nothing, files and functions are short, every module says what it owns."""

from __future__ import annotations

import ast
import tomllib

import pytest

from . import exceptions, rules
from .source import FOLDER, ROOT, Module, module, modules

FILE_LIMIT = 600
FUNCTION_LIMIT = 80


def faces() -> list[Module]:
    return [
        source
        for source in modules()
        if rules.group_of(source.name) == "faces" and source.path not in exceptions.FACES_WITH_CODE
    ]


def test_faces_hold_only_imports():
    assert len(faces()) > 15
    assert {face.path: faults for face in faces() if (faults := list(rules.face_faults(face)))} == {}


@pytest.mark.parametrize(
    "text",
    [
        'from .core import x\n__all__ = ["x"]\ny = 1',
        'from .core import x\n__all__ = ["x"]\ndef f(): pass',
        "from .core import x",
        'from .core import x, y\n__all__ = ["x"]',
        'from .core import x\n__all__ = ["x", "z"]',
        'if True:\n    from .core import x\n__all__ = ["x"]',
    ],
)
def test_the_face_rule_can_fail(text):
    assert list(rules.face_faults(module("state.py", text)))


def test_the_face_rule_accepts_a_face():
    text = '"""Doc."""\nfrom .core import x as y\n__all__ = ["y"]'
    assert list(rules.face_faults(module("state.py", text))) == []


@pytest.mark.parametrize("path", exceptions.FACES_WITH_CODE)
def test_lazy_faces_hold_one_table(path):
    """Nothing but the table, its typed copy, `__all__` and the two functions; the copy names the same homes."""
    source = next(item for item in modules() if item.path == path)
    assigned, functions, typed = [], [], {}
    for node in source.tree.body:
        if isinstance(node, ast.Assign):
            names = [item for target in node.targets for item in ast.walk(target) if isinstance(item, ast.Name)]
            assigned += [item.id for item in names]
            if assigned[-1:] == ["_HOMES"]:
                table = ast.literal_eval(node.value)
        elif isinstance(node, ast.If):
            for item in node.body:
                assert isinstance(item, ast.ImportFrom), item.lineno
                typed.update({alias.name: item.module for alias in item.names})
        else:
            functions += [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
    assert assigned == ["_HOMES", "_MODULES", "__all__", "__getattr__", "__dir__"]
    assert functions == []
    assert typed == table


def test_files_are_short():
    long = {source.path: count for source in modules() if (count := len(source.text.splitlines())) > FILE_LIMIT}
    assert {path: count for path, count in long.items() if path not in exceptions.LONG_FILES} == {}
    assert set(exceptions.LONG_FILES) <= set(long), "an exception is no longer needed"


def test_functions_are_short():
    long = {
        f"{source.path}:{name}": length
        for source in modules()
        for name, length in rules.long_functions(source, FUNCTION_LIMIT)
    }
    assert {name: length for name, length in long.items() if name not in exceptions.LONG_FUNCTIONS} == {}
    assert set(exceptions.LONG_FUNCTIONS) <= set(long), "an exception is no longer needed"


def test_the_size_rule_can_fail():
    text = "def f():\n" + "    pass\n" * 80
    assert list(rules.long_functions(module("x.py", text), 80)) == [("f", 81)]
    assert list(rules.long_functions(module("x.py", text), 81)) == []


def without_docstring(sources: list[Module]) -> list[str]:
    return [source.path for source in sources if not ast.get_docstring(source.tree)]


def test_every_module_says_what_it_owns():
    assert without_docstring(list(modules())) == []
    assert without_docstring([module("x.py", "import os\n'late'")]) == ["x.py"]


def test_nothing_is_unfinished():
    assert [f"{source.path}:{line}" for source in modules() for line in rules.unfinished(source)] == []


@pytest.mark.parametrize(
    "text", ["x = 1  # TODO later", "def f():\n    raise NotImplementedError", "raise NotImplementedError('x')"]
)
def test_the_rule_on_unfinished_code_can_fail(text):
    assert list(rules.unfinished(module("x.py", text)))


def test_no_error_is_swallowed_without_a_reason():
    assert [f"{source.path}:{line}" for source in modules() for line in rules.broad_excepts(source)] == []


@pytest.mark.parametrize("kind", ["", " Exception", " (ValueError, BaseException)"])
def test_the_rule_on_swallowed_errors_can_fail(kind):
    assert list(rules.broad_excepts(module("x.py", f"try:\n    f()\nexcept{kind}:\n    pass")))
    assert not list(rules.broad_excepts(module("x.py", f"try:\n    f()\nexcept{kind}:\n    raise")))
    assert not list(rules.broad_excepts(module("x.py", "try:\n    f()\nexcept ValueError:\n    pass")))


def test_the_package_is_shipped_typed():
    assert (FOLDER / "py.typed").exists()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/accelerate"]}, "the whole folder is shipped, py.typed with it"
