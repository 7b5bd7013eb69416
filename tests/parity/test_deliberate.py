"""The table of differences, its tests and the text for users belong together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .deliberate import DIFFERENCES, Difference

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "docs" / "decisions" / "0004-deliberate-differences.md"


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda one: one.name)
def test_each_difference_has_its_test_and_its_line(difference: Difference) -> None:
    file, _, name = difference.test.partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
    lines = [line for line in TEXT.read_text().splitlines() if f"| `{difference.name}` |" in line]
    assert len(lines) == 1, f"{difference.name} needs one line in {TEXT.name}"
    assert f"`{name}`" in lines[0]


def test_the_text_has_nothing_more() -> None:
    rows = [line for line in TEXT.read_text().splitlines() if line.startswith("|") and "| `" in line]
    assert len(rows) == len(DIFFERENCES)
    assert len({difference.name for difference in DIFFERENCES}) == len(DIFFERENCES)
