"""Read the package as syntax trees: which module imports which, wherever the import stands.

Nothing is executed, so a rule holds for code that no test reaches too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "accelerate"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / PACKAGE


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    """Dotted, without the package: `"runtime.state"`; a folder's `__init__` has the folder's name, the root `""`."""

    path: str
    """Relative to the package: `"runtime/state.py"`."""

    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("__init__.py")


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def module(path: str, text: str) -> Module:
    """Make a module from its path inside the package; for the rules' own tests too."""
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return Module(".".join(parts), path, text)


@cache
def modules() -> tuple[Module, ...]:
    """Return every file of the package."""
    return tuple(module(file.relative_to(FOLDER).as_posix(), file.read_text()) for file in sorted(FOLDER.rglob("*.py")))


@dataclass(frozen=True)
class Import:
    """One imported name."""

    target: str
    """Absolute: `"accelerate.core.errors.explain"`, `"torch"`."""

    line: int
    at_top: bool
    """Whether it runs when the module is imported."""


def imports(source: Module) -> Iterator[Import]:
    """Yield all imports of a module, those inside functions and under `if TYPE_CHECKING` too."""
    package = f"{PACKAGE}.{source.name}".rstrip(".").split(".")
    if not source.is_folder:
        package.pop()
    inside = _inside_functions(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node not in inside)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{start}.{alias.name}", node.lineno, node not in inside)


def _inside_functions(tree: ast.Module) -> set[ast.AST]:
    return {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }


def own_targets(source: Module, names: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Yield the modules of the package that `source` imports, with the line.

    Args:
        source: The importing module.
        names: All modules of the package; tells `from .x import name` from `from . import module`.
    """
    for item in imports(source):
        if item.target != PACKAGE and not item.target.startswith(f"{PACKAGE}."):
            continue
        target = item.target.removeprefix(PACKAGE).removeprefix(".")
        while target not in names:
            target = target.rpartition(".")[0]
        if target != source.name:
            yield target, item.line


def own_names() -> frozenset[str]:
    return frozenset(item.name for item in modules())


def dotted(node: ast.AST) -> str:
    """Return `"torch.cuda.is_available"` for that expression; an empty string for one that is no dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
