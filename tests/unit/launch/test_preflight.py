"""The plan of a preflight, and its words."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as some

from accelerate.launch import preflight
from accelerate.launch.plan import LaunchPlan
from accelerate.launch.preflight import Link, Member, Report


@given(some.integers(0, 40))
def test_every_pair_plays_once_and_nobody_twice_in_a_round(count):
    ranks = [3 * rank for rank in range(count)]

    dealt = preflight.rounds(ranks)

    assert sorted(pair for each in dealt for pair in each) == list(itertools.combinations(ranks, 2))
    for each in dealt:
        players = [rank for pair in each for rank in pair]
        assert len(players) == len(set(players)) == count - count % 2, "all are busy, but one of an odd number"


def report(**changes) -> Report:
    members = tuple(Member(rank, rank // 2, f"node-{rank // 2}", 1000 + rank, "cuda:0") for rank in range(4))
    return Report(4, 2, "cpu:gloo,cuda:nccl", members=members, **changes)


WELL = (Link(0, 1, "", 1e-5, 4e10), Link(0, 2, "", 5e-5, 1e10), Link(1, 2, "", 6e-5, 1e10), Link(2, 3, "", 1e-5, 4e10))


def test_a_table_shows_what_is_bad_first():
    slow = preflight.with_slow_marked(
        report(links=(*WELL, Link(0, 3, "no data"), Link(1, 3, "", 5e-5, 2e9)), untried=1)
    )
    assert preflight.table(slow).splitlines() == [
        "4 processes on 2 machine(s), cpu:gloo,cuda:nccl",
        "pair   machines         latency  bandwidth",
        "0 - 3  node-0 - node-1  FAILED",
        "1 - 3  node-0 - node-1  50 us    2.00 GB/s  slow",
        "0 - 1  node-0           10 us    40.00 GB/s",
        "0 - 2  node-0 - node-1  50 us    10.00 GB/s",
        "1 - 2  node-0 - node-1  60 us    10.00 GB/s",
        "2 - 3  node-1           10 us    40.00 GB/s",
        "1 pairs were not tried after these failures",
    ]
    assert slow.as_json()["links"][-1]["slow"]
    assert json.loads(json.dumps(slow.as_json()))["problems"] == slow.problems


def test_a_large_run_shows_its_worst_pairs():
    links = [Link(a, b, "", 1e-5, 4e10) for a, b in itertools.combinations(range(4), 2)] * 20
    lines = preflight.table(report(links=tuple(links))).splitlines()
    assert len(lines) == 2 + preflight.SHOWN_PAIRS + 1
    assert lines[-1] == "and 56 pairs more, all well; --json shows them"


def test_a_broken_pair_is_named_with_what_to_set():
    (near,) = report(links=(Link(0, 1, "timed out\nmore"),)).problems
    assert near.startswith(
        "Rank 0 (node-0) and rank 1 (node-0) cannot talk over cpu:gloo,cuda:nccl: timed out\nSet NCCL_P2P_DISABLE=1"
    )
    (far,) = report(links=(Link(0, 2, "timed out"),)).problems
    assert "NCCL_SOCKET_IFNAME to the interface by which node-0 reaches node-1" in far
    assert "firewall" in far
    assert "GLOO_SOCKET_IFNAME=lo" in preflight.remedy("gloo", same_host=True)
    assert "GLOO_SOCKET_IFNAME to the interface" in preflight.remedy("gloo", same_host=False, hosts=("a", "b"))


def test_a_silent_rank_is_the_one_that_is_blamed():
    found = report(links=(*WELL, Link(0, 3, "timed out"), Link(1, 3, "no answer")), silent=(3,))
    (problem,) = found.problems
    assert problem.startswith(
        "Rank 3 (node-1) does not answer, for 20 s: process 1003 is stopped, stuck or gone. Pairs 0 - 3, 1 - 3 failed.\n"
    )
    assert "On node-1, look at `ps" in problem


def test_missing_ranks_are_told_by_machine():
    members = tuple(Member(rank, rank // 4, f"node-{rank // 4}", 1) for rank in (0, 1, 2, 3, 4, 6))
    found = Report(16, 4, "gloo", members=members)
    (problem,) = found.problems
    assert "6 of 16 came within 60 s" in problem
    assert "Missing: machine 2 (its ranks 8-11); machine 3 (its ranks 12-15); ranks 5, 7 of machine 1." in problem
    (single,) = Report(3, 1, "gloo", members=members[:2]).problems
    assert "Missing: machine 2 (its rank 2)." in single


@pytest.mark.parametrize(
    ("environ", "machines", "told"),
    [
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, 1, "SLURM_STEP_NUM_NODES=2 says that 2 machines (n[1-2])"),
        ({"SLURM_STEP_NUM_NODES": "2"}, 2, ""),
        ({"SLURM_NNODES": "2"}, 1, ""),
        ({"PET_NNODES": "1:4"}, 1, ""),
        ({"PET_NNODES": "3"}, 1, "PET_NNODES=3"),
        ({}, 1, ""),
    ],
)  # fmt: skip
def test_a_run_of_one_machine_among_many_is_noticed(environ, machines, told):
    text = preflight.too_small(2, machines, environ)
    assert told in text
    assert bool(text) == bool(told)


def test_a_preflight_comes_before_the_script_in_the_same_processes():
    plan = LaunchPlan(kind="elastic", argv=("python", "train.py", "--lr", "1"), env={"A": "1"}, processes_per_node=2)
    changed = preflight.before(plan, "/python")
    assert changed.argv == ("/python", "-u", str(preflight.SCRIPT), "--then", "python", "train.py", "--lr", "1")
    assert (changed.env, changed.kind, changed.processes_per_node) == (plan.env, plan.kind, 2)
    assert preflight.SCRIPT.is_file()

    plan = LaunchPlan(kind="inline", prefix=("mpirun", "-np", "2"), argv=("python", "train.py"), env={})
    script = ("/python", "-u", str(preflight.SCRIPT), "--then", "python", "train.py")
    assert preflight.before(plan, "/python").command == ("mpirun", "-np", "2", *script)


def test_processes_that_are_started_again_go_straight_to_the_script(monkeypatch):
    from accelerate.test_utils.scripts import preflight as program

    class Became(BaseException):
        """Stands for the end of this program."""

    def become(words):
        raise Became(words)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(program, "_become", become)

    with pytest.raises(Became, match="train.py"):
        program.main(["--then", "python", "train.py"])


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    import io

    from accelerate.test_utils.scripts.preflight import Progress

    stream = io.StringIO()
    for shown in (True, False):
        progress = Progress(shown, 1, stream)
        progress.tell("pairs: round 1 of 1")
        progress.close()
    assert stream.getvalue() == "preflight: pairs: round 1 of 1\n"


def test_progress_is_a_bar_in_a_terminal():
    import io

    pytest.importorskip("tqdm")
    from accelerate.test_utils.scripts.preflight import Progress

    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(True, 2, stream)
    progress.tell("pairs: round 1 of 1")
    progress.close()
    assert "preflight" in stream.getvalue()
    assert "50%" in stream.getvalue() or "1/2" in stream.getvalue()


def test_a_run_that_resumes_and_saves_on_signals_can_be_checked_first(monkeypatch, tmp_path):
    """These settings are the script's: the self test has nothing to continue, and saves nothing."""
    from accelerate.test_utils.scripts import preflight as program

    settings = {"ACCELERATE_RESUME": "auto", "ACCELERATE_SAVE_ON_SIGNALS": "SIGTERM", "ACCELERATE_USE_CPU": "true"}
    became = []
    monkeypatch.setattr(
        program, "_become", lambda words: became.append({name: os.environ.get(name) for name in settings})
    )
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    program.main(["--report", str(tmp_path / "report.json"), "--then", "python", "train.py"])

    assert len(json.loads((tmp_path / "report.json").read_text())["self_test"]) == 6
    assert became == [settings], "the script gets them back"


def test_a_quiet_preflight_says_nothing_when_all_is_well(monkeypatch, capfd):
    from accelerate.test_utils.scripts import preflight as program

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plan = LaunchPlan(kind="inline", argv=("python", "train.py"), env={}, quiet=True)
    assert preflight.before(plan, "/python").argv[3:] == ("--quiet", "--then", "python", "train.py")

    program.main(["--quiet"])

    assert capfd.readouterr() == ("", "")
