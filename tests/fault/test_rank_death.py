"""A rank dies, or the launcher, or somebody stops the run: what is said, and that nothing is left. See `rank_death.py`.

The full table, `make rank-death RUNS=100`, holds the launcher to 5 seconds. A busy machine is slower, so these rows are
held to what a rank's end can take at most.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from accelerate.launch import signals

from .rank_death import ROWS, Row, carry_out, environment, marked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the marks of processes")
PATIENCE_SECONDS = 60


@pytest.mark.parametrize(
    "row",
    [Row("kill", 0, 2, True), pytest.param(Row("forward", 1, 2, False), marks=pytest.mark.full)],
    ids=["killed-with-workers-and-a-save", "exception"],
)
def test_a_rank_that_dies_is_named_and_nothing_is_left(tmp_path, row):
    outcome = carry_out(row, tmp_path)

    assert [problem for problem in outcome.problems if not problem.startswith("took")] == [], outcome.output
    assert outcome.seconds < PATIENCE_SECONDS


@pytest.mark.full
@pytest.mark.timeout(0)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_way_to_die(tmp_path, row):
    outcome = carry_out(row, tmp_path)

    assert outcome.problems == (), outcome.output


# Scripts without torch, which start at once. Each rank has a child in a session of its own, deaf to SIGTERM, and says
# in a file that it runs.
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(120)"
RANKS = f"""
import os, signal, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", {CHILD!r}], start_new_session=True, stdout=subprocess.PIPE
)
child.stdout.readline()
def say(number, frame):
    with open(f"signal_{{os.environ['RANK']}}", "a") as file:
        print(signal.Signals(number).name, file=file)
def deaf():
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), say)
"""
WAIT = """
open(f"ready_{os.environ['RANK']}", "w").close()
while True:
    time.sleep(0.05)
"""


class Launch:
    """A launch of a script in a folder, and the processes that belong to it."""

    def __init__(self, folder: Path, script: str, *flags: str, world: int = 2) -> None:
        self.folder, self.mark, self.world = folder, uuid.uuid4().hex, world
        (folder / "script.py").write_text(script)
        words = [
            sys.executable,
            "-m",
            "accelerate",
            "launch",
            "--cpu",
            "--num_processes",
            str(world),
            *flags,
            "script.py",
        ]
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**environment(self.mark), "TMPDIR": str(folder)},
        )

    def ready(self) -> None:
        self.until(lambda: all((self.folder / f"ready_{rank}").exists() for rank in range(self.world)))

    def until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, errors

    def left(self) -> list[psutil.Process]:
        return [process for process in marked(self.mark) if process.pid != os.getpid()]


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    started: list[Launch] = []
    yield started
    for launch in started:
        for process in launch.left():
            process.kill()
        launch.process.communicate()


def test_the_launchers_own_death_takes_everything_along(tmp_path, launches):
    launch = Launch(tmp_path, RANKS + "deaf()" + WAIT)
    launches.append(launch)
    launch.ready()
    assert len(launch.left()) > 4

    os.killpg(launch.process.pid, signal.SIGKILL)
    began = time.monotonic()
    launch.until(lambda: not launch.left())

    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    launch.until(lambda: not list(tmp_path.glob("accelerate-launch-*")))
    assert "its processes were ended" in launch.ended()[1]


@pytest.mark.parametrize(
    "sent",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_signal_is_passed_on_and_the_second_one_stops_at_once(tmp_path, launches, sent):
    launch = Launch(tmp_path, RANKS + "deaf()" + WAIT, "--grace_seconds", "600")
    launches.append(launch)
    launch.ready()

    launch.process.send_signal(sent)
    launch.until(lambda: len(list(tmp_path.glob("signal_*"))) == 2)
    assert launch.process.poll() is None, "the ranks have time to end"
    time.sleep(signals.ECHO_SECONDS)
    launch.process.send_signal(signal.SIGINT)
    status, errors = launch.ended()

    assert status == 128 + sent
    assert errors == f"accelerate: the launcher received {sent.name} and ended the workers\n"
    assert {file.read_text() for file in tmp_path.glob("signal_*")} == {f"{sent.name}\n"}
    assert launch.left() == []
    assert list(tmp_path.glob("accelerate-launch-*")) == []


SAVES = """
def save(number, frame):
    say(number, frame)
    time.sleep(1)
    open(f"saved_{os.environ['RANK']}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGHUP, save)
"""


def test_a_connection_that_breaks_leaves_ranks_the_time_to_save(tmp_path):
    """The shell tells its jobs, and ends; then the system tells whoever is in the foreground."""
    import pty

    words = [sys.executable, "-m", "accelerate", "launch", "--cpu", "--num_processes", "2", "script.py"]
    (tmp_path / "script.py").write_text(RANKS + SAVES + WAIT)
    mark = uuid.uuid4().hex
    shell, terminal = pty.fork()
    if shell == 0:
        try:
            os.chdir(tmp_path)
            environ = {**environment(mark), "TMPDIR": str(tmp_path), "HISTFILE": "/dev/null"}
            os.execvpe("bash", ["bash", "--norc", "-i"], environ)
        finally:
            os._exit(127)
    try:
        os.write(terminal, f"{shlex.join(words)}\n".encode())
        wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2)
        os.close(terminal)
        wait_for(lambda: not [process for process in marked(mark) if process.pid != os.getpid()])
    finally:
        for process in marked(mark):
            if process.pid != os.getpid():
                process.kill()
        os.waitpid(shell, 0)

    assert len(list(tmp_path.glob("saved_*"))) == 2


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Other signals are one wish within ECHO_SECONDS only, which a busy machine may exceed: see test_signals.py.
@pytest.mark.parametrize("gap_seconds", [0.0005, 0.005, 0.3])
def test_a_hangup_that_is_told_twice_is_one_wish(tmp_path, launches, gap_seconds):
    launch = Launch(tmp_path, RANKS + SAVES + WAIT)
    launches.append(launch)
    launch.ready()

    launch.process.send_signal(signal.SIGHUP)
    time.sleep(gap_seconds)
    launch.process.send_signal(signal.SIGHUP)
    status, errors = launch.ended()

    assert status == 128 + signal.SIGHUP
    assert errors == "accelerate: the launcher received SIGHUP and ended the workers\n"
    assert len(list(tmp_path.glob("saved_*"))) == 2


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_while_a_failed_attempt_is_ended_is_heard_and_nothing_starts_again(tmp_path, launches, sent):
    fails = "deaf()\nif os.environ['RANK'] == '0':\n    time.sleep(1)\n    sys.exit(3)\n"
    launch = Launch(tmp_path, RANKS + fails + WAIT, "--max_restarts", "3")
    launches.append(launch)
    launch.until(lambda: (tmp_path / "signal_1").exists())  # rank 1 has been asked to end, and does not

    launch.process.send_signal(sent)
    status, errors = launch.ended()

    assert status == 128 + sent
    assert errors.splitlines()[-1] == f"accelerate: the launcher received {sent.name} and ended the workers"
    assert "exited with code 3" in errors, "what had failed before is told too"
    assert "starting again" not in errors
    assert launch.left() == []


@pytest.mark.full
def test_control_c_shows_where_one_rank_was(tmp_path, launches):
    launch = Launch(tmp_path, f"import accelerate\n{RANKS}{WAIT}")
    launches.append(launch)
    launch.ready()

    launch.process.send_signal(signal.SIGINT)
    status, errors = launch.ended()

    assert status == 130
    assert errors.count("Traceback") == 1
    assert "[rank 0] KeyboardInterrupt\naccelerate: the launcher received SIGINT and ended the workers\n" in errors
    assert launch.left() == []


@pytest.mark.full
def test_a_run_under_nohup_does_not_hear_of_the_terminal(tmp_path, launches):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launch = Launch(tmp_path, "import os, time" + WAIT.replace("while True", "while not os.path.exists('go')"))
    finally:
        signal.signal(signal.SIGHUP, before)
    launches.append(launch)
    launch.ready()

    launch.process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()

    assert launch.ended() == (0, "")


CAUSE_IS_SLOW = """
import os, sys, time
import accelerate
if os.environ["RANK"] == "0":
    while not os.path.exists("fell"): time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")
try:
    raise ValueError("boom")
finally:
    open("fell", "w").close()  # as a rank that lets go of its connections, and is not done yet
    while not any(name.endswith("0/error.json") for name in notes()): time.sleep(0.01)
    time.sleep(0.5)
"""
NOTES = """
import pathlib
def notes():
    return [str(file) for file in pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1].rglob("error.json")]
"""


def test_a_rank_that_is_still_on_its_way_out_is_heard_before_its_victim_is_blamed(tmp_path, launches):
    launch = Launch(tmp_path, CAUSE_IS_SLOW.replace("import accelerate", f"import accelerate\n{NOTES}"))
    launches.append(launch)

    status, errors = launch.ended()

    lines = errors.splitlines()
    assert status == 1
    assert re.match(r"accelerate: rank 1 of 2 \(pid \d+ on \S+\) exited with code 1: ValueError: boom", lines[-1])
    assert lines[-2] == "[rank 1] ValueError: boom"
    assert re.match(r"accelerate: also, rank 0 \(pid \d+\) fell because another rank had gone", lines[0])
    assert errors.count("Traceback") == 1


@pytest.mark.full
def test_a_rank_that_hangs_in_its_exit_handlers_does_not_hold_up_the_run_for_ever(tmp_path, launches):
    script = (
        "import accelerate, atexit, os, time\nif os.environ['RANK'] == '1':\n    atexit.register(time.sleep, 1000)\n"
        "    raise ValueError('boom')\ntime.sleep(1000)\n"
    )
    launch = Launch(tmp_path, script, "--grace_seconds", "1")
    launches.append(launch)

    status, errors = launch.ended()

    assert status == 1
    assert errors.splitlines()[-1].endswith("exited with code 1: ValueError: boom")


def test_the_same_exception_on_all_ranks_is_shown_once(tmp_path, launches):
    launch = Launch(tmp_path, "import accelerate\nimport no_such_module", world=4)
    launches.append(launch)

    status, errors = launch.ended()

    assert status == 1
    assert errors.count("Traceback") == 1
    assert errors.splitlines()[-1].endswith("exited with code 1: ModuleNotFoundError: No module named 'no_such_module'")


def test_a_run_that_ended_well_leaves_what_the_script_left_running(tmp_path, launches):
    script = (
        "import os, subprocess, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    for own in (True, False):\n"
        "        subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(120)', str(own)],"
        " start_new_session=own)\n"
    )
    launch = Launch(tmp_path, script)
    launches.append(launch)

    assert launch.process.wait(PATIENCE_SECONDS) == 0

    assert {process.cmdline()[-1] for process in launch.left()} == {"True", "False"}


def test_each_attempt_is_reported_and_its_log_has_the_traceback(tmp_path, launches):
    script = (
        "import accelerate, os\nattempt = os.environ['TORCHELASTIC_RESTART_COUNT']\nprint('hello')\n"
        "if os.environ['RANK'] == '1': raise ValueError(f'boom {attempt}')\n"
    )
    launch = Launch(tmp_path, script, "--log_dir", "logs", "--max_restarts", "1")
    launches.append(launch)

    status, errors = launch.ended()

    lines = errors.splitlines()
    assert status == 1
    again = lines.index("accelerate: starting again: attempt 2 of 2")
    assert ", log logs/rank_1/stderr.1.log) exited with code 1: ValueError: boom 0" in lines[again - 1]
    assert ", log logs/rank_1/stderr.log) exited with code 1: ValueError: boom 1" in lines[-1]
    assert errors.count("Traceback") == 2
    assert (tmp_path / "logs/rank_1/stderr.1.log").read_text().endswith("\nValueError: boom 0\n")
    assert (tmp_path / "logs/rank_1/stderr.log").read_text().endswith("\nValueError: boom 1\n")
    assert (tmp_path / "logs/rank_1/stdout.log").read_text() == "hello\n"


def test_a_quiet_launch_shows_what_the_script_says_and_no_more(tmp_path, launches):
    script = "import accelerate, os\nif os.environ['RANK'] == '1': raise ValueError('boom')\n"
    launch = Launch(tmp_path, script, "--quiet", "--max_restarts", "1")
    launches.append(launch)

    status, errors = launch.ended()

    assert status == 1
    assert errors.count("Traceback") == 2
    assert {line.startswith("[rank 1] ") for line in errors.splitlines()} == {True}


# Many launches, and who can reach them -------------------------------------------------------------------------------

MEET = """
import os, psutil, sys, time
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
accelerator.wait_for_everyone()
here = [psutil.Process(), psutil.Process(os.getppid())]
found = {c.laddr.ip for process in here for c in process.net_connections() if c.status == "LISTEN"}
print("listens", *sorted(found), flush=True)
accelerator.wait_for_everyone()
"""


def launches_at_once(tmp_path: Path, launches: list[Launch], number: int) -> None:
    for index in range(number):
        folder = tmp_path / str(index)
        folder.mkdir()
        launches.append(Launch(folder, MEET))
    for launch in launches:
        out, errors = launch.process.communicate(timeout=1200)
        assert (launch.process.returncode, errors) == (0, "")
        assert out == "listens 127.0.0.1\n" * 2
        assert [file.name for file in launch.folder.iterdir()] == ["script.py"], "no folder is left behind"


def test_a_launch_on_one_machine_listens_to_it_alone(tmp_path, launches):
    launches_at_once(tmp_path, launches, 1)


@pytest.mark.full
@pytest.mark.timeout(0)
def test_twenty_launches_at_once_succeed(tmp_path, launches):
    launches_at_once(tmp_path, launches, 20)
