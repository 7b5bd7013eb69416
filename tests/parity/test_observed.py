"""This library does what Accelerate 1.15 was seen to do, but for the differences in `deliberate.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support.ranks import run_on_ranks
from .deliberate import DIFFERENCES
from .observe import Raised, observe

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "observed.json").read_text())
DELIBERATE = {row: value for item in DIFFERENCES for row, value in item.rows.items()}
LAUNCHER = ("ACCELERATE_USE_CPU", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cells() -> Iterator[tuple[int, tuple[str, ...], Any]]:
    """Yield number of processes, section and row (and entry, for a row of several), and what was recorded."""
    for section, recorded in RECORDED.items():
        for name, value in recorded.items() if section != "about" else ():
            for processes in (1,) if section == "options" else (1, 2):
                own = of_processes(value, processes)
                if isinstance(own, dict) and own and name != "ga_setter":
                    yield from ((processes, (section, name, entry), expected) for entry, expected in own.items())
                else:
                    yield processes, (section, name), own


def of_processes(value: Any, processes: int) -> Any:
    return value[f"P{processes}"] if isinstance(value, dict) and set(value) == {"P1", "P2"} else value


CELLS = list(cells())


def observe_alone() -> dict[str, Any]:
    for name in LAUNCHER:
        del os.environ[name]
    return observe()


@pytest.fixture(scope="module")
def seen() -> dict[int, list[dict[str, Any]]]:
    """What each rank observes. A single process is started too, so that nothing is left behind here."""
    return {1: run_on_ranks(observe_alone, 1, timeout=120), 2: run_on_ranks(observe, 2, timeout=120)}


def same(expected: Any, got: Any) -> bool:
    if isinstance(got, Raised):
        return isinstance(expected, str) and expected in got
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(same(value, got[key]) for key, value in expected.items())
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(expected) == len(got) and all(map(same, expected, got))
    return type(expected) is type(got) and expected == got


def agrees(expected: Any, ranks: list[Any]) -> bool:
    """Tell whether the record, of each rank or of all of them alike, says what the ranks observed."""
    return same(expected, ranks) or all(same(expected, got) for got in ranks)


def at(observed: dict[str, Any], row: tuple[str, ...]) -> Any:
    for part in row:
        observed = observed[part]
    return observed


@pytest.mark.parametrize(
    ("processes", "row", "recorded"),
    CELLS,
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value)[:20],
)
def test_observed_behaviour(
    processes: int, row: tuple[str, ...], recorded: Any, seen: dict[int, list[dict[str, Any]]]
) -> None:
    expected = of_processes(DELIBERATE.get(row, recorded), processes)
    got = [at(observed, row) for observed in seen[processes]]
    assert agrees(expected, got), f"expected {expected}, the ranks saw {got}"


def test_every_deliberate_row_exists_and_differs() -> None:
    recorded = {(processes, row): value for processes, row, value in CELLS}
    for row, value in DELIBERATE.items():
        known = [processes for processes in (1, 2) if (processes, row) in recorded]
        assert known, f"{row} is not a row of observed.json"
        assert any(of_processes(value, processes) != recorded[processes, row] for processes in known), (
            f"{row} is as it was: take it off the table"
        )


def test_nothing_is_observed_that_was_not_recorded(seen: dict[int, list[dict[str, Any]]]) -> None:
    for processes in (1, 2):
        for section, found in seen[processes][0].items():
            assert set(found) == set(RECORDED[section])
