"""Run the long forms: python -m tests.crash.suite --help. Works on any `accelerate` that can be imported."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import accelerate

from . import program, tracing
from .checks import Cell, Report, kill_at_random, kill_everywhere, lose_power
from .program import BESIDE, NEW, NUMBERED, OVER

CELLS = [(kind, ranks) for kind in (NUMBERED, OVER, BESIDE, NEW) for ranks in (1, 2)]


def fast_folder() -> Path | None:
    """Return where files cost nothing: what is looked at is calls, not the disk."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def check(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    """Yield the report of each check that was asked for."""
    for mode in options.modes:
        for kind, ranks in CELLS:
            if kind not in options.places or ranks not in options.ranks:
                continue
            if "kills" in options.checks or "power" in options.checks:
                cell = Cell(folder / f"{kind}-{ranks}-{mode}", kind, ranks, mode)
                cell.chunk = options.chunk or cell.chunk
            if "kills" in options.checks:
                for victim in range(ranks):
                    yield kill_everywhere(cell, victim)
            if "power" in options.checks:
                yield lose_power(cell, options.states, seed=options.seed)
        if "random" in options.checks:
            for ranks in options.ranks:
                kills = options.kills if ranks == 1 else options.kills * 3 // 10
                for number, (kind, limit) in enumerate([(NUMBERED, 1), (NUMBERED, 3), (OVER, 1)]):
                    share = kills // 3 + (number < kills % 3)
                    where = folder / f"random-{kind}-{limit}-{ranks}-{mode}"
                    yield kill_at_random(where, kind, limit, share, ranks=ranks, mode=mode, seed=options.seed)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", nargs="+", default=["kills", "power", "random"])
    parser.add_argument("--places", nargs="+", default=list(program.PLACES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", default=list(program.MODES))
    parser.add_argument("--states", type=int, default=2000, help="at most so many for each save that loses power")
    parser.add_argument("--kills", type=int, default=1000, help="random kills of one rank; of two ranks 3 in 10 of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, help="load from so many folders in one process")
    parser.add_argument("--show", type=int, default=3, help="how many bad cases of each check to print")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Print a line for each check, and the sum; return the number of bad cases."""
    options = parse(words)
    if tracing.MISSING and {"kills", "power"} & set(options.checks):
        raise SystemExit(f"{tracing.MISSING}; the checks kills and power need it")
    # As in tests/conftest.py: torch's store asks the domain name system, which may take seconds to say nothing.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    began = time.monotonic()
    print(f"accelerate {accelerate.__version__} from {Path(accelerate.__file__).parent}", flush=True)
    cases = bad = 0
    with tempfile.TemporaryDirectory(dir=fast_folder()) as temporary:
        folder = Path(temporary)
        program.warm(folder / "warm")
        for report in check(options, folder):
            print(report, flush=True)
            for case in report.bad[: options.show]:
                print(f"    {case}", flush=True)
            cases, bad = cases + report.cases, bad + len(report.bad)
    print(f"all: {cases} cases in {time.monotonic() - began:.0f} s, {bad} bad", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
