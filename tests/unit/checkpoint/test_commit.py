"""A folder appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accelerate.checkpoint import commit, durable, layout, manifest
from accelerate.checkpoint.files import TextFile
from accelerate.collectives.single import SingleProcess
from accelerate.core.errors import CheckpointError, SettingError

ONE = SingleProcess()


def files(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in durable.files_below(folder)}


def write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Stands for the end of the process: nothing in the library may handle it."""


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "run 1"
    with commit.staged(final, ONE) as staging:
        assert staging.name == final.name
        write(staging, {"a": "1", "sub/b": "2"})
        assert not final.exists()
    assert files(final) == {"a": "1", "sub/b": "2"}
    assert everything(final.parent) == ["run 1"]


def test_an_existing_folder_keeps_files_of_others(tmp_path: Path) -> None:
    final = tmp_path / "out"
    write(final, {"a": "old", "old_shard": "old", "notes.txt": "mine", "sub/mine": "mine"})
    with commit.staged(final, ONE, stale=lambda _, __: ["a", "old_shard", "absent"]) as staging:
        write(staging, {"a": "new", "sub/b": "new"})
        assert (final / "a").read_text() == "old"
    assert files(final) == {"a": "new", "notes.txt": "mine", "sub/mine": "mine", "sub/b": "new"}
    assert everything(final) == ["a", "notes.txt", "sub"]


def test_the_working_directory_can_be_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with commit.staged(Path(), ONE) as staging:
        write(staging, {"a": "1"})
    assert Path("a").read_text() == "1"


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, exists: bool) -> None:
    final = tmp_path / "out"
    if exists:
        write(final, {"a": "old"})
    with pytest.raises(CheckpointError, match="rank 0: OSError: disk full") as caught:
        with commit.staged(final, ONE, stale=lambda _, __: ["a"]) as staging:
            write(staging, {"a": "new"})
            raise OSError("disk full")
    assert isinstance(caught.value.__cause__, OSError)
    assert everything(tmp_path) == (["out"] if exists else [])
    assert not exists or (files(final), everything(final)) == ({"a": "old"}, ["a"])


def test_a_failure_before_the_rename_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "out"
    write(final, {"a": "old"})

    def finish(_: Path, __: object) -> None:
        raise OSError("no space for the manifest")

    with pytest.raises(CheckpointError, match="no space for the manifest"):
        with commit.staged(final, ONE, finish=finish) as staging:
            write(staging, {"a": "new"})
    assert (files(final), everything(final)) == ({"a": "old"}, ["a"])


def test_a_folder_in_the_way_is_seen_before_anything_changes(tmp_path: Path) -> None:
    final = tmp_path / "out"
    write(final, {"a": "old", "b/c": "mine"})
    with pytest.raises(CheckpointError, match="in the way"):
        with commit.staged(final, ONE) as staging:
            write(staging, {"a": "new", "b": "new"})
    assert files(final) == {"a": "old", "b/c": "mine"}


def test_a_fresh_destination_must_not_exist(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0").mkdir()
    with pytest.raises(SettingError, match="exists already"):
        commit.Staging(tmp_path / "checkpoint_0", ONE, fresh=True)


def test_a_file_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        with commit.staged(tmp_path / "f", ONE):
            raise AssertionError("must not be entered")


_CALLS = ["os.rename", "os.replace", "os.fsync", "os.unlink", "os.rmdir", "os.mkdir"]


def _save_and_die(final: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save, ending at the `number`-th use of `call`, which does not happen; return whether it came so far."""
    real: Callable[..., object] = getattr(os, call.removeprefix("os."))
    count = 0
    dead = False

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal count, dead
        if dead:
            raise Killed
        count += 1
        if count == number:
            dead = True
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call.removeprefix("os."), counted)
        # Cleaning up is what a killed process does not do.
        patch.setattr(commit.shutil, "rmtree", _rmtree_unless(lambda: dead))
        try:
            with commit.staged(final, ONE, stale=lambda _, __: ["old_shard"]) as staging:
                write(staging, {"a": "new", "b": "new", "sub/c": "new"})
        except Killed:
            pass
    return dead


def _rmtree_unless(is_dead: Callable[[], bool]) -> Callable[..., None]:
    real = commit.shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not is_dead():
            real(path, ignore_errors=ignore_errors)

    return rmtree


@pytest.mark.parametrize("call", _CALLS)
def test_a_process_that_dies_anywhere_leaves_the_old_or_the_new_state(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"a": "old", "b": "old", "old_shard": "old", "mine": "mine"}
    new = {"a": "new", "b": "new", "sub/c": "new", "mine": "mine"}
    outcomes = set()
    for number in range(1, 100):
        final = tmp_path / f"{call}-{number}"
        write(final, old)
        died = _save_and_die(final, call, number, monkeypatch)
        pending = (final / layout.COMMIT_NAME).is_dir()
        commit.recover(final)
        visible = {name: text for name, text in files(final).items() if not name.startswith(layout.SAVING_NAME)}
        assert visible in (old, new)
        assert visible == (new if pending or not died else visible)
        outcomes.add(visible == new)
        with commit.staged(final, ONE, stale=lambda _, __: ["old_shard"]) as staging:
            write(staging, {"a": "new", "b": "new", "sub/c": "new"})
        assert files(final) == new
        if not died:
            break
    else:
        pytest.fail("the save never ended")
    assert True in outcomes


def test_recovery_can_be_cut_off_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    write(final, {"a": "old", "gone": "old"})
    pending = final / layout.COMMIT_NAME
    write(pending, {"out/a": "new", "out/b": "new", layout.JOURNAL_NAME: '{"folder": "out", "remove": ["gone"]}'})
    with monkeypatch.context() as patch:
        patch.setattr(commit.shutil, "rmtree", _raise_killed)
        with pytest.raises(Killed):
            commit.recover(final)
    assert commit.recover(final)
    assert files(final) == {"a": "new", "b": "new"}
    assert not commit.recover(final)


def test_the_next_save_finishes_the_last_one_first(tmp_path: Path) -> None:
    final = tmp_path / "out"
    write(final, {"a": "old", "gone": "old"})
    pending = final / layout.COMMIT_NAME
    write(pending, {"out/a": "new", "out/b": "new", layout.JOURNAL_NAME: '{"folder": "out", "remove": ["gone"]}'})
    with commit.staged(final, ONE) as staging:
        write(staging, {"a": "newer"})
    assert files(final) == {"a": "newer", "b": "new"}


def _raise_killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    "journal",
    [
        '{"folder": "out", "remove": ["../victim"]}',
        '{"folder": "out", "remove": ["link/victim"]}',
        '{"folder": "../../elsewhere", "remove": []}',
        "not json",
    ],
)
def test_a_hostile_journal_touches_nothing_outside(tmp_path: Path, journal: str) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    final = tmp_path / "out"
    write(final / layout.COMMIT_NAME, {"out/a": "new", layout.JOURNAL_NAME: journal})
    (final / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError):
        commit.recover(final)
    assert (tmp_path / "victim").read_text() == "mine"


def test_what_a_dead_process_left_aside_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), commit.staged(final, ONE) as staging:
        leftover = staging.parent
        raise KeyboardInterrupt
    assert not leftover.exists()
    write(leftover / "out", {"stale": "x"})
    with commit.staged(final, ONE) as staging:
        write(staging, {"a": "1"})
    assert files(final) == {"a": "1"}


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_flush, real_rename = durable.flush_file, os.rename

    def flush(path: Path) -> None:
        events.append(f"flush {path.name}")
        real_flush(path)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(durable, "flush_file", flush)
    monkeypatch.setattr(os, "rename", rename)
    with commit.staged(tmp_path / "out", ONE) as staging:
        write(staging, {"a": "1", "sub/b": "2"})
    assert set(events[: events.index("rename")]) == {"flush a", "flush b", "flush sub", "flush out"}
    assert events[events.index("rename") + 1 :] == [f"flush {tmp_path.name}"]


def whole(folder: Path) -> None:
    write(folder, {"f": "x"})
    manifest.write(folder, {}, save_id="x", world_size=1, step=0, iteration=0)


def test_rotation_removes_the_oldest_and_leftovers(tmp_path: Path) -> None:
    for name in ("checkpoint_2", "checkpoint_10", "checkpoint_9"):
        whole(tmp_path / name)
    for name in ("keep", f"{layout.REMOVING_PREFIX}checkpoint_1"):
        write(tmp_path / name, {"f": "x"})
    (tmp_path / ".DS_Store").write_text("")
    assert commit.rotate(tmp_path, 2, "checkpoint_10") == ["checkpoint_2"]
    assert everything(tmp_path) == [".DS_Store", "checkpoint_10", "checkpoint_9", "keep"]


def test_a_checkpoint_that_could_not_be_loaded_takes_no_place(tmp_path: Path) -> None:
    for name in ("checkpoint_0", "checkpoint_1", "checkpoint_2"):
        whole(tmp_path / name)
    (tmp_path / "checkpoint_1" / "f").write_text("longer")
    assert commit.rotate(tmp_path, 2, "checkpoint_2") == []
    whole(tmp_path / "checkpoint_3")
    assert commit.rotate(tmp_path, 2, "checkpoint_3") == ["checkpoint_0", "checkpoint_1"]


class Rank:
    """One of two ranks that are threads, each with a disk of its own."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._said, self._barrier = rank, 2, said, barrier

    def all_gather_object(self, obj: Any) -> list[Any]:
        self._said[self.rank] = obj
        self._barrier.wait(10)
        found = list(self._said)
        self._barrier.wait(10)
        return found


def test_no_disk_decides_before_all_could(tmp_path: Path) -> None:
    """The state of neither disk is given up for one that the other disk could not take."""
    said, barrier, errors = [None, None], threading.Barrier(2), {}

    def full(_: Path, __: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    def save(rank: int) -> None:
        write(tmp_path / str(rank) / "out", {"a": "old"})
        exchange: Any = Rank(rank, said, barrier)
        staging = commit.Staging(tmp_path / str(rank) / "out", exchange, leads=True)
        try:
            staging.complete(exchange, lambda: [TextFile("a", b"new")], full if rank else commit.no_finish)
        except CheckpointError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / str(rank) / "out" / "a").read_text() for rank in (0, 1)] == ["old", "old"]
    assert all("rank 1: " in errors[rank] and "untouched" in errors[rank] for rank in (0, 1))


def test_what_a_killed_save_left_beside_its_new_folder_goes_with_the_next_one(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(Killed):  # after the rename, before anything else
        with pytest.MonkeyPatch.context() as patch:

            def flush(folder: Path) -> None:
                if folder == tmp_path:
                    raise Killed

            patch.setattr(durable, "flush_folder", flush)
            patch.setattr(commit.shutil, "rmtree", lambda *_, **__: None)
            with commit.staged(final, ONE) as staging:
                write(staging, {"a": "1"})
    assert [name for name in everything(tmp_path) if name.startswith(layout.SAVING_NAME)]
    with commit.staged(final, ONE) as staging:
        write(staging, {"a": "2"})
    assert everything(tmp_path) == ["out"]
    assert files(final) == {"a": "2"}
