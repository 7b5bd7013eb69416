"""The machinery of the crash tests sees who died, who was told and who hangs; and the checks can fail."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import processes, program
from .checks import WATCH, Cell, kill_at_random, kill_everywhere, lose_power
from .lint import violations
from .processes import Kill
from .program import BESIDE, NUMBERED, OVER, Place

Tell = Callable[[Any], None]


def test_values_errors_and_deaths_are_told_apart() -> None:
    def work(tell: Tell) -> int:
        rank = int(os.environ["RANK"])
        tell(f"rank {rank}")
        if rank == 1:
            raise ValueError("on purpose")
        if rank == 2:
            os.kill(os.getpid(), 9)
        return rank

    first, second, third = processes.run(work, ranks=3)
    assert (first.told, first.value, first.error, first.killed, first.hung) == (["rank 0"], 0, None, False, False)
    assert (second.value, second.error, second.killed) == (None, "ValueError: on purpose", False)
    assert (third.told, third.value, third.error, third.killed) == (["rank 2"], None, None, True)


def test_a_rank_that_hangs_after_another_one_has_died_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)

    def work(tell: Tell) -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), 9)
        time.sleep(60)

    first, second = processes.run(work, ranks=2)
    assert (first.killed, first.hung) == (True, False)
    assert (second.killed, second.hung) == (False, True)


def test_a_process_is_killed_when_it_has_told_something() -> None:
    def work(tell: Tell) -> None:
        tell("begun")
        time.sleep(60)

    (outcome,) = processes.run(work, kill=Kill([0], 0.0, lambda told: told == "begun"))
    assert (outcome.told, outcome.killed, outcome.hung) == (["begun"], True, False)


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every save of generation 1 overwrite its files in place, one after the other."""
    real = program.Run.save

    def save(run: program.Run, number: int, mode: str) -> None:
        place = run.place
        if place.kind != OVER or number != 1:
            real(run, number, mode)
            return
        run.place = Place(place.root.with_name("elsewhere"), OVER)
        shutil.rmtree(run.place.root, ignore_errors=True)
        real(run, number, mode)
        for file in sorted(path for path in (run.place.root / "state").rglob("*") if path.is_file()):
            (place.root / "state" / file.relative_to(run.place.root / "state")).write_bytes(file.read_bytes())

    monkeypatch.setattr(program.Run, "save", save)


@pytest.mark.usefixtures("warmed", "careless")
def test_the_checks_find_what_a_careless_save_leaves(folder: Path) -> None:
    cell = Cell(folder, OVER)
    assert kill_everywhere(cell, tool=WATCH, again=100).bad
    assert lose_power(cell, 20, tool=WATCH).bad
    assert violations(cell.start, cell.operations(WATCH))


@pytest.mark.usefixtures("warmed")
def test_a_checkpoint_that_goes_too_early_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = program.Run.save

    def save(run: program.Run, number: int, mode: str) -> None:
        for checkpoint in program.checkpoints(run.place):
            shutil.rmtree(checkpoint)
        real(run, number, mode)

    monkeypatch.setattr(program.Run, "save", save)
    report = kill_at_random(folder, NUMBERED, 1, 6)
    assert report.bad


@pytest.mark.usefixtures("warmed")
def test_files_of_others_that_change_are_found(folder: Path) -> None:
    cell = Cell(folder, BESIDE)
    root = cell.fresh("changed")
    assert cell.judge([(root, False)], again=1) == [("old", [])]
    (root / "state" / "theirs.txt").write_text("changed")
    assert cell.judge_loaded(root, cell.each(program.load, [root])[0], False)[1]
