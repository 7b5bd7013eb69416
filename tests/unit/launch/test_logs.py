"""Where workers print when it goes into files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import Std

from accelerate.launch.logs import Copy, Logs


def variables(*ranks: int) -> dict[int, dict[str, str]]:
    return {local: {"RANK": str(rank), "LOCAL_RANK": str(local)} for local, rank in enumerate(ranks)}


def logs(tmp_path: Path, **options) -> Logs:
    return Logs(**options).placed(tmp_path / "notes")


def test_files_are_found_by_rank_and_those_of_earlier_attempts_stay(tmp_path):
    chosen = logs(tmp_path, log_dir=str(tmp_path / "logs"), redirects=Std.ALL)
    for text in ("first", "second", "third"):
        found = chosen.reify(variables(6, 7))
        assert found.stdouts[1] == str(tmp_path / "logs" / "rank_7" / "stdout.log")
        Path(found.stdouts[1]).write_text(text)

    written = {file.name: file.read_text() for file in (tmp_path / "logs" / "rank_7").iterdir()}
    assert written == {"stdout.1.log": "first", "stdout.2.log": "second", "stdout.log": "third"}


def test_without_flags_the_terminal_gets_everything_and_notes_have_a_place(tmp_path):
    chosen, given = logs(tmp_path), variables(0, 1)

    found = chosen.reify(given)

    assert found.stdouts == found.stderrs == {0: "", 1: ""}
    assert given[1]["TORCHELASTIC_ERROR_FILE"] == found.error_files[1]
    assert Path(found.error_files[1]).parent.is_dir()
    assert Path(found.error_files[1]).is_relative_to(tmp_path / "notes")


def test_ranks_that_are_not_to_be_shown_are_not(tmp_path):
    found = logs(tmp_path, shown={1}).reify(variables(0, 1))

    assert found.stdouts == {0: os.devnull, 1: ""}


def test_single_ranks_and_streams_can_be_chosen(tmp_path):
    found = logs(tmp_path, log_dir=str(tmp_path / "l"), redirects={1: Std.ERR}).reify(variables(0, 1))

    assert found.stdouts == {0: "", 1: ""}
    assert found.stderrs == {0: "", 1: str(tmp_path / "l" / "rank_1" / "stderr.log")}


def test_lines_are_copied_whole_with_their_rank_and_chosen_ones_into_a_file(tmp_path, capsys):
    chosen = logs(tmp_path, log_dir=str(tmp_path / "l"), tee=Std.OUT, filters={"stdout": ("loss",)})
    found = chosen.reify(variables(0, 1))
    files = [Path(found.stdouts[local]).open("w") for local in (0, 1)]
    for part in ("loss ", "is 1\nstep"):  # torn apart by the writer
        for file in files:
            file.write(part)
            file.flush()
    for file in files:
        file.close()

    chosen.finish()

    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        f"[rank {rank}] {text}" for rank in (0, 1) for text in ("loss is 1", "step")
    )
    assert (tmp_path / "l" / "rank_1" / "filtered_stdout.log").read_text() == "loss is 1\n"


@pytest.mark.parametrize(("options", "prefix"), [({"role": "trainer"}, "[trainer 3] "), ({"prefix": "${rank}|"}, "3|")])
def test_the_prefix_can_be_chosen(tmp_path, capsys, options, prefix):
    chosen = logs(tmp_path, tee=Std.ERR, **options)
    Path(chosen.reify(variables(3)).stderrs[0]).write_text("x\n")

    chosen.finish()

    assert capsys.readouterr().err == f"{prefix}x\n"


def test_a_line_that_is_not_finished_waits(tmp_path):
    file = tmp_path / "out"
    copy = Copy(file, "stdout", "")
    assert list(copy.lines(last=False)) == []
    with file.open("wb") as stream:
        stream.write(b"a\nb \xff")
        stream.flush()
        assert list(copy.lines(last=False)) == ["a"]
        stream.write(b"c\r50%\r100%\n\nend")
        stream.flush()
        assert list(copy.lines(last=False)) == ["b \N{REPLACEMENT CHARACTER}c", "50%", "100%", ""]
    assert list(copy.lines(last=True)) == ["end"]
    assert "accelerate-logs" not in {thread.name for thread in sys.modules["threading"].enumerate()}


def test_the_end_of_a_line_may_be_torn_apart(tmp_path):
    file = tmp_path / "out"
    copy = Copy(file, "stdout", "")
    found = []
    with file.open("wb") as stream:
        for part in (b"a\r", b"", b"\nb\r", b"c\n", b"\n"):
            stream.write(part)
            stream.flush()
            found.append(list(copy.lines(last=False)))
    list(copy.lines(last=True))

    assert found == [["a"], [], ["b"], ["c"], [""]]


@pytest.fixture
def pipe():
    """Return the two ends of a pipe, as files."""
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as reader, os.fdopen(writes, "w") as writer:
        yield reader, writer


def test_a_reader_that_has_had_enough_is_told_of_once_and_files_go_on(tmp_path, monkeypatch, capsys, pipe):
    reader, writer = pipe
    monkeypatch.setattr(sys, "stdout", writer)
    chosen = logs(tmp_path, log_dir=str(tmp_path / "l"), tee=Std.OUT, filters={"stdout": ("loss",)})
    found = chosen.reify(variables(0, 1))
    reader.close()
    for local in (0, 1):
        Path(found.stdouts[local]).write_text("loss 1\n")

    chosen.finish()

    assert capsys.readouterr().err == "accelerate: no more output is copied to stdout: Broken pipe\n"
    for rank in (0, 1):
        assert (tmp_path / "l" / f"rank_{rank}" / "filtered_stdout.log").read_text() == "loss 1\n"


def test_a_file_for_chosen_lines_that_cannot_be_written_is_told_of(tmp_path, capsys):
    chosen = logs(tmp_path, log_dir=str(tmp_path / "l"), tee=Std.OUT, filters={"stdout": ("loss",)})
    found = chosen.reify(variables(0))
    filtered = tmp_path / "l" / "rank_0" / "filtered_stdout.log"
    filtered.mkdir()
    Path(found.stdouts[0]).write_text("loss 1\n")

    chosen.finish()

    out, errors = capsys.readouterr()
    assert out == "[rank 0] loss 1\n"
    assert errors == f"accelerate: no more output is copied to {filtered}: Is a directory\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_does_not_read_does_not_hold_up_the_end(tmp_path, monkeypatch, pipe, blocking):
    monkeypatch.setattr("accelerate.launch.logs.FINISH_SECONDS", 0.2)
    reader, writer = pipe
    os.set_blocking(writer.fileno(), blocking)
    monkeypatch.setattr(sys, "stdout", writer)
    chosen = logs(tmp_path, log_dir=str(tmp_path / "l"), tee=Std.OUT)
    Path(chosen.reify(variables(0)).stdouts[0]).write_text("x" * 300_000 + "\n")
    tail = chosen._tail
    assert tail is not None

    chosen.finish()

    assert tail._thread.is_alive()
    writer.flush()  # others who print are not held up either
    assert reader.read(300_010) == b"[rank 0] " + b"x" * 300_000 + b"\n"
    tail._thread.join()
