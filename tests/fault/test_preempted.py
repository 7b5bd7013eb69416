"""Runs that are asked to stop, under the real launcher: `preempted.py` sends the signals, at exact places."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.launch.report import RunPreempted

SCRIPT = Path(__file__).with_name("preempted.py")
SAVED = "the run saved itself in "


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate", "launch", "--cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


def ended(done: subprocess.CompletedProcess[str]) -> tuple[str, ...]:
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ended with"))
    return tuple(line.split()[2:4])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, ...]:
    return ended(launch(str(SCRIPT), str(tmp_path_factory.mktemp("whole"))))


def stop(tmp_path: Path, first: int, name: str, to: str, *flags: str) -> Path:
    words = (str(SCRIPT), str(tmp_path), "--name", name, "--to", to, "--place", "step 1 2")
    stopped = launch("--num_processes", str(first), *flags, *words)
    assert stopped.returncode == 75, stopped.stderr
    told = [line for line in stopped.stderr.splitlines() if not line.startswith("Global batch")]
    checkpoint = tmp_path / "checkpoints" / "checkpoint_0"
    assert len(told) == 1, stopped.stderr
    assert f"received {name}: {SAVED}{checkpoint}" in told[0]
    assert checkpoint.parent.exists()
    assert len(list(checkpoint.parent.iterdir())) == 1, "and not started again"
    return checkpoint


def stop_and_continue(
    tmp_path: Path, whole: tuple[str, ...], first: int, then: int, name: str, to: str, *flags: str
) -> None:
    checkpoint = stop(tmp_path, first, name, to, *flags)
    continued = launch("--num_processes", str(then), "--resume", "auto", str(SCRIPT), str(tmp_path))
    assert ended(continued) == whole
    assert continued.stderr.count(f"accelerate: the run continues from {checkpoint}") == 1


@pytest.mark.parametrize(
    ("first", "then", "name", "to", "flags"),
    [(2, 1, "SIGTERM", "1", ("--max_restarts", "2"))],
    ids=["with-restarts"],
)
def test_a_launched_run_that_was_stopped_goes_on(tmp_path, whole, first, then, name, to, flags):
    stop_and_continue(tmp_path, whole, first, then, name, to, *flags)


def test_a_signal_to_the_launcher_reaches_the_run(tmp_path):
    stop(tmp_path, 2, "SIGUSR1", "launcher")


@pytest.mark.full
def test_the_workers_of_loaders_live_until_the_run_has_saved_itself(tmp_path):
    words = (str(SCRIPT), str(tmp_path), "--to", "launcher", "--place", "step 1 2", "--workers", "1")
    stopped = launch("--num_processes", "2", *words)
    assert stopped.returncode == 75, stopped.stderr
    assert SAVED in stopped.stderr


@pytest.mark.full
@pytest.mark.parametrize("to", ["0", "last", "all", "launcher"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(("first", "then"), [(2, 3), (3, 2), (3, 3), (1, 3)])
def test_whoever_gets_the_signal(tmp_path, whole, first, then, name, to):
    if first == 1 and to in ("launcher", "last"):
        pytest.skip("a single process takes the place of the launcher")
    stop_and_continue(tmp_path, whole, first, then, name, str(first - 1) if to == "last" else to)


def test_the_launcher_as_a_function_says_so_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    words = ["--cpu", "--num_processes", "1", str(SCRIPT), str(tmp_path), "--place", "step 0 1"]
    with pytest.raises(RunPreempted) as raised:
        launch_command(launch_command_parser().parse_args(words))
    assert raised.value.status == 75


def test_a_run_that_does_not_save_itself_in_time_is_killed(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from accelerate import Accelerator\n"
        "from accelerate.utils import ProjectConfiguration\n"
        "project = ProjectConfiguration(sys.argv[1], automatic_checkpoint_naming=True)\n"
        "accelerator = Accelerator(project_config=project)\n"
        "accelerator.wait_for_everyone()\n"
        "if accelerator.is_main_process:\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    words = ("--num_processes", "2", "--grace_seconds", "1", "--save_on_signals", "TERM", str(script), str(tmp_path))
    done = launch(*words)
    assert done.returncode == 128 + signal.SIGTERM
    assert "the launcher received SIGTERM and ended the workers" in done.stderr


def test_the_exception_lets_finally_run_and_ends_the_script_with_75(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from accelerate import Accelerator\n"
        "from accelerate.utils import Preempted, ProjectConfiguration\n"
        "project = ProjectConfiguration(sys.argv[1], automatic_checkpoint_naming=True, save_on_signals=('SIGTERM',))\n"
        "accelerator = Accelerator(cpu=True, project_config=project)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n"
        "    accelerator.check_preemption()\n"
        "except Preempted as left:\n"
        "    print('caught', left.folder.name, left.reason)\n"
        "    raise\n"
        "finally:\n"
        "    print('finally')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["caught checkpoint_0 rank 0 received SIGTERM", "finally"]
    assert "Traceback" not in done.stderr


def test_an_iterator_that_is_left_open_until_the_end_of_the_process_is_no_trouble(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "from accelerate.utils import ProjectConfiguration\n"
        "project = ProjectConfiguration(sys.argv[1], automatic_checkpoint_naming=True, save_on_signals=('SIGTERM',))\n"
        "accelerator = Accelerator(cpu=True, project_config=project)\n"
        "loader = iter(accelerator.prepare(torch.utils.data.DataLoader(torch.arange(9))))\n"
        "next(loader)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "")
