"""Time whole commands: help, import, and starting a script, against what they are measured by.

    python benchmarks/startup.py [--rounds 11] [--peer FOLDER]

Commands of one line run in turn, so that a drifting machine favours none. Times are seconds of wall clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = [sys.executable]
BIN = Path(sys.executable).parent
EMPTY = "import torch\n"
MEET = (
    "import torch.distributed as dist\n"
    "dist.init_process_group('gloo')\n"
    "dist.barrier()\n"
    "dist.destroy_process_group()\n"
    "import os, sys; sys.stdout.flush(); os._exit(0)\n"
)


def seconds(command: list[str], peer: str | None) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs; a checkout is compiled here once
    if peer is not None:
        environment["PYTHONPATH"] = peer
    start = time.perf_counter()
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peer", type=Path, default=HERE.parent / ".peer")
    options = parser.parse_args()
    peer = str(options.peer.resolve()) if options.peer.is_dir() else None
    folder = tempfile.mkdtemp()
    empty, meet = Path(folder, "empty.py"), Path(folder, "meet.py")
    empty.write_text(EMPTY)
    meet.write_text(MEET)
    ours = [str(BIN / "accelerate")]
    theirs = [*PYTHON, "-m", "accelerate.commands.accelerate_cli"]
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2"]
    two = ["launch", "--num_processes", "2"]
    lines = [
        ("accelerate --help", [*ours, "--help"], None, [*theirs, "--help"], "<= 0.15 s"),
        ("accelerate launch --help", [*ours, "launch", "--help"], None, [*theirs, "launch", "--help"], "<= 0.15 s"),
        (
            "import accelerate",
            [*PYTHON, "-c", "import torch, accelerate"],
            [*PYTHON, "-c", "import torch"],
            [*PYTHON, "-c", "import torch, accelerate"],
            "<= 0.02 s more",
        ),
        (
            "launch, 1 process",
            [*ours, "launch", "--cpu", str(empty)],
            [*PYTHON, str(empty)],
            [*theirs, "launch", "--cpu", str(empty)],
            "<= 0.15 s more",
        ),
        (
            "launch, 2 processes",
            [*ours, *two, "--cpu", str(meet)],
            [*torchrun, str(meet)],
            [*theirs, *two, "--multi_gpu", str(meet)],
            "<= 1.05 of torchrun",
        ),
    ]
    print("| command | this library | compared with | difference | ratio | bound | Accelerate 1.15 |")
    print("|---|---|---|---|---|---|---|")
    for title, command, plain, other, bound in lines:
        found: dict[str, list[float]] = {"ours": [], "plain": [], "peer": []}
        for number in range(options.rounds + 1):
            times = {"ours": seconds(command, None)}
            if plain is not None:
                times["plain"] = seconds(plain, None)
            if peer is not None:
                times["peer"] = seconds(other, peer)
            if number:  # the first round fills caches
                for name, value in times.items():
                    found[name].append(value)
        mine = statistics.median(found["ours"])
        base = difference = ratio = "-"
        if plain is not None:
            base = f"{statistics.median(found['plain']):.2f} s"
            pairs = list(zip(found["ours"], found["plain"], strict=True))
            difference = f"{statistics.median(a - b for a, b in pairs) * 1000:+.0f} ms"
            ratio = f"{statistics.median(a / b for a, b in pairs):.3f}"
        theirs_text = f"{statistics.median(found['peer']):.2f} s" if found["peer"] else "-"
        print(f"| {title} | {mine:.3f} s | {base} | {difference} | {ratio} | {bound} | {theirs_text} |", flush=True)


if __name__ == "__main__":
    main()
