"""The model of a power cut, the lint and the reader of traces find what is known to be wrong, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from .lint import violations
from .operations import Op, Tree, read_tree, write_tree
from .power import ALL, NONE, Crash, Disk, crashes
from .tracing import parse

START: Tree = {"f": b"old"}
WRITE = [Op("create", "new"), Op("write", "new", data=b"new")]
SYNC, RENAME, SYNC_FOLDER = Op("fsync", "new"), Op("rename", "new", to="f"), Op("fsync", ".")
RETURNED = Op("returned")
GOOD = [*WRITE, SYNC, RENAME, SYNC_FOLDER, RETURNED]


def torn(start: Tree, ops: Sequence[Op], old: bytes = b"old", new: bytes = b"new") -> list[Crash]:
    """Return the states in which `f` is neither old nor new, or is old after the return."""
    found = crashes(start, ops, limit=5000)
    return [crash for crash in found if crash.tree.get("f") not in ({new} if crash.returned else {old, new})]


def test_a_durable_replacement_is_never_torn() -> None:
    found = crashes(START, GOOD, limit=5000)
    assert torn(START, GOOD) == []
    assert violations(START, GOOD) == []
    assert {crash.tree["f"] for crash in found} == {b"old", b"new"}
    assert {crash.tree.get("new") for crash in found} == {None, b"", b"new", b"n", b"\0\0\0"}


BAD = {
    "the file is not synced": ([*WRITE, RENAME, SYNC_FOLDER, RETURNED], "synced after its last write"),
    "the file is synced before its last write": (
        [WRITE[0], SYNC, WRITE[1], RENAME, SYNC_FOLDER, RETURNED],
        "synced after its last write",
    ),
    "the file is synced after the rename": (
        [*WRITE, RENAME, Op("fsync", "f"), SYNC_FOLDER, RETURNED],
        "synced after its last write",
    ),
    "the folder is not synced": ([*WRITE, SYNC, RENAME, RETURNED], "not on the disk"),
    "the folder is synced before the rename": ([*WRITE, SYNC, SYNC_FOLDER, RENAME, RETURNED], "not on the disk"),
    "the old one is deleted first": (
        [*WRITE, SYNC, Op("unlink", "f"), RENAME, SYNC_FOLDER, RETURNED],
        "goes before there is a new one",
    ),
    "the file is written in place": (
        [Op("truncate", "f"), Op("write", "f", data=b"new"), Op("fsync", "f"), SYNC_FOLDER, RETURNED],
        "is written to",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_known_mistakes_are_found(name: str) -> None:
    ops, words = BAD[name]
    assert torn(START, ops)
    assert words in " ".join(violations(START, ops))


def test_deleting_the_old_one_before_the_new_one_is_durable_is_found() -> None:
    start = {"f": b"old", "other": None}
    ops = [*WRITE, SYNC, Op("rename", "new", to="other/f"), Op("unlink", "f"), Op("fsync", "other"), RETURNED]
    lost = [crash for crash in crashes(start, ops, 5000) if not {"f", "other/f", "new"} & set(crash.tree)]
    assert lost
    assert "goes before other/f is durable" in " ".join(violations(start, ops))


def test_a_synced_file_without_a_synced_name_may_be_gone() -> None:
    ops = [*WRITE, SYNC, RETURNED]
    assert any("new" not in crash.tree for crash in crashes({}, ops, 100) if crash.returned)
    assert "written under its final name" in " ".join(violations({}, [*ops[:-1], SYNC_FOLDER, RETURNED]))


def test_a_file_in_a_folder_without_a_synced_name_may_be_gone() -> None:
    made = [Op("mkdir", "sub"), *WRITE, SYNC, Op("rename", "new", to="sub/f"), Op("fsync", "sub"), RETURNED]
    gone = [crash for crash in crashes({}, made, 5000) if crash.returned and "sub/f" not in crash.tree]
    assert gone
    assert "sub/f is not on the disk" in " ".join(violations({}, made))
    assert violations({}, [*made[:-1], SYNC_FOLDER, RETURNED]) == []


def test_a_file_that_changes_folders_is_found_in_one_or_both() -> None:
    start = {"a": None, "b": None, "a/f": b"x"}
    found = {frozenset(crash.tree) - {"a", "b"} for crash in crashes(start, [Op("rename", "a/f", to="b/f")], 100)}
    assert found == {frozenset({"a/f"}), frozenset({"b/f"}), frozenset({"a/f", "b/f"})}


def test_a_folder_changes_its_name_in_one_step() -> None:
    start = {"a": None, "a/f": b"x", "b": None}
    found = {frozenset(crash.tree) for crash in crashes(start, [Op("rename", "a", to="b/a")], 100)}
    assert found == {frozenset({"a", "a/f", "b"}), frozenset({"b", "b/a", "b/a/f"})}


def test_changes_of_one_name_keep_their_order_and_others_do_not() -> None:
    ops = [Op("create", "a"), Op("rename", "a", to="b"), Op("create", "c")]
    found = {frozenset(crash.tree) for crash in crashes({}, ops, 100)}
    assert found == {frozenset(names) for names in ((), ("a",), ("b",), ("c",), ("a", "c"), ("b", "c"))}


def test_the_extremes_are_there_whatever_the_limit() -> None:
    ops = [Op("create", f"f{number}") for number in range(20)]
    trees = [set(crash.tree) for crash in crashes({}, ops, limit=1)]
    for count in range(21):
        assert {f"f{number}" for number in range(count)} in trees
    assert len(crashes({}, ops, limit=10_000)) > 400


def test_the_same_seed_gives_the_same_states() -> None:
    ops = [Op("create", f"f{number}") for number in range(20)]
    assert crashes({}, ops, 100, seed=3) == crashes({}, ops, 100, seed=3) != crashes({}, ops, 100, seed=4)


def test_unsynced_bytes_are_there_or_missing_or_zeros_or_cut_off() -> None:
    disk = Disk({"f": b"abcd"})
    disk.apply(Op("write", "f", offset=2, data=b"CDEF"))
    assert [disk.left((), {}, what)["f"] for what in (ALL, NONE, "zero", "cut")] == [
        b"abCDEF",
        b"abcd",
        b"ab\0\0\0\0",
        b"abCD",
    ]
    disk.apply(Op("fsync", "f"))
    assert disk.left((), {}, NONE)["f"] == b"abCDEF"


def test_a_call_without_a_model_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="without a model"):
        Disk({}).apply(Op("symlink", "a"))


def quoted(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return "".join(f"\\x{byte:02x}" for byte in data)


def log(*lines: str) -> str:
    """Write a trace as strace does with `-y -xx`; `{x}` stands for a path or text."""
    return "\n".join(lines)


def test_a_trace_becomes_operations(tmp_path: Path) -> None:
    q = quoted
    text = log(
        f'71 mkdir("{q("/r/d")}", 0777) = 0',
        f'71 openat(AT_FDCWD<{q("/r")}>, "{q("d/a")}", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 5<{q("/r/d/a")}>',
        f'71 write(5<{q("/r/d/a")}>, "{q("one")}", 3) = 3',
        f"72 fsync(7<{q('/elsewhere')}> <unfinished ...>",
        f'71 write(5<{q("/r/d/a")}>, "{q("twos")}", 4) = 3',
        "72 <... fsync resumed>) = 0",
        f'71 writev(5<{q("/r/d/a")}>, [{{iov_base="{q("x")}", iov_len=1}}, {{iov_base="{q("y")}", iov_len=1}}], 2) = 2',
        f"71 ftruncate(5<{q('/r/d/a')}>, 5) = 0",
        f"71 fsync(5<{q('/r/d/a')}>) = 0",
        f'71 unlinkat(3<{q("/r/d")}>, "{q("b")}", 0) = 0',
        f'71 unlink("{q("/r/gone")}") = -1 ENOENT (No such file or directory)',
        f'71 renameat2(AT_FDCWD<{q("/r")}>, "{q("/r/d/a")}", AT_FDCWD<{q("/r")}>, "{q("f")}", RENAME_NOREPLACE) = 0',
        f'71 rmdir("{q("/r/d")}") = 0',
        f"71 fsync(3<{q('/r')}>) = 0",
        f'71 write(1<{q("pipe:[9]")}>, "{q(chr(10).join(["told", ""]))}", 5) = 5',
        "71 +++ exited with 0 +++",
    )
    assert parse(text, Path("/r"), told=b"told\n") == [
        Op("mkdir", "d"),
        Op("create", "d/a"),
        Op("truncate", "d/a"),
        Op("write", "d/a", data=b"one"),
        Op("write", "d/a", offset=3, data=b"two"),
        Op("write", "d/a", offset=6, data=b"xy"),
        Op("truncate", "d/a", offset=5),
        Op("fsync", "d/a"),
        Op("unlink", "d/b"),
        Op("rename", "d/a", to="f"),
        Op("rmdir", "d"),
        Op("fsync", "."),
        Op("returned"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        f'symlink("{quoted("/r/a")}", "{quoted("/r/b")}") = 0',
        f"copy_file_range(5<{quoted('/elsewhere')}>, NULL, 6<{quoted('/r/a')}>, NULL, 9, 0) = 9",
        f"sendfile(6<{quoted('/r/a')}>, 5<{quoted('/elsewhere')}>, NULL, 9) = 9",
        f'rename("{quoted("/r/a")}", "{quoted("/elsewhere")}") = 0',
    ],
)
def test_a_traced_call_without_a_model_is_not_passed_over(line: str) -> None:
    with pytest.raises(ValueError, match="no model|over the border"):
        parse(line, Path("/r"))


def test_trees_are_written_and_read(tmp_path: Path) -> None:
    tree = {"a": None, "a/b": b"1", "c": b""}
    write_tree(tmp_path / "x", tree)
    assert read_tree(tmp_path / "x") == tree
