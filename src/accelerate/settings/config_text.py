"""The text of a configuration file -> its values, and the line of every key. Runs nothing that the file says.

Owns the limits: files come from other people, and a kilobyte of YAML can stand for more than the memory holds.
Imports no torch, and yaml only when a file is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import SettingError, explain

SIZE_LIMIT_BYTES = 1 << 16
"""A larger file is not a configuration."""

NODE_LIMIT = 2000
"""Most values a file may hold, those that an alias repeats counted each time."""

DEPTH_LIMIT = 20
"""Most levels of nesting."""

DIGIT_LIMIT = 40
"""Most characters of a whole number. Python does not print numbers that are very much longer."""

Lines = dict[str, int]
"""Key -> its line; keys of nested sections as `dynamo_config.dynamo_mode`."""


class NotAConfiguration(Exception):
    """The text is no configuration; says why."""


def parse(path: Path) -> tuple[dict[str, Any], Lines]:
    """Return the values of a file, and the line of every key.

    Raises:
        FileNotFoundError: If there is no such file.
        SettingError: (a `ValueError`) if it cannot be read, or is not a configuration.
    """
    text = _text(path)
    try:
        values, lines = _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
        if values is None:
            raise NotAConfiguration("it is empty")
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise NotAConfiguration("it does not hold `key: value` lines")
    except RecursionError:
        refuse(path, "it is nested too deeply")
    except (NotAConfiguration, ValueError) as error:
        refuse(path, str(error))
    return values, lines


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise the error for a text that is no configuration."""
    raise SettingError(
        explain(
            f"{path} is not a configuration file: {reason:.500}.",
            accepted="YAML, or JSON in a file whose name ends with .json",
            remedy="See what `accelerate config default` writes.",
        )
    )


def _text(path: Path) -> str:
    if not os.path.isfile(path):
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(
            explain(
                f"The configuration file {path} {kind}.",
                remedy="Write one with `accelerate config default --config_file FILE`, or leave --config_file out.",
            )
        )
    try:
        with open(path, "rb") as file:
            found = file.read(SIZE_LIMIT_BYTES + 1)
        size = os.path.getsize(path)
    except OSError as error:
        raise SettingError(
            explain(f"The configuration file {path} cannot be read: {error.strerror}.", remedy="Check its permissions.")
        ) from None
    if len(found) > SIZE_LIMIT_BYTES:
        raise SettingError(
            explain(
                f"{path} has {size} bytes, which is too large for a configuration file.",
                accepted=f"at most {SIZE_LIMIT_BYTES} bytes",
                remedy="Pass the file that `accelerate config` wrote.",
            )
        )
    try:
        return found.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        refuse(path, f"it is not UTF-8 text ({error})")


def _parse_json(text: str) -> tuple[Any, Lines]:
    if not text.strip():
        return None, {}
    values = json.loads(text)
    # JSON is YAML, but for tabs. The same limits hold, and lines are known.
    return values, _parse_yaml(text.replace("\t", " "))[1]


_TEXT, _DATE, *_NUMBERS = (f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "int", "float"))
_WHOLE_NUMBER = _NUMBERS[0]


def _parse_yaml(text: str) -> tuple[Any, Lines]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Counts while it reads. The loader in C is no option: deep nesting ends the process there."""

        depth = nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            self.nodes += 1
            if self.depth > DEPTH_LIMIT:
                raise NotAConfiguration(f"it is nested too deeply, in more than {DEPTH_LIMIT} levels")
            if self.nodes > NODE_LIMIT:
                raise NotAConfiguration(f"it holds more than {NODE_LIMIT} values")
            event = self.peek_event()
            line = event.start_mark.line + 1
            if getattr(event, "tag", None) not in (None, "!"):
                raise NotAConfiguration(f"line {line} has the tag {event.tag!r:.100}, and tags are not read")
            node: Any = super().compose_node(parent, index)
            if node.tag == _WHOLE_NUMBER and len(node.value) > DIGIT_LIMIT:
                raise NotAConfiguration(f"line {line} has a number of more than {DIGIT_LIMIT} digits")
            self.depth -= 1
            return node

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)
            # 1:30 is ninety in YAML, and no key has a date: both are text, which cannot be out of range.
            is_odd = tag in _NUMBERS and ":" in value
            return _TEXT if is_odd or tag == _DATE else tag

    try:
        loader = Loader(text)
    except yaml.YAMLError as error:
        raise NotAConfiguration(" ".join(str(error).split())) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_size(node)
        lines: Lines = {}
        _note_lines(node, "", lines)
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        raise NotAConfiguration(" ".join(str(error).split())) from None
    finally:
        loader.dispose()


def _check_size(root: Any) -> None:
    """Refuse a document whose aliases repeat too much, or which contains itself."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = NODE_LIMIT  # what it counts as while it is looked into: only a loop asks for that
            children = node.value if isinstance(node.value, list) else ()
            flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
            sizes[id(node)] = 1 + sum(size(part) for part in flat)
        if sizes[id(node)] > NODE_LIMIT:
            raise NotAConfiguration(f"with its aliases written out it holds more than {NODE_LIMIT} values")
        return sizes[id(node)]

    size(root)


def _note_lines(node: Any, prefix: str, lines: Lines) -> None:
    if type(node).__name__ != "MappingNode":
        return
    for key_node, value_node in node.value:
        if not isinstance(key_node.value, str):
            raise NotAConfiguration(f"line {key_node.start_mark.line + 1} has a key that is not a word")
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise NotAConfiguration(f"{key!r} stands at line {lines[key]} and again at line {line}")
        lines[key] = line
        if not prefix:
            _note_lines(value_node, f"{key}.", lines)
