"""The example a newcomer reads first: it works on one process and on two, resumes, and stays close to the plain loop."""

from __future__ import annotations

import difflib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from accelerate.checkpoint.train_state import read_state

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
LAST_LINE = re.compile(r"accuracy ([\d.]+)% on (\d+) test samples; model saved in (.+)")
STOPPED = re.compile(r"accelerate: rank \d received SIGTERM: the run saved itself in (\S+) and ends; .*")


class Ended(NamedTuple):
    accuracy: float
    samples: int
    model: Path
    consumed: str


def command(processes: int, folder: Path, *options: str, resume: bool = False) -> list[str]:
    launcher = ["-m", "accelerate", "launch", "--cpu", "--num_processes", str(processes)]
    if resume:
        launcher += ["--resume", "auto"]
    elif processes == 1:
        launcher = []
    return [sys.executable, *launcher, str(FOLDER / "train.py"), "--folder", str(folder), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(processes: int, folder: Path, *options: str, resume: bool = False) -> Ended:
    words = command(processes, folder, *options, resume=resume)
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    *_, consumed, last_line = done.stdout.strip().splitlines()
    last = LAST_LINE.fullmatch(last_line)
    assert last, done.stdout
    assert done.stdout.count("test samples") == done.stdout.count("sha256") == 1, "only the main process prints"
    return Ended(float(last[1]), int(last[2]), Path(last[3]), consumed)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_learns_and_counts_every_sample_once(processes, tmp_path):
    accuracy, count, model, _ = run(processes, tmp_path)
    assert accuracy >= 97
    assert count == 360
    assert load_file(model)["0.weight"].shape == (32, 1, 3, 3)


def test_stopping_and_resuming_gives_the_weights_of_one_run(tmp_path):
    run(2, tmp_path / "whole", "--epochs", "3")
    run(2, tmp_path / "parts", "--epochs", "3", "--stop-after", "1")
    run(2, tmp_path / "parts", "--epochs", "3", resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)


def run_until_terminated(processes: int, folder: Path, *options: str) -> int:
    """Send SIGTERM in the third epoch; return how many samples the run had trained on when it saved itself."""
    with (
        (folder.parent / f"{folder.name}.stderr").open("w+") as errors,
        subprocess.Popen(
            command(processes, folder, *options), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        ) as launched,
    ):
        assert launched.stdout is not None
        for line in launched.stdout:
            if line.startswith("epoch 1:"):
                break
        time.sleep(0.15)  # it saves, and begins the third
        launched.send_signal(signal.SIGTERM)
        rest = launched.stdout.read()
        status = launched.wait()
        errors.seek(0)
        told = errors.read()
    assert status == 75, rest + told
    stopped = STOPPED.search(told)
    assert stopped, told
    assert "test samples" not in rest
    return read_state(Path(stopped[1]), "custom_checkpoint_0")["count"]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_terminated_it_goes_on_with_another_number_of_processes(first, then, tmp_path):
    whole = run(first, tmp_path / "whole", "--epochs", "5")
    assert whole.consumed.startswith(f"consumed {5 * 1408} samples")
    samples = run_until_terminated(first, tmp_path / "parts", "--epochs", "5")
    # After any batch; on a busy machine before the first one of the third epoch. Exact places: tests/fault/preempted.py.
    assert 2 * 1408 <= samples < 5 * 1408
    parts = run(then, tmp_path / "parts", "--epochs", "5", resume=True)
    assert parts.consumed == whole.consumed
    assert parts.accuracy == whole.accuracy
    weights, expected = load_file(parts.model), load_file(whole.model)
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in expected)
    assert parts.samples == whole.samples == 360


def test_the_plain_loop_and_ours_differ_in_few_lines():
    texts = [(FOLDER / name).read_text() for name in ("train_torch.py", "train.py")]
    plain, ours = ([line.strip() for line in text.splitlines()] for text in texts)  # as `diff -w` reads them
    changed = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert len([line for line in changed if line[0] == "+"]) <= 30
    # Of these, saving and continuing by hand are a dozen.
    assert len([line for line in changed if line[0] == "-"]) <= 34
