"""The commit protocol alone, with files of a few bytes: every crash state that the model knows."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from accelerate.checkpoint import commit
from accelerate.collectives.single import SingleProcess

from . import processes, watching
from .lint import violations
from .operations import Op, Tree, read_tree, write_tree
from .power import ALL, Crash, Disk, crashes

OLD = {"a": b"old", "b": b"old", "sub/c": b"old"}
NEW = {"a": b"new", "d": b"new", "x/y/z/e": b"new"}
FOREIGN = {"theirs": b"theirs", "sub/theirs": b"theirs"}


def replace(tell: Callable[[Any], None], final: Path) -> None:
    with commit.staged(final, SingleProcess(), stale=lambda _, __: list(OLD)) as staging:
        write_files(staging, NEW)
    tell("returned")


def rotate(tell: Callable[[Any], None], folders: Path) -> None:
    with commit.staged(folders / "checkpoint_1", SingleProcess(), fresh=True) as staging:
        write_files(staging, NEW)
    commit.rotate(folders, 1, "checkpoint_1")
    tell("returned")


def recover(tell: Callable[[Any], None], final: Path) -> None:
    commit.recover(final)
    tell("returned")


def write_files(folder: Path, content: Mapping[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def operations(folder: Path, start: Tree, save: Callable[..., None]) -> list[Op]:
    root, log = folder / "root", folder / "log"
    shutil.rmtree(root, ignore_errors=True)
    write_tree(root, start)
    (outcome,) = processes.run(watching.recorded, root, log, save, root / "at")
    assert outcome.error is None
    return pickle.loads(log.read_bytes())


def files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in read_tree(folder).items() if content is not None}


def below(prefix: str, tree: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix}/{name}": content for name, content in tree.items()}


def survivors(folder: Path, start: Mapping[str, bytes], ops: list[Op], limit: int) -> Iterator[tuple[Crash, Path]]:
    found = crashes(read_tree_of(start, folder), ops, limit)
    assert len(found) > 100
    for number, crash in enumerate(found):
        root = folder / "left" / str(number)
        write_tree(root, crash.tree)
        yield crash, root


def read_tree_of(start: Mapping[str, bytes], folder: Path) -> Mapping[str, bytes | None]:
    write_tree(folder / "start", start)
    return read_tree(folder / "start")


def test_a_folder_that_exists_holds_the_old_or_the_new_state_after_a_power_cut(folder: Path) -> None:
    start = below("at", OLD | FOREIGN)
    ops = operations(folder, start, replace)
    for crash, root in survivors(folder, start, ops, 3000):
        what = f"after {[str(op) for op in ops[max(crash.after - 4, 0) : crash.after]]}: {crash.why}"
        commit.recover(root / "at")
        left = {name: data for name, data in files(root / "at").items() if not name.startswith(".accelerate-saving")}
        assert left == NEW | FOREIGN or (left == OLD | FOREIGN and not crash.returned), what
        replace(lambda _: None, root / "at")
        assert files(root) == below("at", NEW | FOREIGN), what


def test_the_next_process_finishes_durably_what_a_killed_one_has_begun(folder: Path) -> None:
    start = read_tree_of(below("at", OLD | FOREIGN), folder)
    ops = operations(folder, start, replace)
    decided = next(count for count, op in enumerate(ops) if op.to == "at/.accelerate-commit")
    for count in range(decided + 1, len(ops)):
        killed = Disk(start)
        for op in ops[:count]:
            killed.apply(op)
        found = killed.left(range(len(killed.pending)), {}, ALL)
        if "at/.accelerate-commit" not in found:
            continue
        both = [*ops[:count], *operations(folder, found, recover)]
        for number, crash in enumerate(crash for crash in crashes(start, both, 60) if crash.after > count):
            root = folder / "left" / f"{count}-{number}"
            write_tree(root, crash.tree)
            commit.recover(root / "at")
            left = files(root / "at")
            assert left == NEW | FOREIGN or (left == OLD | FOREIGN and not crash.returned), (count, crash.why)


def test_a_numbered_folder_is_whole_or_not_there_after_a_power_cut(folder: Path) -> None:
    start = below("at/checkpoint_0", OLD)
    ops = operations(folder, start, rotate)
    for crash, root in survivors(folder, start, ops, 3000):
        what = f"after {[str(op) for op in ops[max(crash.after - 4, 0) : crash.after]]}: {crash.why}"
        found = {path.name: files(path) for path in (root / "at").glob("checkpoint_*")}
        assert found, what
        assert found.get("checkpoint_1", {} if crash.returned else NEW) == NEW, what
        assert found.get("checkpoint_0", OLD) == OLD, what


@pytest.mark.parametrize(("start", "save"), [(OLD, replace), ({}, replace), ({}, rotate)])
def test_the_order_of_a_save_is_durable(folder: Path, start: Mapping[str, bytes], save: Callable[..., None]) -> None:
    start = below("at" if save is replace else "at/checkpoint_0", start)
    assert violations(read_tree_of(start, folder), operations(folder, start, save)) == []
