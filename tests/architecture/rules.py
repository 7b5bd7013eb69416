"""The rules as functions of source text, so that each can be shown a file that breaks it."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator

from .source import PACKAGE, Module, dotted, imports, own_targets

# Level -> folders (or kinds of file) that stand side by side on it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("settings", "hardware"),
    ("topology",),
    ("collectives",),
    ("runtime",),
    ("data", "precision", "stepping", "checkpoint", "launch", "offload", "tracking"),
    ("parallel",),
    ("session",),
    ("accelerator",),
    ("faces",),
    ("commands",),
    ("test_utils", "__main__"),
)
_LEVELS = {group: level for level, row in enumerate(LAYERS) for group in row}


def group_of(name: str) -> str:
    """Return the folder of a module, or `"faces"` for the historical import paths."""
    top = name.partition(".")[0]
    return top if top in _LEVELS else "faces"


def wrong_layers(source: Module, names: frozenset[str]) -> Iterator[tuple[str, str, int]]:
    """Yield imports that do not go strictly down: (importer, imported, line)."""
    own = group_of(source.name)
    for target, line in own_targets(source, names):
        other = group_of(target)
        if other != own and _LEVELS[other] >= _LEVELS[own]:
            yield source.name, target, line


def unknown_folders(names: Iterable[str], folders: Iterable[str]) -> set[str]:
    """Return folders that have no row in the table of layers."""
    known = {*_LEVELS, "utils"}
    return {name.partition(".")[0] for name in names if name.partition(".")[0] in set(folders)} - known


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return one cycle of imports, or an empty list."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def environment_uses(source: Module) -> Iterator[int]:
    """Yield the lines that read or write the process environment."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {f"os.{name}" for name in _ENVIRONMENT}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            if _ENVIRONMENT & {alias.name for alias in node.names}:
                yield node.lineno


_DEVICE_MODULES = {
    "accelerator", "cpu", "cuda", "hpu", "mlu", "mps", "mtia", "musa", "neuron", "npu", "sdaa", "xpu",
    "get_device_module",
}  # fmt: skip


def device_uses(source: Module) -> Iterator[int]:
    """Yield the lines that ask what kind of device there is: `torch.<device>`, or a comparison of `.type`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            parts = dotted(node).split(".")
            if parts[0] in ("torch", "torch_xla", "torch_npu") and len(parts) == 2 and parts[1] in _DEVICE_MODULES:
                yield node.lineno
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides):
                yield node.lineno
        elif isinstance(node, ast.Match) and isinstance(node.subject, ast.Attribute) and node.subject.attr == "type":
            yield node.lineno
    for item in imports(source):
        parts = item.target.split(".")
        if parts[0] == "torch" and len(parts) > 1 and parts[1] in _DEVICE_MODULES:
            yield item.line


def distributed_type_comparisons(source: Module) -> Iterator[int]:
    """Yield the lines that compare with a member of `DistributedType`."""

    def is_member(node: ast.AST) -> bool:
        return "DistributedType" in dotted(node).split(".")[:-1]

    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_member(part) for side in sides for part in ast.walk(side)):
                yield node.lineno
        elif isinstance(node, ast.MatchValue) and is_member(node.value):
            yield node.value.lineno


def uses_of(source: Module, *names: str) -> Iterator[int]:
    """Yield the lines that import one of these dotted names, or something inside it, or write it out."""

    def matches(found: str) -> bool:
        return any(found == name or found.startswith(f"{name}.") for name in names)

    for item in imports(source):
        if matches(item.target):
            yield item.line
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and matches(dotted(node)):
            yield node.lineno


REQUIRED = {
    "torch", "numpy", "packaging", "psutil", "yaml", "safetensors", "huggingface_hub", "msgspec", "xxhash", "questionary",
}  # fmt: skip
"""Import names of what pyproject.toml always installs."""


def optional_packages(source: Module) -> set[str]:
    """Return the packages a module imports that an installation may lack."""
    found = {item.target.partition(".")[0] for item in imports(source)}
    return found - REQUIRED - set(sys.stdlib_module_names) - {PACKAGE, "__future__"}


def face_faults(source: Module) -> Iterator[str]:
    """Yield what a face has and should not: anything but a docstring, imports and `__all__`, and a wrong `__all__`."""
    body = list(source.tree.body)
    if ast.get_docstring(source.tree) is not None:
        body.pop(0)
    imported: set[str] = set()
    offered: set[str] | None = None
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == ["__all__"]:
            offered = set(ast.literal_eval(node.value))
        elif not isinstance(node, ast.ImportFrom):
            yield f"line {node.lineno}: {type(node).__name__}"
    if offered != imported:
        yield f"__all__ and the imports differ: {sorted((offered or set()) ^ imported)}"


def long_functions(source: Module, limit: int) -> Iterator[tuple[str, int]]:
    """Yield functions of more than `limit` lines, with their length."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                yield node.name, length


def unfinished(source: Module) -> Iterator[int]:
    """Yield lines that announce work not done."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if any(f"# {word}" in line for word in ("TODO", "FIXME", "XXX", "HACK")):
            yield number
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = dotted(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if name == "NotImplementedError":
                yield node.lineno


def broad_excepts(source: Module) -> Iterator[int]:
    """Yield lines that catch every error and do not give a reason (`# noqa: BLE001 - reason`), or raise again."""
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if not any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in caught):
            continue
        raises = any(isinstance(item, ast.Raise) for item in ast.walk(node))
        if not raises and "noqa: BLE001 - " not in lines[node.lineno - 1]:
            yield node.lineno
