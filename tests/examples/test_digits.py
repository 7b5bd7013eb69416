"""The example a newcomer reads first: it works on one process and on two, resumes, and stays close to the plain loop."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
LAST_LINE = re.compile(r"accuracy ([\d.]+)% on (\d+) test samples; model saved in (.+)")


def run(processes: int, folder: Path, *options: str) -> tuple[float, int, Path]:
    launcher = [] if processes == 1 else ["-m", "accelerate", "launch", "--cpu", "--num_processes", str(processes)]
    command = [sys.executable, *launcher, str(FOLDER / "train.py"), "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = LAST_LINE.fullmatch(done.stdout.strip().splitlines()[-1])
    assert last, done.stdout
    assert done.stdout.count("test samples") == 1, "only the main process prints"
    return float(last[1]), int(last[2]), Path(last[3])


@pytest.mark.parametrize("processes", [1, 2])
def test_it_learns_and_counts_every_sample_once(processes, tmp_path):
    accuracy, count, model = run(processes, tmp_path)
    assert accuracy >= 97
    assert count == 360
    assert load_file(model)["0.weight"].shape == (32, 1, 3, 3)


def test_stopping_and_resuming_gives_the_weights_of_one_run(tmp_path):
    run(2, tmp_path / "whole", "--epochs", "3")
    run(2, tmp_path / "parts", "--epochs", "3", "--stop-after", "1")
    run(2, tmp_path / "parts", "--epochs", "3", "--resume")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_the_plain_loop_and_ours_differ_in_few_lines():
    plain, ours = ((FOLDER / name).read_text().splitlines() for name in ("train_torch.py", "train.py"))
    changed = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert len([line for line in changed if line[0] == "+"]) <= 20
    assert len([line for line in changed if line[0] == "-"]) <= 20
