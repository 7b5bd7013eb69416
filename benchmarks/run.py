"""Time this library against hand-written PyTorch, and against Accelerate 1.15 run as a black box.

    python benchmarks/run.py [--rounds 25] [--peer FOLDER] [case ...]

For each case one worker runs this library and one the peer; rounds alternate between the two. In a round a worker
times the hand-written loop and the same with the library. The table shows the median of the rounds' ratios, with the
first and third quartile. The peer is installed with
`pip install --no-deps --target .peer accelerate==1.15.0` (make bench does); without it its column stays empty.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


class Worker:
    """The processes of one case on one of the two libraries."""

    def __init__(self, case: str, processes: int, library: str | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank in range(processes):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            if library is not None:
                environment["PYTHONPATH"] = library
            if processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            self.ranks.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "worker.py"), case],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def round(self) -> tuple[float, float]:
        self.ranks[0].stdin.write("go\n")
        self.ranks[0].stdin.flush()
        line = self.ranks[0].stdout.readline()
        if not line:
            raise SystemExit("a worker ended before its time; see its error above")
        by_hand, with_library = map(float, line.split())
        return by_hand, with_library

    def end(self) -> None:
        self.ranks[0].stdin.close()
        for process in self.ranks:
            process.wait()


def quartiles(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def measure(case: str, processes: int, rounds: int, peer: str | None, only_here: bool) -> dict[str, list]:
    workers = {"ours": Worker(case, processes, None)}
    if peer is not None and not only_here:
        workers["peer"] = Worker(case, processes, peer)
    found: dict[str, list] = {"ours": [], "peer": [], "by hand": []}
    for _ in range(rounds):
        for name, worker in workers.items():
            by_hand, with_library = worker.round()
            found[name].append(with_library / by_hand)
            if name == "ours":
                found["by hand"].append(by_hand)
    for worker in workers.values():
        worker.end()
    return found


def main() -> None:
    from cases import CASES, ONLY_HERE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--peer", type=Path, default=HERE.parent / ".peer", help="folder where the peer is installed")
    options = parser.parse_args()
    peer = str(options.peer.resolve()) if options.peer.is_dir() else None
    print("time with the library / time by hand: median (quartiles)\n")
    print(f"| {'case':51} | {'this library':22} | bound | {'Accelerate 1.15':22} | by hand |")
    print(f"|{'-' * 53}|{'-' * 24}|{'-' * 7}|{'-' * 24}|{'-' * 9}|")
    for name in options.cases or CASES:
        title, _, processes, _, bound = CASES[name]
        found = measure(name, processes, options.rounds, peer, name in ONLY_HERE)
        hand = f"{statistics.median(found['by hand']) * 1000:.0f} ms"
        limit = "-" if bound is None else f"{bound:.2f}"
        print(
            f"| {title:51} | {quartiles(found['ours']):22} | {limit:5} | {quartiles(found['peer']):22} | {hand:7} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
