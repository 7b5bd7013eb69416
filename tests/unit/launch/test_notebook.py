"""Workers of a notebook: what travels to them and back, what they print, and where they come from."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from accelerate import Accelerator
from accelerate.core import available
from accelerate.core.errors import LaunchError, MissingPackage, WrongTypeError
from accelerate.launch import cargo, elastic, functions, voices
from accelerate.launch.report import WorkersFailed
from accelerate.launchers import debug_launcher, notebook_launcher


@pytest.fixture
def device_in_use(monkeypatch):
    """Let this process look as if it had used one of two CUDA devices; a fork would see the same."""
    monkeypatch.setattr(functions.devices, "find", lambda environ: functions.devices.Devices(2, "cuda"))
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the workers have none


def as_in_a_cell(text: str) -> dict:
    """Run text as a notebook runs a cell: in a module that no other process can import."""
    names = {"__name__": "__main__"}
    exec(compile(text, "<cell 1>", "exec"), names)
    return names


CELL = """
from dataclasses import dataclass
import torch
from accelerate import Accelerator

@dataclass
class Point:
    x: int

def helper(value):
    return value + 1

def work(point, ask):
    accelerator = Accelerator()
    total = accelerator.reduce(torch.ones(1), "sum")
    return accelerator.process_index, Point(helper(point.x)), ask(2), total, torch.cuda.is_initialized()
"""


def test_a_process_that_uses_cuda_gets_workers_that_do_not(device_in_use, capsys):
    cell, offset = as_in_a_cell(CELL), 40

    found = notebook_launcher(
        cell["work"], (cell["Point"](6), lambda value: value + offset), 2, "bf16", return_results=True
    )

    assert [item[0] for item in found] == [0, 1]
    assert [item[1] for item in found] == [cell["Point"](7)] * 2, "of the class that the notebook has"
    assert [item[2:] for item in found] == [(42, torch.tensor([2.0]), False)] * 2
    assert capsys.readouterr().out.splitlines()[0] == (
        "notebook_launcher: cuda is in use in this process, so the function runs in new interpreters (spawn)."
    )


def speak() -> str:
    rank = os.environ["RANK"]
    print(f"out {rank}", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    print(f"err {rank}", file=sys.stderr)
    os.write(1, f"from C {rank}\n".encode())
    logging.getLogger("of the notebook").warning("logged %s", rank)
    return f"result {rank}"


def check_speech(launch) -> None:
    logger = logging.getLogger("of the notebook")
    logger.propagate = False
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        logger.addHandler(handler := logging.StreamHandler())
        try:
            assert launch(speak, num_processes=3, return_results=True) == ["result 0", "result 1", "result 2"]
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
    prefixes = ["", "[rank 1] ", "[rank 2] "]
    precision = "no" if launch is debug_launcher else "bf16"
    spoken = [
        f"{mark}{line}" for rank, mark in enumerate(prefixes) for line in (f"out {rank} {precision}", f"from C {rank}")
    ]
    logged = [f"{mark}{line}" for rank, mark in enumerate(prefixes) for line in (f"err {rank}", f"logged {rank}")]
    assert sorted(out.getvalue().splitlines()) == sorted(spoken)
    assert sorted(err.getvalue().splitlines()) == sorted(logged)


def test_what_workers_print_arrives_where_the_caller_prints():
    check_speech(debug_launcher)
    check_speech(lambda *args, **kwargs: notebook_launcher(*args, mixed_precision="bf16", **kwargs))


def test_lines_of_all_workers_begin_as_the_template_says(capsys):
    notebook_launcher(speak, (), 2, log_line_prefix_template="<${rank}/${role_name}> ")

    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [
        "<0/default> from C 0",
        "<0/default> out 0 no",
        "<1/default> from C 1",
        "<1/default> out 1 no",
    ]


class Screen(io.StringIO):
    """Sets an event when a text appears."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self.awaited = awaited
        self.seen = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.awaited in self.getvalue():
            self.seen.set()
        return written


def wait_for(file: Path) -> None:
    print("working", end="" if os.environ["RANK"] == "0" else "\n")
    sys.stdout.flush()
    while not file.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("awaited", ["[rank 1] working\n", "\nworking"], ids=["a line", "a line without its end"])
def test_what_workers_print_appears_while_they_run(tmp_path, awaited):
    """They end when the test has seen it, and would not otherwise."""
    screen = Screen(awaited)
    on = tmp_path / "on"
    watcher = threading.Thread(target=lambda: screen.seen.wait(60) and on.touch())
    watcher.start()
    screen.write("\n")
    with contextlib.redirect_stdout(screen):
        debug_launcher(wait_for, (on,), 2)
    watcher.join()
    assert screen.seen.is_set()


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one\ntw", "o\n"], ["> one\n", "> two\n"]),
        (["a\n\nb\n"], ["> a\n\n> b\n"]),
        (["\r 10%", "\r 20%\r"], ["\r", "> 10%\r> 20%\r".replace("> ", ">  ")]),
        (["\xc3", "\xa9\n"], ["", "> é\n"]),
        (["a", None, "b\n"], ["", "> a", "b\n"]),
        (["a\n", None, "b\n"], ["> a\n", "", "> b\n"]),
        (["\xff\n"], ["> \ufffd\n"]),
    ],
)
def test_lines_are_cut_where_people_would(pieces, shown):
    lines = voices.Lines("> ")
    assert [lines.rest() if piece is None else lines.feed(piece.encode("latin-1")) for piece in pieces] == shown


def test_marks_name_ranks_and_not_processes():
    assert voices.marks(0, 1) == ("",)
    assert voices.marks(4, 2) == ("", "[rank 5] ")
    assert voices.marks(4, 2, "${local_rank} ${other}:") == ("0 ${other}:", "1 ${other}:")


def return_a_lock_on_rank_1():
    return threading.Lock() if os.environ["RANK"] == "1" else 0


@pytest.mark.parametrize("launch", [debug_launcher, notebook_launcher])
def test_a_result_that_cannot_travel_names_its_rank(launch):
    with pytest.raises(WorkersFailed) as caught:
        launch(return_a_lock_on_rank_1, num_processes=2, return_results=True)
    assert "rank 1 of 2" in str(caught.value)
    assert "What the function returned cannot be sent back: a lock" in str(caught.value)


def test_results_that_are_missing_or_unreadable_name_their_rank(tmp_path):
    (tmp_path / "result.1").write_bytes(b"cnowhere\nNothing\n.")
    with pytest.raises(LaunchError, match="Rank 6 ended without a result"):
        cargo.unpack_results([(6, tmp_path / "result.0")])
    with pytest.raises(LaunchError, match="What rank 7 returned cannot be read here: ModuleNotFoundError"):
        cargo.unpack_results([(7, tmp_path / "result.1")])


def test_arguments_that_cannot_travel_are_refused_before_anything_starts(device_in_use):
    with pytest.raises(WrongTypeError, match="print_lock or its arguments cannot be sent"):

        def print_lock(lock): ...

        notebook_launcher(print_lock, (threading.Lock(),), 2)


def test_new_interpreters_need_cloudpickle(device_in_use, monkeypatch):
    monkeypatch.setattr(available, "is_installed", lambda *_: False)
    with pytest.raises(MissingPackage, match=r"pip install 'accelerate\[notebook\]'"):
        notebook_launcher(speak, (), 2)


@pytest.mark.full
def test_a_failure_in_a_new_interpreter_is_shown_once_with_the_text_of_its_cell(capfd):
    text = "def broken():\n    raise ValueError('boom')  # this line\n"
    import linecache

    linecache.cache["<cell 1>"] = (len(text), None, text.splitlines(keepends=True), "<cell 1>")
    try:
        with pytest.raises(WorkersFailed) as caught:
            notebook_launcher(as_in_a_cell(text)["broken"], (), 2, start_method="spawn")
    finally:
        del linecache.cache["<cell 1>"]

    message = str(caught.value)
    assert message.splitlines()[-1].endswith("exited with code 1: ValueError: boom")
    assert "raise ValueError('boom')  # this line" in message
    captured = capfd.readouterr()
    assert "ValueError" not in captured.out + captured.err


def show_accelerator() -> tuple[str, int]:
    accelerator = Accelerator()
    return accelerator.mixed_precision, accelerator.num_processes


def test_the_launchers_can_be_called_again_and_precision_is_heeded():
    for precision in ("bf16", "no"):
        found = notebook_launcher(show_accelerator, (), 2, precision, return_results=True)
        assert found == [(precision, 2)] * 2
    assert debug_launcher(show_accelerator, (), 2, return_results=True) == [("no", 2)] * 2
    assert notebook_launcher(lambda: 3, (), 1, return_results=True) == [3]


def test_the_number_of_processes_is_that_of_the_devices(monkeypatch, capsys):
    assert notebook_launcher(lambda: 3, (), return_results=True) == [3]
    assert capsys.readouterr().out == "notebook_launcher: no accelerator is visible, so num_processes=1.\n"

    monkeypatch.setattr(functions.devices, "find", lambda environ: functions.devices.Devices(2, "cuda"))
    assert functions._one_for_each_device() == 2
    assert "2 cuda device(s) are visible" in capsys.readouterr().out


@pytest.mark.parametrize("variable", [("PJRT_DEVICE", "TPU"), ("COLAB_TPU_ADDR", "10.0.0.2:8470")])
def test_tpus_are_refused_by_name(monkeypatch, variable):
    monkeypatch.setenv(*variable)
    with pytest.raises(ValueError, match=rf"{variable[0]}.* needs the TPU launcher"):
        notebook_launcher(lambda: None, (), 2)


PROGRAM = """
import sys, time, os
from pathlib import Path
from accelerate import debug_launcher, notebook_launcher

def forever(folder):
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)

if __name__ == "__main__":
    try:
        if sys.argv[1] == "debug":
            debug_launcher(forever, (sys.argv[2],), 2)
        else:
            notebook_launcher(forever, (sys.argv[2],), 2, start_method=sys.argv[1])
    except KeyboardInterrupt:
        print("interrupted")
    print(notebook_launcher(lambda: os.environ["RANK"], (), 2, return_results=True))
"""


def test_the_guard_removes_all_that_a_call_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    guarded, seen = elastic.guarded, []

    def noting(family, folder, environ):
        seen.append((folder, sorted(tmp_path.glob("accelerate-*"))))
        return guarded(family, folder, environ)

    monkeypatch.setattr(elastic, "guarded", noting)

    assert debug_launcher(lambda: 3, (), 1, return_results=True) == [3]

    ((folder, there),) = seen
    assert there == [folder]
    assert list(tmp_path.glob("accelerate-*")) == []


@pytest.mark.full
@pytest.mark.parametrize("how", ["fork", "spawn", "debug"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_an_interrupt_or_with_their_launcher(tmp_path, how, number):
    """After an interrupt the process can go on."""
    program, folder = tmp_path / "program.py", tmp_path / "workers"
    program.write_text(PROGRAM)
    folder.mkdir()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    workers: list[psutil.Process] = []
    launcher = subprocess.Popen(
        [sys.executable, program, how, folder],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        workers += [started(folder / rank, launcher) for rank in "01"]
        launcher.send_signal(number)
        out, _ = launcher.communicate(timeout=100)
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == []
        deadline = time.monotonic() + 60
        while list(temporary.glob("accelerate-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(temporary.glob("accelerate-*")) == []
    finally:
        for process in (launcher, *(worker for worker in workers if worker.is_running())):
            process.kill()
        launcher.wait()
    if number == signal.SIGINT:
        assert out == "interrupted\n['0', '1']\n"


def started(note: Path, launcher: subprocess.Popen) -> psutil.Process:
    while not (note.exists() and note.read_text()):
        assert launcher.poll() is None
        time.sleep(0.01)
    return psutil.Process(int(note.read_text()))


def touch_cuda() -> tuple[int, float]:
    accelerator = Accelerator()
    return accelerator.device.index, float(torch.ones(2, device=accelerator.device).sum())


@pytest.mark.gpu
def test_a_notebook_that_has_used_its_gpu_starts_workers_that_use_it():
    torch.ones(1, device="cuda")
    count = torch.cuda.device_count()
    method = None if count > 1 else "spawn"  # a single process would run in place

    found = notebook_launcher(touch_cuda, (), count, start_method=method, return_results=True)

    assert found == [(index, 2.0) for index in range(count)]
    with pytest.raises(ValueError, match="already uses cuda"):
        notebook_launcher(touch_cuda, (), 1, start_method="fork")


@pytest.mark.gpu
def test_one_process_runs_in_the_notebook_that_has_used_its_gpu():
    torch.ones(1, device="cuda")

    assert notebook_launcher(touch_cuda, (), 1, return_results=True) == [(0, 2.0)]


def sum_on_the_cpu() -> float:
    accelerator = Accelerator()
    assert accelerator.device.type == "cpu"
    return float(accelerator.reduce(torch.ones(1), "sum"))


@pytest.mark.gpu
def test_the_cpu_can_be_used_beside_a_gpu_that_is_in_use():
    torch.ones(1, device="cuda")

    assert debug_launcher(sum_on_the_cpu, num_processes=2, return_results=True) == [2.0, 2.0]
