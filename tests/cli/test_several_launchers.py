"""Launchers that meet, as users run them: workers that are started again, machines that are missing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.ranks import free_port

LAUNCH = (sys.executable, "-m", "accelerate", "launch", "--cpu")
FAIL_AGAIN_AND_AGAIN = r"""
import os
import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo")
dist.barrier()
if attempt < int(os.environ["FAILURES"]) and dist.get_rank() == 1:
    os._exit(3)
dist.barrier()
os.write(1, f"rank {dist.get_rank()} ended in attempt {attempt}\n".encode())  # at once: print() may be cut in two
os._exit(0)
"""


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    (tmp_path / "again.py").write_text(FAIL_AGAIN_AND_AGAIN)
    return {**kept, "HF_HOME": str(tmp_path / "hub"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def check_restarts(folder: Path, environ: dict[str, str], failures: int, *words: str) -> None:
    command = [*LAUNCH, "-n", "2", "--max_restarts", str(failures), *words, "again.py"]

    done = subprocess.run(
        command,
        cwd=folder,
        env={**environ, "FAILURES": str(failures)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    ended = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert ended == [f"rank {rank} ended in attempt {failures}" for rank in range(2)]
    told = [line for line in done.stderr.splitlines() if line.startswith(("accelerate: rank", "accelerate: starting"))]
    assert [line.rpartition(") ")[2] for line in told] == [
        text
        for attempt in range(2, failures + 2)
        for text in (
            "exited with code 3; what it printed stands above.",
            f"accelerate: starting again: attempt {attempt} of {failures + 1}",
        )
    ]


def test_workers_that_had_met_meet_again_after_a_failure(tmp_path, environ):
    check_restarts(tmp_path, environ, 2)


@pytest.mark.full
@pytest.mark.parametrize("run", range(5))
@pytest.mark.parametrize("port", [False, True])
def test_workers_meet_again_each_time(tmp_path, environ, port, run):
    check_restarts(tmp_path, environ, 4, *(["--main_process_port", str(free_port())] if port else []))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rdzv_conf", "timeout=1"), "What has come: machine 0 ("),
        (("--rdzv_backend", "c10d", "--rdzv_conf", "join_timeout=1"), "What has come: machine 0 ("),
    ],
)
def test_machines_that_do_not_come_are_named(tmp_path, environ, words, told):
    several = ("--num_machines", "3", "--machine_rank", "0", "--main_process_ip", "127.0.0.1")
    command = [*LAUNCH, "-n", "3", *several, "--main_process_port", str(free_port()), *words, "again.py"]

    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "missing: machine 1, machine 2." in done.stderr
    assert "Traceback" not in done.stderr


# A machine goes while the others run ----------------------------------------------------------------------------------

# Scripts without torch, which start at once. Rank 1, the other machine's, fails when it is told to.
FAIL_WHEN_TOLD = """
import os, time
import accelerate
rank = os.environ["RANK"]
open(f"up_{rank}", "w").close()
while not os.path.exists("fail"):
    time.sleep(0.02)
if rank == "1":
    raise ERROR
time.sleep(600)
"""
PATIENCE_SECONDS = 60
SEEN_SECONDS = 1.5
"""After what time a launcher has surely looked at its workers; nothing tells from outside that it has."""


# Rank 0 ends, or works on without a word to the other, and rank 1 fails in the end.
FAIL_LATE = """
import os, time
rank = os.environ["RANK"]
open(f"up_{rank}", "w").close()
while not os.path.exists("fail") and (rank == "1" or WORKS_ON):
    time.sleep(0.02)
if rank == "1":
    os._exit(3)
while WORKS_ON:
    time.sleep(0.02)
"""


class Machines:
    """Two launchers on this machine that take each other for machines."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder, self.environ = folder, {**environ, "TMPDIR": str(folder)}
        self.port = free_port()
        self.launchers: list[subprocess.Popen[str]] = []

    def start(self, script: str, *flags: str) -> None:
        (self.folder / "fail.py").write_text(script)
        several = ("-n", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(self.port), *flags)
        for rank in range(2):
            words = [*LAUNCH, *several, "--machine_rank", str(rank), "fail.py"]
            self.launchers.append(
                subprocess.Popen(words, cwd=self.folder, env=self.environ, stderr=subprocess.PIPE, text=True)
            )
        self.until(lambda: all((self.folder / f"up_{rank}").exists() for rank in range(2)))

    def until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def until_first_waits(self) -> None:
        """Let the ranks of the first one end, and let it see that: its process holds the place where they meet."""
        self.until(lambda: not list(workers_of(self.launchers[0])))
        with pytest.raises(subprocess.TimeoutExpired):
            self.launchers[0].wait(SEEN_SECONDS)

    def first_ends(self) -> tuple[int, str]:
        _, errors = self.launchers[0].communicate(timeout=PATIENCE_SECONDS)
        return self.launchers[0].returncode, errors

    def second_ends(self) -> tuple[int, str]:
        (self.folder / "fail").touch()
        _, errors = self.launchers[1].communicate(timeout=PATIENCE_SECONDS)
        return self.launchers[1].returncode, errors


@pytest.fixture
def machines(tmp_path, environ) -> Iterator[Machines]:
    made = Machines(tmp_path, environ)
    yield made
    for launcher in made.launchers:
        launcher.kill()
        launcher.wait()
        assert launcher.stderr is not None
        launcher.stderr.close()
    made.until(lambda: not list(tmp_path.glob("accelerate-launch-*")))  # the guards have ended what was left


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_machine_that_has_gone_silent_does_not_hold_up_one_that_failed(machines):
    machines.start(FAIL_WHEN_TOLD.replace("ERROR", "ValueError('boom')"), "--num_machines", "2")
    machines.launchers[0].send_signal(signal.SIGSTOP)  # it still accepts connections, and never replies

    status, errors = machines.second_ends()

    assert status == 1
    assert re.match(r"accelerate: rank 1 of 2 .* exited with code 1: ValueError: boom", errors.splitlines()[-1])


def test_a_machine_that_has_gone_with_the_meeting_point_is_named(machines):
    flags = ("--num_machines", "1:2", "--rdzv_backend", "c10d", "--max_restarts", "2")
    machines.start(FAIL_WHEN_TOLD.replace("ERROR", "RuntimeError('Connection closed by peer')"), *flags)
    machines.launchers[0].kill()
    machines.launchers[0].wait()

    status, errors = machines.second_ends()

    lines = errors.splitlines()
    assert status == 1
    # Torch may have been asking the store in that very moment; then it prints pages first, which nothing can prevent.
    where = f"127.0.0.1:{machines.port}, where the machines meet"
    assert f"accelerate: {where}, does not answer: has that machine gone?" in lines
    assert re.match(r"accelerate: rank 1 of 2 .* exited with code 1: RuntimeError: Connection closed", lines[-1])
    assert errors.count("Traceback") == 1


WAYS_TO_MEET = pytest.mark.parametrize("way", [(), ("--rdzv_backend", "c10d")], ids=["static", "c10d"])


@WAYS_TO_MEET
@pytest.mark.parametrize("works_on", [False, True], ids=["ended", "works"])
def test_a_machine_hears_of_a_failure_elsewhere_when_its_ranks_have_ended_and_while_they_work(machines, works_on, way):
    machines.start(FAIL_LATE.replace("WORKS_ON", str(works_on)), "--num_machines", "2", *way)
    if not works_on:
        machines.until_first_waits()

    status, _ = machines.second_ends()
    status_of_first, errors = machines.first_ends()

    assert status == status_of_first == 3
    assert re.match(r"accelerate: rank 1 of 2 .* exited with code 3", errors.splitlines()[-1]), errors


NAMES_THE_OTHER = """
import os, time
from accelerate.core.errors import CheckpointError

rank = os.environ["RANK"]
open(f"up_{rank}", "w").close()
while not os.path.exists("fail"):
    time.sleep(0.02)
if rank == "0":
    error = CheckpointError("What failed: rank 1: boom")
    error.arose_on = (1,)
    raise error
time.sleep(5)  # as an exception waits for DataLoader workers before anybody sees it
raise ValueError("boom")
"""


def test_a_machine_waits_for_the_word_of_a_rank_elsewhere_that_its_own_have_named(machines):
    machines.start(NAMES_THE_OTHER, "--num_machines", "2")

    status, errors = machines.second_ends()
    status_of_first, errors_of_first = machines.first_ends()

    assert (status, status_of_first) == (1, 1)
    for text in (errors, errors_of_first):
        last = text.splitlines()[-1]
        assert re.match(r"accelerate: rank 1 of 2 .* exited with code 1: ValueError: boom", last), text


def test_the_stop_button_is_heard_while_a_machine_waits_for_others_to_end(machines):
    machines.start(FAIL_LATE.replace("WORKS_ON", "False"), "--num_machines", "2")
    machines.until_first_waits()

    machines.launchers[0].send_signal(signal.SIGINT)
    status, _ = machines.first_ends()

    assert status == 130


def test_machines_that_end_one_after_the_other_end_well(machines):
    machines.start(FAIL_LATE.replace("WORKS_ON", "False").replace("os._exit(3)", "os._exit(0)"), "--num_machines", "2")
    machines.until_first_waits()

    assert machines.second_ends() == (0, "")
    assert machines.first_ends() == (0, "")


def test_a_failure_elsewhere_starts_the_ranks_of_a_machine_again_that_had_ended(machines):
    script = FAIL_LATE.replace("WORKS_ON", "False") + "print(os.environ['TORCHELASTIC_RESTART_COUNT'])"
    script = script.replace('rank == "1":', 'rank == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":')
    machines.start(script, "--num_machines", "2", "--max_restarts", "1")
    machines.until_first_waits()

    status, errors = machines.second_ends()
    status_of_first, errors_of_first = machines.first_ends()

    assert status == status_of_first == 0, errors + errors_of_first
    for text in (errors, errors_of_first):
        assert re.search(r"accelerate: rank 1 of 2 .* exited with code 3", text)
        assert text.count("accelerate: starting again: attempt 2 of 2") == 1


def workers_of(launcher: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Yield the workers that are running."""
    for child in psutil.Process(launcher.pid).children():
        with suppress(psutil.NoSuchProcess):  # one that has ended and not been collected is none either
            if "fail.py" in child.cmdline():
                yield child


FAIL_IN_TURN = """
import os, time
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
open(f"up_{rank}", "w").close()
while not os.path.exists("fail"):
    time.sleep(0.02)
if (attempt, rank) in [("0", "1"), ("1", "0")]:
    os._exit(3)
if attempt < "2":
    time.sleep(600)  # the launcher ends it
"""


def test_machines_count_each_failure_once_whichever_of_them_it_was_on(machines):
    machines.start(FAIL_IN_TURN, "--num_machines", "2", "--max_restarts", "2")

    status, errors = machines.second_ends()
    status_of_first, errors_of_first = machines.first_ends()

    assert status == status_of_first == 0, errors + errors_of_first
    for text in (errors, errors_of_first):
        assert re.findall("accelerate: starting again: attempt (.*)", text) == ["2 of 3", "3 of 3"]
        assert re.findall(r"accelerate: rank (\d) of 2 .* exited with code 3", text) == ["1", "0"]
