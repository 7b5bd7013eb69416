"""Notebooks that a real Jupyter kernel executes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel (pip install 'accelerate[dev]')")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel (pip install 'accelerate[dev]')")

# Of the packages, not ours: an event loop that is closed by the end of the process, paths that are to move.
pytestmark = [pytest.mark.filterwarnings("ignore")]

MODULE = """
def double(value):
    return 2 * value
"""

DEFINE = """
import os, sys, time
from pathlib import Path
import torch
from accelerate import Accelerator, debug_launcher, notebook_launcher
from beside import double

class Found:
    def __init__(self, value):
        self.value = value

def train(steps):
    accelerator = Accelerator()
    rank = accelerator.process_index
    for step in range(steps):
        print(f"rank {rank}, step {step}")
        while not Path(f"seen {rank} {step}").exists():  # until whoever looks at the cell has seen it
            time.sleep(0.01)
    total = accelerator.reduce(torch.tensor(float(rank + 1)), "sum")
    print("on stderr", rank, file=sys.stderr)
    return Found(double(float(total)))
"""
RUN = "found = notebook_launcher(train, (2,), num_processes=2, return_results=True{more})\n[type(item) is Found and item.value for item in found]"
FAIL = """
def fail():
    accelerator = Accelerator()
    if accelerator.process_index == 1:
        raise KeyError("what went wrong")
    accelerator.wait_for_everyone()

notebook_launcher(fail, num_processes=2{more})
"""
FOREVER = """
def forever():
    print("here", os.environ["RANK"], os.getpid())
    while True:
        time.sleep(0.01)

notebook_launcher(forever, num_processes=2{more})
"""
AGAIN = "notebook_launcher(lambda: os.environ['RANK'], num_processes=2, return_results=True)"


class Notebook:
    """A kernel that executes cells, and what they show; `watch` is called with each piece of text."""

    def __init__(self, folder: Path, watch: Any) -> None:
        import nbformat

        self.format = nbformat.v4
        self.content = self.format.new_notebook()
        watched = type("Watched", (nbclient.NotebookClient,), {"process_message": self._process(watch)})
        self.client = watched(
            self.content, timeout=120, shutdown_kernel="immediate", resources={"metadata": {"path": str(folder)}}
        )

    @staticmethod
    def _process(watch: Any) -> Any:
        def process_message(client: Any, message: Any, cell: Any, index: int) -> Any:
            if message["msg_type"] == "stream":
                watch(client, message["content"]["text"])
            return nbclient.NotebookClient.process_message(client, message, cell, index)

        return process_message

    def execute(self, source: str) -> tuple[dict[str, str], list[str]]:
        """Execute a cell; return its streams, and its results or the lines of its error."""
        cell = self.format.new_code_cell(source)
        self.content.cells.append(cell)
        try:
            self.client.execute_cell(cell, len(self.content.cells) - 1)
        except nbclient.exceptions.CellExecutionError:
            pass
        streams = {"stdout": "", "stderr": ""}
        others = []
        for output in cell.outputs:
            if output.output_type == "stream":
                streams[output.name] += output.text
            elif output.output_type == "error":
                others += [output.ename, *output.traceback]
            else:
                others.append(output.data["text/plain"])
        return streams, others


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_ALLOW_INSECURE_WRITES", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "beside.py").write_text(MODULE)
    seen: list[str] = []

    def watch(client: Any, text: str) -> None:
        seen.append(text)
        shown = "".join(seen)
        for rank in range(2):
            for step in range(2):
                if f"rank {rank}, step {step}" in shown:
                    (tmp_path / f"seen {rank} {step}").touch()

    book = Notebook(tmp_path, watch)
    with book.client.setup_kernel():
        yield book


def check_notebook(notebook: Notebook, more: str) -> None:
    assert notebook.execute(DEFINE)[1] == []

    streams, results = notebook.execute(RUN.format(more=more))

    assert len(results) == 1, "\n".join(results)
    # Each worker goes on only when its line has been seen, so the lines came while it ran.
    assert sorted(streams["stdout"].splitlines()) == [
        "[rank 1] rank 1, step 0", "[rank 1] rank 1, step 1", "rank 0, step 0", "rank 0, step 1",
    ]  # fmt: skip
    assert sorted(streams["stderr"].splitlines()) == ["[rank 1] on stderr 1", "on stderr 0"]
    assert results == ["[6.0, 6.0]"]

    streams, error = notebook.execute(FAIL.format(more=more))
    assert error[0] == "WorkersFailed"
    assert error[-1].endswith("exited with code 1: KeyError: 'what went wrong'")
    assert "rank 1 of 2" in error[-1]
    assert sum('raise KeyError("what went wrong")' in line for line in error) == 1, "the traceback shows the cell, once"
    assert "KeyError" not in streams["stdout"] + streams["stderr"]

    assert notebook.execute(AGAIN)[1] == ["['0', '1']"]


def test_a_kernel_runs_two_processes_shows_what_they_print_and_survives_their_failure(notebook):
    check_notebook(notebook, "")


@pytest.mark.full
def test_a_kernel_runs_two_processes_in_new_interpreters(notebook):
    check_notebook(notebook, ", start_method='spawn'")


@pytest.mark.full
@pytest.mark.parametrize("more", ["", ", start_method='spawn'"], ids=["fork", "spawn"])
def test_the_stop_button_ends_the_processes_and_the_kernel_goes_on(tmp_path, notebook, more):
    assert notebook.execute(DEFINE)[1] == []
    pids: list[int] = []

    def watch(client: Any, text: str) -> None:
        pids.extend(int(line.split()[-1]) for line in text.splitlines() if "here" in line)
        if len(pids) == 2:  # jupyter's own way: the signal goes to the kernel and its group
            threading.Thread(target=lambda: os.killpg(os.getpgid(client.km.provisioner.pid), signal.SIGINT)).start()

    notebook.client.process_message = Notebook._process(watch).__get__(notebook.client)
    _, error = notebook.execute(FOREVER.format(more=more))

    assert error[0] == "KeyboardInterrupt"
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert notebook.execute(AGAIN)[1] == ["['0', '1']"]


@pytest.mark.full
def test_an_accelerator_of_an_earlier_cell_is_a_clear_error(notebook):
    assert notebook.execute(DEFINE)[1] == []
    notebook.execute("early = Accelerator(cpu=True)")

    _, error = notebook.execute(AGAIN)

    assert error[0] == "SettingError"
    assert "an Accelerator or PartialState exists" in "\n".join(error)
