"""What the documentation shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(code: str, folder: Path, *launcher: str) -> str:
    script = folder / "train.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_run_prints_the_same_numbers_with_and_without(tmp_path):
    plain, ours = blocks("docs/tutorials/first-run.md")[:2]
    expected = run(plain, tmp_path)
    assert expected.count("loss") == 5
    assert run(ours, tmp_path) == expected


def test_the_first_run_works_on_two_processes(tmp_path):
    ours = blocks("docs/tutorials/first-run.md")[1]
    printed = run(ours, tmp_path, "-m", "accelerate", "launch", "--cpu", "--num_processes", "2")
    assert printed.count("epoch 4: loss") == 1


def test_the_first_run_with_a_global_batch_size_gives_the_same_weights_on_one_process_and_on_two(tmp_path):
    *_, ours = blocks("docs/tutorials/first-run.md")
    printed = [
        run(ours, tmp_path, *launcher)
        for launcher in ([], ["-m", "accelerate", "launch", "--cpu", "--num_processes", "2"])
    ]
    assert printed[0].count("norm of the weights") == 5
    assert printed[0] == printed[1]


@pytest.mark.parametrize("number", range(4))
def test_examples_of_accumulation_run_on_one_process_and_on_two(number, tmp_path):
    examples = blocks("docs/explain/accumulation.md")
    assert len(examples) == 4
    run(examples[number], tmp_path)
    run(examples[number], tmp_path, "-m", "accelerate", "launch", "--cpu", "--num_processes", "2")


def test_examples_of_data_do_what_they_say(tmp_path):
    examples = blocks("docs/explain/data.md")
    assert len(examples) == 3
    for example in examples:
        run(example, tmp_path)


def test_the_example_of_a_run_that_saves_itself_runs_and_resumes(tmp_path):
    (example,) = blocks("docs/explain/preemption.md")
    example = example.replace("sys.argv[1]", repr(str(tmp_path)))
    # Where the second epoch begins it is told to end; what would come after it is never run.
    stopping = example.replace(
        "    for batch in loader:", "    signal.raise_signal(signal.SIGTERM)\n    for batch in loader:"
    )
    with pytest.raises(AssertionError, match="the run saved itself"):
        run(f"import signal\n{stopping}", tmp_path)
    run(example, tmp_path, "-m", "accelerate", "launch", "--resume", "auto")


def test_every_link_in_the_documentation_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
