"""Runs under a real SLURM of two nodes. `make slurm` installs it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import meeting, slurm

pytestmark = pytest.mark.full
LIMIT_SECONDS = 240
LAUNCH = (sys.executable, "-m", "accelerate", "launch")
FOUR_MET = meeting.four("node1", "node2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    lacking = slurm.missing()
    if lacking:
        pytest.skip(lacking)
    folder = Path(tempfile.mkdtemp(prefix="accelerate-slurm-"))
    with slurm.two_nodes(folder) as environ:
        yield {name: environ[name] for name in ("SLURM_CONF", "PATH")}
    shutil.rmtree(folder)


def run(folder: Path, environ: dict[str, str], *command: str, status: tuple[int, ...] = (0,)) -> str:
    """Run a program to its end; return all that it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode in status, done.stdout
    return done.stdout


@pytest.fixture
def environ(tmp_path, cluster) -> dict[str, str]:
    return {**meeting.prepare(tmp_path), **cluster}


@pytest.mark.parametrize(
    "command",
    [
        ("-N2", "-n4", "--ntasks-per-node=2", *LAUNCH, "meet.py"),
        ("-N2", "-n4", "--ntasks-per-node=2", sys.executable, "meet.py"),
        ("-N2", "--ntasks-per-node=1", *LAUNCH, "--cpu", "-n", "4", "meet.py"),
    ],
    ids=["a task for each process", "no launcher", "a task for each node"],
)
def test_srun(tmp_path, environ, command):
    run(tmp_path, environ, "srun", *command)

    assert meeting.results(tmp_path) == FOUR_MET


def test_srun_with_tasks_that_are_spread_unevenly(tmp_path, environ):
    run(tmp_path, environ, "srun", "-N2", "-n3", "--distribution=block", *LAUNCH, "--cpu", "meet.py")

    found = meeting.results(tmp_path)
    assert {rank: told["met"] for rank, told in found.items()} == {str(rank): [0, 1, 2] for rank in range(3)}
    assert [found[str(rank)]["host"] for rank in range(3)] == ["node1", "node1", "node2"]


def test_sbatch_with_srun_inside_and_a_launch_of_its_own(tmp_path, environ):
    launch = shlex.join(LAUNCH)
    (tmp_path / "job").write_text(
        "#!/bin/bash\n"
        "#SBATCH -N2 --ntasks-per-node=2 -o job.out\n"
        f"srun {launch} meet.py\n"
        f"{launch} --cpu -n 1 meet.py alone\n"
        f"srun --ntasks-per-node=1 {launch} --cpu -n 1 meet.py each\n"
        "echo status $?\n"
    )

    run(tmp_path, environ, "sbatch", "job")
    deadline = time.monotonic() + LIMIT_SECONDS
    told = tmp_path / "job.out"
    while not (told.exists() and "\nstatus " in told.read_text()):
        assert time.monotonic() < deadline, told.exists() and told.read_text()
        time.sleep(0.2)

    text = told.read_text()
    assert "\nstatus 0" in text, text
    alone = {"met": [0], "local": 0, "host": "node1"}
    found = meeting.results(tmp_path)
    each = found.pop("each-0")
    assert {**each, "host": "node1"} == alone, "the flag asks for one process in each task"
    assert found == {**FOUR_MET, "alone-0": alone}
    assert "SLURM gave this job 2 nodes (SLURM_JOB_NUM_NODES), and this command uses one of them." in text
    assert "num_processes=1 (from --num_processes) contradicts" in text


@pytest.mark.skipif(shutil.which("script") is None, reason="script (util-linux) is not installed")
def test_a_shell_inside_an_allocation_is_no_job(tmp_path, environ):
    (tmp_path / "shell").write_text(
        f"#!/bin/bash\n[ $SLURM_PROCID = 0 ] || exit 0\n{shlex.join(LAUNCH)} --cpu meet.py\n"
    )
    (tmp_path / "shell").chmod(0o755)

    run(tmp_path, environ, "script", "-qec", f"srun -N2 -n4 --pty {tmp_path}/shell", "/dev/null")

    assert meeting.results(tmp_path) == {"0": {"met": [0], "local": 0, "host": "node1"}}

    told = run(tmp_path, environ, "salloc", "-N2", "-n4", *LAUNCH, "--cpu", "--dry-run", "meet.py")

    assert "processes    1, in the place of the launcher" in told


def test_a_failing_rank_is_named_and_ends_the_step(tmp_path, environ):
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(600)\n"
    )
    command = ("srun", "--kill-on-bad-exit=1", "-N2", "-n2", *LAUNCH, "--cpu", "-n", "2", "fail.py")

    # The highest of all tasks: that of the rank, or that of SLURM's SIGTERM if it reaches the other launcher first.
    told = run(tmp_path, environ, *command, status=(7, 143))

    assert "accelerate: rank 1 of 2 (pid " in told
    assert "exited with code 7" in told
    assert "node2: task 1: Exited with exit code 7" in told
