"""Who is blamed: from exit codes, notes and the order of things."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from accelerate.launch.failures import Endings, accounts, judged, keep_tracebacks
from accelerate.launch.logs import Streams

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]"
BOOM = "ValueError: boom"


class Place:
    """A run of some ranks on a second machine, the first of which is rank 4."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.streams = {local: Streams(4 + local, folder / str(local)) for local in range(ranks)}
        for own in self.streams.values():
            own.folder.mkdir()
        self.run = SimpleNamespace(
            logs=SimpleNamespace(streams=self.streams),
            endings=Endings(),
            ranks={local: 4 + local for local in range(ranks)},
            pids={local: 70 + local for local in range(ranks)},
        )

    def note(self, rank: int, text: str, time: float, arose_on: tuple[int, ...] = ()) -> None:
        file = self.streams[rank - 4].folder / "error.json"
        message = {"message": text, "extraInfo": {"py_callstack": f"Traceback\n{text}", "timestamp": "1"}}
        file.write_text(json.dumps({"message": message, "arose_on": arose_on}))
        os.utime(file, (time, time))

    def end(self, rank: int, code: int, time: float, *, by_us: bool = False) -> None:
        self.run.endings.codes[rank - 4] = code
        self.run.endings.times[rank - 4] = time
        if by_us:
            self.run.endings.ended_by_us.add(rank - 4)

    def order(self) -> list[int]:
        return [account.rank for account in accounts(self.run) if account.has_failed and not account.was_ended]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path, 3)


@pytest.mark.parametrize(
    ("notes", "order"),
    [
        ({4: LOST, 5: BOOM}, [5, 4]),
        ({4: "KeyError: 1", 5: BOOM}, [4, 5]),
        ({4: LOST, 5: LOST, 6: BOOM}, [6, 4, 5]),
        ({4: "ConnectionResetError: [Errno 104] Connection reset by peer", 5: LOST}, [4, 5]),
        ({4: LOST, 5: "requests.exceptions.ConnectionError: Connection refused"}, [5, 4]),
    ],
)
def test_a_rank_that_only_noted_its_exception_can_be_the_cause(place, notes, order):
    for rank, text in notes.items():
        place.note(rank, text, 1000.0 + rank)
    place.end(4, 1, 1010.0)

    assert place.order() == order
    assert accounts(place.run)[0].failure().traceback.endswith(notes[order[0]])


def test_a_rank_ended_on_its_way_out_is_the_cause_and_a_half_written_note_is_none(place):
    place.note(4, LOST, 1000.0)
    place.note(5, BOOM, 1001.0)
    (place.streams[2].folder / "error.json").write_text('{"mess')
    place.end(4, 1, 1000.5)
    place.end(5, -signal.SIGTERM, 1002.0, by_us=True)
    place.end(6, -signal.SIGTERM, 1002.0, by_us=True)

    found = [account.failure() for account in accounts(place.run)]

    assert [(item.rank, item.pid, item.exitcode, item.kind) for item in found] == [
        (5, 71, 1, ""),
        (4, 70, 1, "lost"),
        (6, 72, -15, "ended"),
    ]


@pytest.mark.parametrize("code", [3, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGTERM])
def test_a_rank_that_left_no_word_is_blamed_before_those_that_lost_it(place, code):
    place.note(4, LOST, 1000.0)
    place.end(4, 1, 1000.1)
    place.end(6, -signal.SIGABRT, 1000.2)
    place.end(5, code, 1000.3)

    assert place.order() == [5, 6, 4]
    assert accounts(place.run)[0].is_cause


MAIN = "Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n  File x, line 1"
OTHER = "Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n  File x, line 1"


@pytest.mark.parametrize(("crash", "is_cause"), [(MAIN, True), (OTHER, False), ("", False)])
def test_an_abort_is_blamed_before_those_that_lost_it_though_they_spoke_first(place, crash, is_cause):
    place.note(4, LOST, 1000.0)
    place.end(4, 1, 1000.1)
    if crash:
        (place.streams[1].folder / "crash.txt").write_text(crash)
    place.end(5, -signal.SIGABRT, 1000.2)

    assert place.order() == [5, 4]
    assert accounts(place.run)[0].is_cause == is_cause


def test_an_abort_alone_is_blamed_in_the_end_but_others_are_heard_first(place):
    place.end(4, -signal.SIGABRT, 1000.0)

    assert not accounts(place.run)[0].is_cause
    assert place.order() == [4]


def test_an_error_that_all_ranks_raise_is_blamed_on_the_rank_where_it_arose(place):
    for rank, time in ((4, 1000.0), (5, 1001.0), (6, 1002.0)):
        place.note(rank, "accelerate.core.errors.CheckpointError: not written", time, arose_on=(5,))
        place.end(rank, 1, time)

    assert place.order() == [5, 4, 6]
    assert [account.is_consequence for account in accounts(place.run)] == [False, True, True]


def test_a_file_that_goes_with_the_run_is_not_named_and_one_that_is_renamed_by_its_later_name(place, tmp_path):
    place.run.logs.later_name = lambda file: file.with_suffix(".1.log")
    place.run.world_size, place.run.elsewhere, place.run.is_cut_off = 8, None, False
    for local in (0, 1):
        place.streams[local].files["stderr"] = tmp_path / f"{local}.log"
        place.end(4 + local, 3, 1000.0 + local)
    place.streams[0].are_kept = False

    first = str(judged(place.run)).splitlines()[-1]
    place.run.endings.codes.pop(0)

    assert "log" not in first
    assert f"log {tmp_path / '1.log'})" in str(judged(place.run))
    assert f"log {tmp_path / '1.1.log'})" in str(judged(place.run, another_follows=True))


def test_where_the_interpreter_was_when_the_system_ended_it_is_shown(place):
    (place.streams[0].folder / "crash.txt").write_text("Fatal Python error: Segmentation fault\n\nExtension modules: a")
    place.end(4, -signal.SIGSEGV, 1000.0)

    assert accounts(place.run)[0].failure().traceback == "Fatal Python error: Segmentation fault"


def test_what_a_worker_did_not_print_is_added_to_its_file(place, tmp_path):
    place.streams[1].files["stderr"] = tmp_path / "stderr.log"
    (tmp_path / "stderr.log").write_text("a warning\n")
    place.note(5, BOOM, 1000.0)
    place.end(5, 1, 1000.0)

    keep_tracebacks(accounts(place.run))

    assert (tmp_path / "stderr.log").read_text() == f"a warning\nTraceback\n{BOOM}\n"
    assert accounts(place.run)[0].failure().log == str(tmp_path / "stderr.log")


@pytest.mark.parametrize("seen", [False, True])
def test_the_last_lines_of_a_file_are_shown_where_nobody_has_seen_them(place, tmp_path, seen):
    place.streams[0].files["stderr"] = tmp_path / "stderr.log"
    place.streams[0].shown = {"stderr"} if seen else set()
    (tmp_path / "stderr.log").write_text("".join(f"line {number}\n" for number in range(30)))
    place.end(4, 3, 1000.0)

    assert accounts(place.run)[0].failure().traceback.splitlines() == (
        [] if seen else [f"line {number}" for number in range(18, 30)]
    )
