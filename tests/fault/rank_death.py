"""The rank death table: one rank of a launched run dies, and the launcher has to say so and leave nothing.

    python -m tests.fault.rank_death --runs 100

Each row is a way to die, a rank and a number of ranks, with and without DataLoader workers, children and a save in the
background; `--runs` repeats the table until there are so many runs. A run passes if the launcher ends within 5 seconds
of the death, with the status of the culprit, which it names in its last line; if the traceback of that rank stands
above it, once; and if no process of the run is left.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HOWS = ("kill", "segfault", "abort", "os_exit", "forward", "backward", "save", "exit")
STATUS = {"kill": 137, "segfault": 139, "abort": 134, "os_exit": 3, "forward": 1, "backward": 1, "save": 1, "exit": 1}

SCRIPT = Path(__file__).with_name("dying.py")
LIMIT_SECONDS = 5.0
MARK = "TEST_RUN_OF_ACCELERATE"


@dataclass(frozen=True)
class Row:
    how: str
    rank: int
    world: int
    dressed: bool

    def __str__(self) -> str:
        return f"{self.how:9} rank {self.rank} of {self.world}{' with workers and a save' if self.dressed else ''}"


ROWS = [
    Row(how, rank, world, dressed)
    for dressed, world, how in itertools.product((False, True), (2, 4), HOWS)
    for rank in range(world)
]


@dataclass(frozen=True)
class Outcome:
    seconds: float
    """From the death of the rank to the end of the launcher."""
    problems: tuple[str, ...]
    output: str


def environment(mark: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), MARK: mark}


def carry_out(row: Row, folder: Path, *flags: str) -> Outcome:
    """Launch the script so that the rank dies, and judge what was left and said."""
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "accelerate", "launch", "--cpu", "--num_processes", str(row.world), *flags]
    words += [
        str(SCRIPT),
        str(folder),
        "--how",
        row.how,
        "--rank",
        str(row.rank),
        *(["--dressed"] if row.dressed else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment(mark))
    ended = time.time()
    left = list(marked(mark))
    seconds = ended - float((folder / "died").read_text()) if (folder / "died").exists() else float("nan")
    problems = [f"left running: {process}" for process in left]
    for process in left:
        process.kill()
    return Outcome(seconds, (*problems, *_judge(row, done, seconds)), done.stderr)


def _judge(row: Row, done: subprocess.CompletedProcess[str], seconds: float) -> Iterator[str]:
    if not seconds <= LIMIT_SECONDS:
        yield f"took {seconds:.1f} s"
    if done.returncode != STATUS[row.how]:
        yield f"status {done.returncode}"
    lines = done.stderr.splitlines() or [""]
    if not re.match(rf"accelerate: rank {row.rank} of {row.world} \(pid \d+ on \S+\) ", lines[-1]):
        yield f"last line: {lines[-1]}"
    if row.how in ("forward", "backward", "save", "exit"):
        if not any(f"died in {row.how}" in line for line in lines[-8:]):
            yield "the traceback is not the last thing"
        if sum(line.startswith("Traceback") or "] Traceback" in line for line in lines) > (
            2 if row.how == "save" else 1
        ):
            yield "more than one traceback"
    crash = {"segfault": "Segmentation fault", "abort": "Fatal Python error: Aborted"}.get(row.how, "")
    if crash not in done.stderr:
        yield "no word of where it was"


def marked(mark: str) -> Iterator[psutil.Process]:
    """Yield the processes that inherited a mark in their environment."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(ROWS))
    parser.add_argument("--first", type=int, default=0, help="the row to begin with")
    options = parser.parse_args()
    rows = itertools.islice(itertools.cycle(ROWS), options.first, options.first + options.runs)
    seconds, failed = [], 0
    for number, row in enumerate(rows, 1):
        with tempfile.TemporaryDirectory() as folder:
            outcome = carry_out(row, Path(folder))
        seconds.append(outcome.seconds)
        failed += bool(outcome.problems)
        verdict = "; ".join(outcome.problems) or "as it should be"
        print(f"{number:4} {row}: {outcome.seconds:.2f} s, {verdict}", flush=True)
        if outcome.problems:
            print(outcome.output[-4000:], flush=True)
    print(f"{options.runs - failed} of {options.runs} runs passed; the slowest took {max(seconds):.2f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
