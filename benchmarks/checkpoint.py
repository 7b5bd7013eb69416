"""Time checkpoints against the same bytes written and read by hand, and against Accelerate 1.15.

    python benchmarks/checkpoint.py [--rounds 7] [--megabytes 256] [--folder FOLDER] [--peer FOLDER]

The state is a model of the given size with AdamW, three times that in all. One worker per library keeps it in memory;
in each round it does one thing by hand and the same with the library; which comes first changes from round to round. What
an earlier save has left is removed before the clock starts. By hand, a save is `torch.save` and an fsync; a load is
`torch.load(mmap=True)`, every number read once. The peer is installed as for `run.py`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


# In a worker -------------------------------------------------------------------------------------------------------


class State:
    """A trained model, prepared."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        import torch
        from accelerate import Accelerator

        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(max(megabytes // 4, 1))])
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_by_hand(self) -> None:
        import torch

        with (self.folder / "by hand.pt").open("xb") as stream:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def load_by_hand(self) -> None:
        import torch

        for tensor in _tensors(torch.load(self.folder / "by hand.pt", mmap=True)):
            tensor.sum()

    def clear(self) -> None:
        """Remove what was saved, so that each save makes new files, as a new checkpoint does."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def save(self, name: str = "saved", **options: Any) -> Any:
        return self.accelerator.save_state(str(self.folder / name), **options)

    def load(self, **options: Any) -> None:
        """Load, and read every number as by hand: what is mapped would be read later otherwise."""
        self.accelerator.load_state(str(self.folder / "saved"), **options)
        for tensor in _tensors(self.optimizer.state_dict()):
            tensor.sum()


def _tensors(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif hasattr(state, "sum"):
        yield state


def _seconds(*actions: Callable[[], Any], swapped: bool, before: Callable[[], None] = lambda: None) -> list[float]:
    """Return how long each takes; `swapped` begins with the last, and nobody measures what comes `before` each."""
    found = [0.0] * len(actions)
    for place in sorted(range(len(actions)), reverse=swapped):
        before()
        start = time.perf_counter()
        handle = actions[place]()
        found[place] = time.perf_counter() - start
        if hasattr(handle, "wait"):  # a save in the background, which the next action shall not meet
            handle.wait()
    return found


def _drop_from_memory(folder: Path) -> None:
    """Let the next reader of these files wait for the disk, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fdatasync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_bytes(action: Callable[[], Any]) -> int:
    """Return by how much the memory of this process grew at most. Files that are mapped or cached do not count."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("RssAnon")
    done = [False]
    highest = [before]

    import threading

    def watch() -> None:
        while not done[0]:
            highest[0] = max(highest[0], _status("RssAnon"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done[0] = True
    watcher.join()
    return highest[0] - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def work(folder: Path, megabytes: int) -> None:
    state = State(folder, megabytes)
    is_ours = "blocking" in inspect.signature(state.accelerator.save_state).parameters
    total_bytes = 3 * megabytes * 2**20
    print("ready", flush=True)
    for line in sys.stdin:
        number, _, what = line.strip().partition(" ")
        swapped = int(number) % 2 == 1
        if what == "save":
            state.clear()
            print(*_seconds(state.save_by_hand, state.save, swapped=swapped), flush=True)
        elif what == "background" and is_ours:
            state.clear()
            in_background = partial(state.save, "saved 2", blocking=False)
            print(*_seconds(state.save, in_background, swapped=swapped), flush=True)
            state.save_by_hand()  # for the loads that follow
        elif what == "load from disk":
            drop = partial(_drop_from_memory, folder)
            print(*_seconds(state.load_by_hand, state.load, swapped=swapped, before=drop), flush=True)
        elif what.startswith("load"):
            options = {"verify": what.split()[1]} if is_ours and " " in what else {}
            load = partial(state.load, **options)
            print(*_seconds(state.load_by_hand, load, swapped=swapped), flush=True)
        elif what == "memory":
            state.clear()
            grown = [_peak_bytes(state.save)]
            if is_ours:
                grown.append(_peak_bytes(lambda: state.save("saved 2", blocking=False).wait()))
            print(*[number / total_bytes for number in grown], flush=True)
        else:
            print(flush=True)


# In the main process -----------------------------------------------------------------------------------------------


class Worker:
    """A process that holds the state with one of the two libraries."""

    def __init__(self, folder: Path, megabytes: int, library: str | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if library is not None:
            environment["PYTHONPATH"] = library
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", __file__, "--work", str(folder), "--megabytes", str(megabytes)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def ask(self, number: int, what: str) -> list[float]:
        """Let it do one thing in round `number`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number} {what}\n")
        self._process.stdin.flush()
        return [float(word) for word in self._read().split()]

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended before its time; see its error above")
        return line

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


CASES = {
    "save": ("blocking save / torch.save and fsync", 1.15),
    "background": ("time until a background save returns / blocking save", 0.10),
    "load full": ("load, all hashes compared / torch.load(mmap=True), all read", 1.20),
    "load from disk": ("the same, files not in memory", None),
    "load size": ("load, sizes compared / the same", None),
    "load off": ("load, nothing compared / the same", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the model; the state is three times that")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--peer", type=Path, default=HERE.parent / ".peer", help="folder where the peer is installed")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.megabytes)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="accelerate-benchmark-") as place:
        workers = {"ours": Worker(Path(place, "ours"), options.megabytes, None)}
        if options.peer.is_dir():
            workers["peer"] = Worker(Path(place, "peer"), options.megabytes, str(options.peer.resolve()))
        _print_memory(workers)  # first: later saves in the background find their memory there
        _print_times(workers, options.rounds)
        for worker in workers.values():
            worker.end()


def _print_times(workers: dict[str, Worker], rounds: int) -> None:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for case in CASES:
            for name, worker in workers.items():
                answer = worker.ask(number, case)
                if answer and number:  # the first round touches memory and files for the first time
                    found.setdefault((case, name), []).append((answer[0], answer[1]))
    print("| case | this library | bound | Accelerate 1.15 | compared with |")
    print("|---|---|---|---|---|")
    for case, (title, bound) in CASES.items():
        ours = found[case, "ours"]
        limit = "-" if bound is None else f"{bound:.2f}"
        base = f"{statistics.median(by_hand for by_hand, _ in ours):.2f} s"
        print(f"| {title} | {_ratio(ours)} | {limit} | {_ratio(found.get((case, 'peer'), []))} | {base} |", flush=True)


def _ratio(times: list[tuple[float, float]]) -> str:
    if not times:
        return "-"
    low, middle, high = statistics.quantiles([library / by_hand for by_hand, library in times], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _print_memory(workers: dict[str, Worker]) -> None:
    grown = {name: worker.ask(0, "memory") for name, worker in workers.items()}
    print("\nMemory that a save needs beside the state, as a part of it: ", end="")
    print("; ".join(f"{name}: {', '.join(f'{part:.2f}' for part in parts)}" for name, parts in grown.items()))
    print("(blocking, then in the background)")


if __name__ == "__main__":
    main()
