"""What a worker leaves for its launcher: real interpreters, started as a launcher starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(tmp_path: Path, code: str, *, ours: bool = True, stdout: Any = subprocess.PIPE, **variables: str) -> Any:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environ |= {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    environ |= {"ACCELERATE_LAUNCHER_PID": str(os.getpid() if ours else 1), **variables}
    words = [sys.executable, "-u", "-c", code]
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=environ)


def note(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "error.json").read_text())


def test_an_exception_is_noted_and_not_printed(tmp_path):
    done = run(tmp_path, "import accelerate\nraise ValueError('boom')")

    assert (done.returncode, done.stderr) == (1, "")
    found = note(tmp_path)["message"]
    assert found["message"] == "ValueError: boom"
    assert found["extraInfo"]["py_callstack"].splitlines()[-1] == "ValueError: boom"
    assert found["extraInfo"]["py_callstack"].startswith("Traceback (most recent call last):")


def test_a_process_that_a_worker_starts_speaks_for_itself(tmp_path):
    done = run(tmp_path, "import accelerate\nraise ValueError('boom')", ours=False)

    assert "ValueError: boom" in done.stderr
    assert not (tmp_path / "error.json").exists()


@pytest.mark.parametrize("how", ["os.fork() == 0 and 1/0", "__import__('shutil').rmtree(%r); 1/0"])
def test_where_the_launcher_cannot_be_told_it_is_printed(tmp_path, how):
    (tmp_path / "x").mkdir()
    done = run(tmp_path / "x", f"import accelerate, os\n{how.replace('%r', repr(str(tmp_path / 'x')))}")

    assert done.stderr.count("ZeroDivisionError") == 1


def test_an_error_says_where_it_arose(tmp_path):
    run(tmp_path, "from accelerate.core.errors import CheckpointError as E\ne = E('x')\ne.arose_on = (3,)\nraise e")

    assert note(tmp_path)["arose_on"] == [3]


def test_an_exception_that_cannot_be_printed_is_named(tmp_path):
    code = "import accelerate\nclass E(Exception):\n    arose_on = 3\n    def __str__(self): raise KeyError('x')\nraise E()"

    done = run(tmp_path, code)

    assert (done.returncode, done.stderr) == (1, "")
    assert note(tmp_path)["message"]["message"] == "E: <exception str() failed>"
    assert note(tmp_path)["arose_on"] == []


def test_a_hook_of_the_script_runs_and_what_it_prints_is_the_traceback(tmp_path):
    code = "import sys\nsys.excepthook = lambda k, e, t: (print('seen'), print('mine', e, file=sys.stderr))\nimport accelerate\n1/0"

    done = run(tmp_path, code)

    assert (done.stdout, done.stderr) == ("seen\n", "")
    assert note(tmp_path)["message"]["extraInfo"]["py_callstack"] == "mine division by zero\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_crash_leaves_the_place_where_it_was(tmp_path):
    done = run(tmp_path, "import accelerate, os, signal\ndef here():\n    os.kill(os.getpid(), signal.SIGSEGV)\nhere()")

    assert (done.returncode, done.stderr) == (-signal.SIGSEGV, "")
    assert "in here" in (tmp_path / "crash.txt").read_text()


def test_a_fault_handler_that_is_set_stays(tmp_path):
    done = run(tmp_path, "import faulthandler\nfaulthandler.enable()\nimport accelerate, os\nos.kill(os.getpid(), 11)")

    assert "Segmentation fault" in done.stderr
    assert not (tmp_path / "crash.txt").exists()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="counts writes as messages")
@pytest.mark.parametrize(
    ("variables", "writes"),
    [({}, [b"one two\n", b"50%\r", b"end\n"]), ({"PYTHONUNBUFFERED": "1"}, [b"one two", b"\n", b"50%", b"\r", b"en"])],
    ids=["usual", "unbuffered"],
)
def test_a_line_is_one_write_unless_somebody_wants_each_character_at_once(tmp_path, variables, writes):
    code = "import accelerate\nprint('one two')\nprint('50%', end='\\r')\nprint('en', end='')\nprint('d')"
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        run(tmp_path, code, stdout=there, **variables)
        there.close()
        found = list(iter(lambda: here.recv(100), b""))
    assert found[: len(writes)] == writes


DEAF_DAEMON = """
import multiprocessing, signal, time
import accelerate

def deaf(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)

context = multiprocessing.get_context("fork")
ready = context.Event()
context.Process(target=deaf, args=(ready,), daemon=True).start()
ready.wait()
raise ValueError("boom")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_rank_that_fails_does_not_wait_for_a_daemon_that_does_not_hear(tmp_path):
    done = run(tmp_path, DEAF_DAEMON)  # 60 seconds at most

    assert done.returncode == 1
    assert note(tmp_path)["message"]["message"] == "ValueError: boom"
