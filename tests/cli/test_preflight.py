"""`accelerate test` and `accelerate launch --preflight`, from a terminal's point of view."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from accelerate.commands import test as command
from accelerate.core.errors import LaunchError
from accelerate.test_utils.scripts import preflight
from tests.support.ranks import free_port

SCRIPT = """
import os, sys, time
import torch
from accelerate import Accelerator

if os.environ.get("RANK") == "1":
    time.sleep(1)  # rank 0 must find no traces of the preflight's rank 1 meanwhile

accelerator = Accelerator()
total = accelerator.reduce(torch.ones(1), "sum")
print("script", accelerator.process_index, int(total), sys.argv[1:])
accelerator.end_training()
"""

STOP_RANK_1 = """
import os, signal
if os.environ.get("RANK") == "1":
    from accelerate.collectives import pairs

    def stop(*_):
        print("stopping", os.getpid(), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

    pairs._sum = stop
"""


def accelerate(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    return subprocess.run(
        program, env={**os.environ, **environ}, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.fixture
def stopped(tmp_path) -> dict[str, str]:
    """Return variables with which rank 1 of a preflight is stopped in its first transfer."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text(STOP_RANK_1)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "custom"), os.environ.get("PYTHONPATH", "")])}


def test_json_is_all_that_stands_on_the_output():
    done = accelerate("test", "--json", "--cpu", "--num_processes", "2")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["problems"] == []
    assert [(link["first"], link["second"], link["problem"]) for link in found["links"]] == [(0, 1, "")]
    assert [check["name"] for check in found["self_test"]][:2] == ["state", "collectives"]
    assert "preflight: pairs: round 1 of 1\n" in done.stderr
    assert "preflight: self test: accumulation passed\n" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("count", ["1", "2", "4"])
def test_success_is_said_last(count):
    done = accelerate("test", "--cpu", "--num_processes", count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == command.PASSED
    assert "self test: 6 checks passed" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("as_json", [True, False])
def test_a_stopped_rank_ends_the_test_with_its_name_and_status(stopped, as_json):
    began = time.monotonic()

    words = ["test", "--cpu", "--num_processes", "2", "--time_limit", "4", *(["--json"] if as_json else [])]
    done = accelerate(*words, **stopped)

    assert time.monotonic() - began < 60
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == command.FAILED
    assert "Rank 1 (" in done.stderr
    assert "is stopped, stuck or gone. Pair 0 - 1 failed." in done.stderr
    assert "Traceback" not in done.stderr
    pid = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("stopping"))
    assert not psutil.pid_exists(pid)
    if as_json:
        found = json.loads(done.stdout[done.stdout.index("{") :])
        assert not found["ok"]
        assert found["silent"] == [1]
        assert len(found["problems"]) == 1


@pytest.mark.full
def test_a_failing_check_of_the_self_test_is_told(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    import accelerate.test_utils.scripts.test_script as script\n"
        "    def broken(accelerator): script.require(False, 'sums are wrong')\n"
        "    script.CHECKS = (broken, *script.CHECKS[1:])\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = accelerate("test", "--json", "--cpu", "--num_processes", "2", PYTHONPATH=path)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == command.FAILED
    assert "SelfTestError: The self test failed: sums are wrong" in done.stderr.splitlines()[-3]
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert "sums are wrong" in found["problems"][0]


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("agent_store", ["1", "0"], ids=["store of the launcher", "store of rank 0"])
def test_a_script_starts_after_its_preflight_in_the_same_processes(tmp_path, count, agent_store):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    done = accelerate(
        "launch", "--preflight", "--cpu", "--num_processes", str(count), str(script), "--lr", "1", "--", "b",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(1 - int(agent_store)),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"script {rank} {count} ['--lr', '1', '--', 'b']" for rank in range(count)
    ]
    assert "self test: 6 checks passed" in done.stderr


@pytest.mark.full
def test_a_script_does_not_start_when_its_preflight_fails(tmp_path, stopped):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("print", f"open({str(tmp_path / 'ran')!r}, 'w'); print"))

    done = accelerate("launch", "--preflight", "--cpu", "--num_processes", "2", str(script), **stopped)

    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert "PreflightFailed: Rank 1 (" in done.stderr.splitlines()[-1]


def test_every_word_behind_then_is_for_the_script():
    words = ["python", "-u", "train.py", "a", "--", "b", "--quiet", "--then", "--json"]

    options = preflight.options_from(["--time-limit", "3", "--then", *words])

    assert options.then == words
    assert (options.time_limit, options.quiet, options.json) == (3, False, False)
    assert preflight.options_from(["--quiet"]).then == []


def test_a_script_is_refused():
    with pytest.raises(ValueError, match="was given 'train.py', and takes no script"):
        command.test_command(command.test_command_parser().parse_args(["--json", "--cpu", "train.py", "--lr", "1"]))


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["--nump", "2"], "--num_processes"), (["--jsn"], "--json"), (["--time_limi=3"], "--time_limit")],
)
def test_a_typing_mistake_is_one_of_this_command(capsys, words, meant):
    with pytest.raises(SystemExit):
        command.main(words)
    said = capsys.readouterr().err

    assert f"{words[0].partition('=')[0]} is not a flag of accelerate test. Did you mean {meant!r}?" in said
    assert said.startswith("usage: accelerate test [")


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "1e300"])
def test_a_time_limit_that_cannot_be_kept_is_refused(limit):
    with pytest.raises(ValueError, match=r"--time_limit .* cannot be kept.\nAccepted: seconds, more than 0 and"):
        command.test_command(command.test_command_parser().parse_args(["--cpu", f"--time_limit={limit}"]))


def test_machines_that_do_not_come_fail_the_test_too(monkeypatch, capsys):
    def start(flags):
        raise LaunchError("What has come: machine 0; missing: machine 1.")

    monkeypatch.setattr(command, "launch_command", start)

    with pytest.raises(SystemExit) as caught:
        command.main(["--json", "--cpu"])

    shown = capsys.readouterr()
    assert caught.value.code == 1
    assert json.loads(shown.out) == {"ok": False, "problems": ["What has come: machine 0; missing: machine 1."]}
    assert shown.err.splitlines()[-1] == command.FAILED


@pytest.mark.full
def test_a_quiet_test_says_only_whether_it_passed(stopped):
    words = ["test", "--quiet", "--cpu", "--num_processes", "2", "--time_limit", "4"]

    done = accelerate(*words)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{command.PASSED}\n", "")
    done = accelerate(*words, **stopped)
    assert (done.returncode, done.stderr) == (1, f"{command.FAILED}\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_the_flags_may_come_from_a_program(capsys, as_json):
    command.test_command(argparse.Namespace(config_file=None, cpu=True, dry_run=True, num_processes=2, json=as_json))

    printed = capsys.readouterr().out
    assert (json.loads(printed)["processes"]["total"] == 2) if as_json else ("processes    2, 2 on each" in printed)


def test_a_plan_is_printed_and_nothing_run(capsys):
    command.main(["--dry-run", "--cpu", "--num-processes", "3"])
    shown = capsys.readouterr().out
    assert "processes    3" in shown
    assert Path(shown.splitlines()[0].split()[3]).name == "preflight.py"
    assert command.PASSED not in shown


def test_ranks_that_somebody_else_has_placed_pass_on_to_the_script_quietly(tmp_path):
    (tmp_path / "s.py").write_text(SCRIPT)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "accelerate", "launch", "--cpu", "--preflight", str(tmp_path / "s.py")]

    ranks = [
        subprocess.Popen(
            words,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=250) for child in ranks]

    assert [child.returncode for child in ranks] == [0, 0], said
    assert [out for out, _ in said] == ["script 0 2 []\n", "script 1 2 []\n"]
    assert "self test: 6 checks passed" in said[0][1]
    assert "[c10d]" not in said[0][1]
    assert said[1][1] == "", "nothing of torch's"
