"""Which processes belong to a run, and that they are ended: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accelerate.launch import family
from accelerate.launch.family import Family
from accelerate.launch.guard import guarded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MARK = "ACCELERATE_TEST_MARK"
# Prints its id when it runs; with `deaf`, SIGTERM does not end it.
PROGRAM = """
import os, signal, subprocess, sys, time
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if "then" in sys.argv:  # starts another one, with the words behind
    words = sys.argv[sys.argv.index("then") + 1:]
    subprocess.Popen([sys.executable, "-I", "-S", __file__, *words], env={})
if "leaves" in sys.argv[:2]: os._exit(0)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, "-I", "-S", str(tmp_path / "program.py")]


def started(
    program: list[str], *words: str, mark: str = "", children: int = 0
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start it as torch's agent starts a worker; return it and the ids that it and its children print."""
    environ = {MARK: mark} if mark else {}
    process = subprocess.Popen(
        [*program, *words], env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(1 + children)]


def over(process: subprocess.Popen[str]) -> None:
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def alive(pid: int) -> bool:
    return family.look(pid) is not None


def test_a_worker_and_what_descends_from_it_are_ended_though_deaf(program):
    worker, pids = started(program, "deaf", "then", "deaf", children=1)
    known = Family(f"{MARK}=nobody")
    known.add([worker.pid])

    assert known.end(0.1) == set(pids)
    assert not any(map(alive, pids))
    over(worker)


def test_orphans_are_known_by_the_session_of_their_worker(program):
    worker, _ = started(program, "leaves", "then")
    assert worker.stdout is not None
    known = Family(f"{MARK}=nobody")
    known.add([worker.pid])
    worker.wait(10)
    orphan = int(worker.stdout.readline())

    assert known.end(5) == {orphan}
    assert not alive(orphan)
    worker.stdout.close()


def test_a_process_in_a_session_of_its_own_is_known_by_the_mark(program):
    own, pids = started(program, mark="/tmp/run-1/x")
    other, others = started(program, mark="/tmp/run-2/x")
    known = Family(f"{MARK}=/tmp/run-1")

    assert known.members() == set(pids)
    assert known.end(5) == set(pids)
    assert alive(others[0]), "that is another run's"
    other.kill()
    over(own)
    over(other)


def test_a_later_process_with_the_number_of_a_worker_is_left_alone(program):
    other, pids = started(program)
    known = Family(f"{MARK}=nobody")
    known.workers[other.pid] = "1"  # a worker of that number began long ago

    assert known.members() == set()
    other.kill()
    over(other)


LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
from accelerate.launch.family import Family
from accelerate.launch.guard import guarded
family = Family(f"{MARK}=" + sys.argv[1])
with guarded(family, Path(sys.argv[1]), {}) as guard:
    worker = subprocess.Popen(sys.argv[2:], env={MARK: sys.argv[1]}, start_new_session=True)
    family.add([worker.pid])
    guard.tell(family)
    worker.wait()
"""


def test_the_guard_ends_a_run_whose_launcher_was_killed(program, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "launcher.py").write_text(f"MARK = {MARK!r}\n{LAUNCHER}")
    words = [sys.executable, str(tmp_path / "launcher.py"), str(folder), *program, "deaf", "then", "deaf"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as launcher:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline()) for _ in range(2)]
        os.killpg(launcher.pid, signal.SIGKILL)  # the group: the guard is in none that others may end
        deadline = time.monotonic() + 20
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))
        assert launcher.stderr is not None
        told = launcher.stderr.read()
    assert told == f"accelerate: the launcher (pid {launcher.pid}) is gone; its processes were ended\n"
    assert not folder.exists()


def test_the_guard_goes_with_an_orderly_launcher(tmp_path):
    with guarded(Family(f"{MARK}=x"), tmp_path, {}) as guard:
        assert guard._process is not None
        pid = guard._process.pid
        assert alive(pid)
    assert not alive(pid)
    assert tmp_path.exists()


def test_a_launch_goes_on_where_no_guard_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with guarded(Family(f"{MARK}=x"), Path(tmp_path), {}) as guard:
        guard.tell(Family(f"{MARK}=x"))
