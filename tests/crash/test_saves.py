"""Whole saves of a run, cut off: the old or the new state is there, bit for bit, and the next save works.

The quick forms need no tool. The long ones, `make crash`, kill at every call under strace, in all places, on one rank
and on two, and load from up to 2,000 folders that a power cut may leave of each save.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import program, suite, tracing
from .checks import STRACE, WATCH, Cell, kill_at_random, kill_everywhere, lose_power
from .lint import violations
from .program import BESIDE, NEW, NUMBERED, OVER

pytestmark = pytest.mark.usefixtures("warmed")

needs_strace = pytest.mark.skipif(bool(tracing.MISSING), reason=tracing.MISSING or "strace is there")
modes = pytest.mark.parametrize("mode", program.MODES)


@modes
@pytest.mark.parametrize("kind", [NUMBERED, OVER])
def test_a_save_killed_at_any_change_of_the_disk_leaves_the_old_or_the_new_state(
    folder: Path, kind: str, mode: str
) -> None:
    cell = Cell(folder, kind, 1, mode)
    assert cell.exact, "what is loaded is not what was saved"
    report = kill_everywhere(cell, tool=WATCH, again=8, step=2)
    assert not report.bad, report.bad
    assert report.counts["old"] > 10
    assert report.counts["new"] > 2


@modes
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_rank_is_killed_the_other_one_is_told_and_the_state_is_whole(
    folder: Path, victim: int, mode: str
) -> None:
    cell = Cell(folder, BESIDE, 2, mode)
    assert cell.exact, "what is loaded is not what was saved"
    report = kill_everywhere(cell, victim, tool=WATCH, again=8, step=16 if victim == 0 else 1)
    assert not report.bad, report.bad
    assert report.cases >= 3
    assert report.slowest < 10


@modes
@pytest.mark.parametrize("kind", [NUMBERED, OVER])
def test_a_power_cut_leaves_the_old_or_the_new_state(folder: Path, kind: str, mode: str) -> None:
    report = lose_power(Cell(folder, kind, 1, mode), limit=60, tool=WATCH)
    assert not report.bad, report.bad
    assert report.counts["old"] > 10
    assert report.counts["new"] > 10


@modes
@pytest.mark.parametrize("tool", [WATCH, pytest.param(STRACE, marks=needs_strace)])
@pytest.mark.parametrize("kind", [NUMBERED, BESIDE, NEW])
def test_every_file_is_synced_then_renamed_then_its_folder_is_synced(
    folder: Path, kind: str, tool: str, mode: str
) -> None:
    cell = Cell(folder, kind, 1, mode)
    ops = cell.operations(tool)
    assert violations(cell.start, ops) == []
    written = {op.path.rpartition("/")[2] for op in ops if op.kind == "write"}
    assert {"hook.txt", "optimizer.json", "accelerate_manifest.json"} <= written


@modes
@pytest.mark.parametrize(
    ("kind", "total_limit", "ranks"), [(NUMBERED, 1, 1), (NUMBERED, 3, 1), (OVER, 1, 1), (OVER, 1, 2)]
)
def test_random_kills_leave_what_was_promised(folder: Path, kind: str, total_limit: int, ranks: int, mode: str) -> None:
    report = kill_at_random(folder, kind, total_limit, 3, ranks=ranks, mode=mode)
    assert not report.bad, report.bad
    assert report.cases == 3


@needs_strace
@pytest.mark.full
@pytest.mark.timeout(0)
def test_the_whole_suite() -> None:
    assert suite.main([]) == 0
