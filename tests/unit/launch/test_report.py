"""What is said about a failed run."""

from __future__ import annotations

import pytest

from accelerate.launch.report import HEAD_LINES, TAIL_LINES, Failure, WorkersFailed, describe, exit_status

BOOM = "Traceback\n  File x\nValueError: boom"


def test_the_report_ends_with_the_first_failure_and_leaves_out_ranks_that_were_ended():
    failures = [Failure(1, 11, 1, BOOM), Failure(2, 12, -11), Failure(0, 10, -15), Failure(3, 13, -9, kind="ended")]

    lines = describe(failures, 4).splitlines()

    assert lines[0] == "accelerate: also, rank 2 (pid 12) was ended by SIGSEGV"
    assert lines[1:4] == ["[rank 1] Traceback", "[rank 1]   File x", "[rank 1] ValueError: boom"]
    assert lines[4].startswith("accelerate: rank 1 of 4 (pid 11 on ")
    assert lines[4].endswith(") exited with code 1: ValueError: boom")
    assert len(lines) == 5


def test_what_is_alike_is_one_line():
    lost = [Failure(rank, rank, 1, "RuntimeError: gone", kind="lost") for rank in (0, 3, 4, 5)]
    same = [Failure(rank, rank, 1, "ImportError: no x") for rank in (6, 7)]

    lines = describe([Failure(1, 1, 3), *lost, *same], 8).splitlines()

    assert lines[:2] == [
        "accelerate: also, ranks 0 and 3-5 fell because another rank had gone",
        "accelerate: also, ranks 6-7 exited with code 1: ImportError: no x",
    ]
    assert len(lines) == 3


def test_thousands_of_ranks_are_counted():
    others = [Failure(rank, None, rank % 100 + 4, kind="") for rank in range(1, 4000, 2)]

    lines = describe([Failure(0, 1, 3), *others], 4000).splitlines()

    assert lines[0] == "accelerate: also, 46 further kinds of failure on other ranks"
    assert len(lines) == 6
    assert all(len(line) < 200 for line in lines)
    assert "40 ranks (" in lines[1]


def test_a_long_traceback_keeps_its_ends():
    text = "\n".join(map(str, range(1000)))

    lines = describe([Failure(0, 1, 1, text)], 1).splitlines()

    assert lines[0] == "[rank 0] 0"
    assert lines[HEAD_LINES] == f"[rank 0] ... {1000 - HEAD_LINES - TAIL_LINES} lines ..."
    assert lines[-2] == "[rank 0] 999"


@pytest.mark.parametrize(
    ("failure", "ending"),
    [
        (Failure(0, 5, 3), "(pid 5 on here) exited with code 3; what it printed stands above."),
        (Failure(0, 5, -9), "was ended by SIGKILL: on Linux this is most often the system running out of memory"),
        (Failure(0, 5, -11, "Fatal Python error"), "was ended by SIGSEGV; where it was stands above."),
        (Failure(0, 5, -11), "was ended by SIGSEGV."),
        (Failure(0, 5, -99), "was ended by signal 99."),
        (Failure(0, 5, 1, "E: x", log="logs/rank_0/stderr.log"), "on here, log logs/rank_0/stderr.log) exited with"),
        (Failure(0, None, 1, "E: x", host="node-b"), "accelerate: rank 0 of 2 (on node-b) exited with code 1: E: x"),
    ],
)
def test_the_last_line_says_how(monkeypatch, failure, ending):
    monkeypatch.setattr("socket.gethostname", lambda: "here")

    assert ending in describe([failure], 2).splitlines()[-1]


def test_a_rank_that_left_early_is_mentioned_where_nobody_else_can_be_blamed():
    lost = Failure(0, 5, 1, "RuntimeError: Connection closed by peer", kind="lost")

    assert "rank 1 had ended before, with code 0: did a loop end early there?" in describe([lost], 2, gone=[1])
    assert "had ended before" not in describe([Failure(0, 5, 1, BOOM)], 2, gone=[1])


def test_a_meeting_point_that_has_gone_is_named_above_the_traceback():
    lines = describe([Failure(0, 5, 1, BOOM, kind="lost")], 2, silent="node-a:29500").splitlines()

    assert lines[0] == "accelerate: node-a:29500, where the machines meet, does not answer: has that machine gone?"


def test_quietly_only_what_the_worker_said_is_shown():
    failed = WorkersFailed.among([Failure(1, 5, 1, BOOM), Failure(0, 4, 3)], 2)

    assert failed.shown(quiet=True) == "[rank 1] Traceback\n[rank 1]   File x\n[rank 1] ValueError: boom"
    assert failed.shown(quiet=False) == str(failed)
    assert not WorkersFailed.among([Failure(0, 4, 3)], 2).shown(quiet=True)


@pytest.mark.parametrize(("exitcode", "status"), [(0, 0), (3, 3), (-9, 137), (-15, 143)])
def test_the_status_of_a_signal_is_what_a_shell_shows(exitcode, status):
    assert exit_status(exitcode) == status
