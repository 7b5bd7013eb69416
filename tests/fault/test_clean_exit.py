"""Every rank ends with the status its script gave it: 0 after finished work, and a failure's own status otherwise.

The cause of the abort at exit and the cure stand in `accelerate.runtime.departure`. `exits.py` starts the ranks and lets
their interpreters finalise. Its `--provoke` holds the GIL from the last collective on, which makes a rare event a common
one: without the cure 92 of 100 runs of two processes and 99 of 100 of four aborted on a busy machine with two cores, and
about a third on a quiet one (torch 2.13, Python 3.11). With the cure it has to be none.

The full form, `pytest -m full tests/fault/test_clean_exit.py`, ends 200 runs of two and 200 of four processes, half of
them without `end_training()`. `--unprotected` shows the rate without the cure:

    python tests/fault/exits.py --runs 200 --world 4 --provoke --unprotected
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from accelerate.runtime import departure

EXITS = Path(__file__).with_name("exits.py")
ABORTED = -6


def run_exits(*options: str, timeout: float = 240) -> tuple[list[list[int]], list[list[float]], str, str]:
    """Return (statuses of the ranks of each run, their seconds, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, str(EXITS), *options],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [run["statuses"] for run in runs], [run["seconds"] for run in runs], done.stdout, done.stderr


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ("--end", "forgets", "--provoke")),
        (4, ("--end", "forgets", "--provoke")),
        (2, ("--end", "ends")),
        (4, ("--end", "ends")),
        (2, ("--end", "destroys", "--provoke")),
        (2, ("--end", "attached", "--provoke")),
    ],
    ids=["forgets-2", "forgets-4", "ends-2", "ends-4", "destroys-2", "attached-2"],
)
def test_finished_work_ends_with_status_0(world: int, options: tuple[str, ...]) -> None:
    statuses, _, _, stderr = run_exits("--runs", "3", "--world", str(world), *options)
    assert statuses == [[0] * world] * 3, stderr


def test_other_exit_handlers_run() -> None:
    _, _, stdout, _ = run_exits("--world", "2")
    for rank in range(2):
        assert f"rank {rank}: handler registered before" in stdout
        assert f"rank {rank}: handler registered after" in stdout


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        ("exception", 1, "RuntimeError: rank 0 failed on purpose"),
        ("exit_3", 3, ""),
        ("exit_text", 1, "rank 0 leaves with a text"),
        ("os_exit", 5, ""),
    ],
)
def test_a_failure_keeps_its_status(end: str, status: int, text: str) -> None:
    statuses, seconds, _, stderr = run_exits("--end", end, timeout=60)
    assert statuses[0][0] == status, stderr
    assert text in stderr
    assert seconds[0][0] < 20


def test_a_failing_rank_does_not_wait_for_a_collective_that_never_ends() -> None:
    statuses, seconds, _, stderr = run_exits("--end", "in_flight", timeout=120)
    assert statuses[0][0] == 1, stderr
    assert "its last collective never ends" in stderr
    assert seconds[0][0] < seconds[0][1] - 4, "rank 0 waited for rank 1, which slept 12 s"


def test_torchrun_reports_the_rank_that_failed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom accelerate import Accelerator\na = Accelerator()\nsys.exit(3 * a.process_index)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr
    assert "rank      : 1" in done.stderr


def test_settling_without_gloo_threads_is_immediate() -> None:
    begin = time.monotonic()
    assert departure.settle(1)
    assert time.monotonic() - begin < 0.5


def test_settling_waits_for_a_thread_that_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # A wait with a deadline is what a thread inside a collective, or one that wants the GIL, shows.
    go = threading.Event()
    worker = threading.Thread(target=go.wait, args=(30,))
    worker.start()
    task = Path("/proc/self/task") / str(worker.native_id)
    monkeypatch.setattr(departure, "_workers", lambda: {task.name: (task / "syscall").read_text()})
    time.sleep(0.05)
    begin = time.monotonic()
    assert not departure.settle(0.2)
    assert time.monotonic() - begin >= 0.2
    go.set()
    worker.join()


def test_a_thread_that_sleeps_without_deadline_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    worker = threading.Thread(target=go.wait)
    worker.start()
    task = Path("/proc/self/task") / str(worker.native_id)
    monkeypatch.setattr(departure, "_workers", lambda: {task.name: (task / "syscall").read_text()})
    assert departure.settle(5)
    go.set()
    worker.join()


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [2, 4])
def test_200_runs_end_with_status_0(world: int) -> None:
    common = ("--runs", "100", "--world", str(world))
    forgets, _, _, stderr = run_exits(*common, "--end", "forgets", "--provoke", timeout=1700)
    ends, _, _, more = run_exits(*common, "--end", "ends", timeout=1700)
    bad = [run for run in forgets + ends if any(run)]
    assert len(forgets + ends) == 200
    assert not bad, (
        f"{len(bad)} of 200 runs, {sum(run.count(ABORTED) for run in bad)} aborts\n{stderr[-2000:]}{more[-2000:]}"
    )
