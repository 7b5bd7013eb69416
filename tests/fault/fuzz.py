"""Feed the readers of checkpoints with broken files: `python -m tests.fault.fuzz --inputs 1000000`.

A reader may accept an input or refuse it with a `CheckpointError`. Anything else is a failure: another exception, a
crash, more than a second, more memory than a gigabyte, or anything read or written outside of the folder. Inputs that
failed are written to `tests/fault/crashes`, where a test reads them again.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from accelerate.checkpoint import commit, layout, manifest, train_state, weights
from accelerate.core.errors import CheckpointError
from tests.fault.mutate import NODES, TEXTS, changed_bytes, mutated
from tests.support.checkpoint_files import write_safetensors, write_state, write_weights

CRASHES = Path(__file__).with_name("crashes")
MEMORY_LIMIT = 2**30
SECONDS_LIMIT = 1.0
BUSY_LIMIT = 20.0
SILENCE_LIMIT = 300.0


class Escape(Exception):
    """Something outside of the folder was touched, or a name that leads there was accepted."""


class Reader:
    """One reader with a folder of its own, beside which lies a victim."""

    def __init__(self, base: Path):
        self.folder = base / "folder"
        self.folder.mkdir()
        self.victim = base / "victim"
        self.victim.write_text("mine")
        self.good: list[bytes] = []

    def make(self, draw: random.Random) -> bytes:
        """Return one input."""
        return mutated(self.good, draw)

    def read(self, content: bytes) -> None:
        """Read one input."""
        raise NotImplementedError

    def check_victim(self) -> None:
        """Raise if something outside was touched."""
        try:
            untouched = self.victim.read_bytes() == b"mine"
        except OSError:
            untouched = False
        if not untouched or sorted(os.listdir(self.victim.parent)) != ["folder", "victim"]:
            raise Escape("the victim was touched")


class Manifests(Reader):
    """`accelerate_manifest.json`, half of them with a right hash."""

    def __init__(self, base: Path):
        super().__init__(base)
        (self.folder / "optimizer.json").write_bytes(b"{}")
        manifest.write(self.folder, {}, save_id="a", world_size=2, step=1, iteration=3)
        (self.folder / "link").symlink_to(base)
        self.file = self.folder / layout.MANIFEST_NAME
        self.good = [self.file.read_bytes()]

    def make(self, draw: random.Random) -> bytes:
        text = super().make(draw)
        return self._signed(text) if draw.random() < 0.5 else text

    @staticmethod
    def _signed(text: bytes) -> bytes:
        head, _, rest = text.rpartition(b'"xxh3"')
        begin = rest.find(b'"') + 1
        if not head or len(rest) < begin + 16:
            return text
        blank = head + b'"xxh3"' + rest[:begin] + b"0" * 16 + rest[begin + 16 :]
        digest = manifest._own_hash(blank, "0" * 16)
        return head + b'"xxh3"' + rest[:begin] + digest.encode() + rest[begin + 16 :]

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        found = manifest.read(self.folder)
        assert found is not None
        for name in found.files:
            if not os.path.normpath(self.folder / name).startswith(f"{self.folder}/"):
                raise Escape(f"{name!r} was accepted")
        manifest.check(self.folder, found)


class Indices(Reader):
    """`model.safetensors.index.json`."""

    def __init__(self, base: Path):
        super().__init__(base)
        state = {"x": torch.ones(2), "y": torch.zeros(3)}
        write_weights(state, self.folder / "model.safetensors", 8)
        write_safetensors({"secret": torch.ones(1)}, self.folder / "link.safetensors")
        self.file = self.folder / layout.SAFE_WEIGHTS_INDEX_NAME
        self.good = [self.file.read_bytes()]

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        weights.load_weights(self.folder)


class Documents(Reader):
    """`optimizer.json`, with tensors that it may name."""

    def __init__(self, base: Path):
        super().__init__(base)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        kinds = {"set": {1, 2}, 3: (4, float("nan")), "x": torch.ones(2), "y": torch.eye(2).bool(), "b": b"1"}
        for number, state in enumerate((optimizer.state_dict(), scheduler.state_dict(), kinds)):
            write_state(self.folder, f"s{number}", state)
            self.good.append((self.folder / f"s{number}.json").read_bytes())
        self.good.append(json.dumps({"format": 1, "num_tensors": 2, "state": NODES}).encode())
        tensors = {"x": torch.ones(4), "y": torch.ones(4, dtype=torch.uint8)}
        write_safetensors(tensors, self.folder / "optimizer.safetensors")
        self.file = self.folder / "optimizer.json"

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        train_state.read_state(self.folder, "optimizer")


class Headers(Reader):
    """Headers of safetensors files."""

    def __init__(self, base: Path):
        super().__init__(base)
        self.file = self.folder / "model.safetensors"
        state = {"x": torch.ones(2), "y": torch.ones(3).half(), "z": torch.zeros(2, 0)}
        write_safetensors(state, self.file, {"t": "x"})
        self.headers, self.data = [], b""
        content = self.file.read_bytes()
        length = 8 + struct.unpack("<Q", content[:8])[0]
        self.headers, self.data = [content[8:length]], content[length:]
        self.good = [content]

    def make(self, draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return changed_bytes(self.good[0], self.good, draw)
        header = mutated(self.headers, draw)
        return struct.pack("<Q", len(header)) + header + self.data

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        weights.load_weights(self.folder)


class Journals(Reader):
    """`journal.json` of an interrupted save."""

    def __init__(self, base: Path):
        super().__init__(base)
        (self.folder / "link").symlink_to(base)
        self.pending = self.folder / layout.COMMIT_NAME
        journal = commit._Journal("folder", ["old", "sub/old", "absent"])
        self.good = [msgspec.json.encode(journal)]

    def read(self, content: bytes) -> None:
        shutil.rmtree(self.pending, ignore_errors=True)
        (self.pending / "folder" / "sub").mkdir(parents=True)
        (self.pending / "folder" / "new").write_bytes(b"new")
        (self.pending / "folder" / "sub" / "new").write_bytes(b"new")
        (self.folder / "old").write_bytes(b"old")
        (self.pending / layout.JOURNAL_NAME).write_bytes(content)
        try:
            commit.recover(self.folder)
        finally:
            self.check_victim()


class Names(Reader):
    """What `layout` makes of names."""

    def __init__(self, base: Path):
        super().__init__(base)
        self.good = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
        self.good += [b"checkpoint_17", b"model_2-00001-of-00003.safetensors", b"custom_checkpoint_3.pkl", b"sub/x"]

    def make(self, draw: random.Random) -> bytes:
        return changed_bytes(draw.choice(self.good), self.good, draw)

    def read(self, content: bytes) -> None:
        name = content.decode("utf-8", "replace")
        layout.is_checkpoint_file(name), layout.count_saved([name]), layout.custom_indices([name])
        number = layout.checkpoint_number(name)
        if number is not None and name != f"checkpoint_{number}":
            raise Escape(f"{name!r} is taken for checkpoint_{number}")
        if (removed := layout.plan_rotation([name, "checkpoint_5"], 1, "checkpoint_5")) and removed != [name]:
            raise Escape(f"{removed} would be removed")
        if layout.is_inside(name) and not os.path.normpath(f"/a/b/{name}").startswith("/a/b/"):
            raise Escape(f"{name!r} counts as inside")
        if layout.is_file_name(name) and os.path.dirname(os.path.normpath(f"/a/b/{name}")) != "/a/b":
            raise Escape(f"{name!r} counts as a file")


READERS: dict[str, Callable[[Path], Reader]] = {
    "manifest": Manifests,
    "index": Indices,
    "document": Documents,
    "header": Headers,
    "journal": Journals,
    "names": Names,
}


@dataclass
class Outcome:
    """What a reader made of its inputs."""

    num_inputs: int = 0
    num_accepted: int = 0
    seconds: float = 0.0
    """Of processor time."""
    failures: list[str] = field(default_factory=list)


def read_one(reader: Reader, content: bytes) -> bool:
    """Read one input; return whether it was accepted.

    Raises:
        Exception: Whatever is neither acceptance nor a clean refusal.
    """
    began = time.process_time()
    try:
        reader.read(content)
        accepted = True
    except CheckpointError as error:
        accepted = False
        if len(str(error)) > 10_000:
            raise AssertionError("the message is as long as the attack") from error
    if (seconds := time.process_time() - began) > SECONDS_LIMIT:
        raise TimeoutError(f"it took {seconds:.1f} s")
    return accepted


def feed(name: str, seed: int, begin: int, end: int, progress: mmap.mmap, base: Path) -> Outcome:
    """Give a reader the inputs of these numbers."""
    reader = READERS[name](base)
    outcome = Outcome()
    began = time.process_time()
    for number in range(begin, end):
        progress[:8] = struct.pack("<Q", number)
        content = reader.make(random.Random(seed * 10**12 + number))
        try:
            outcome.num_accepted += read_one(reader, content)
        except Exception as error:  # noqa: BLE001 - what it is, is the result
            outcome.failures.append(failed(name, seed, number, content, f"{type(error).__name__}: {error}"[:300]))
        outcome.num_inputs += 1
    reader.check_victim()
    outcome.seconds = time.process_time() - began
    return outcome


def failed(name: str, seed: int, number: int, content: bytes, problem: str) -> str:
    """Keep an input that failed; return a line about it."""
    CRASHES.mkdir(exist_ok=True)
    file = CRASHES / f"{name}--seed-{seed}-number-{number}.bin"
    file.write_bytes(content)
    return f"{name}, seed {seed}, number {number}: {problem} ({file})"


def _work(name: str, seed: int, begin: int, end: int, progress: mmap.mmap, answer: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as base:
        answer.send(feed(name, seed, begin, end, progress, Path(base)))
    sys.stdout.flush()
    os._exit(0)


def fuzz(name: str, seed: int, num_inputs: int) -> Outcome:
    """Feed one reader in a process of its own; go on behind an input that ends or stops the process."""
    context = multiprocessing.get_context("fork")
    total, begin = Outcome(), 0
    while begin < num_inputs:
        progress = mmap.mmap(-1, 8)
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(name, seed, begin, num_inputs, progress, send))
        worker.start()
        send.close()
        found = _watch(worker, progress, receive)
        if isinstance(found, Outcome):
            total.num_inputs += found.num_inputs
            total.num_accepted += found.num_accepted
            total.seconds += found.seconds
            total.failures += found.failures
            break
        [number] = struct.unpack("<Q", progress[:8])
        with tempfile.TemporaryDirectory() as base:
            content = READERS[name](Path(base)).make(random.Random(seed * 10**12 + number))
        total.failures.append(failed(name, seed, number, content, found))
        total.num_inputs += number + 1 - begin
        begin = number + 1
    return total


def _watch(worker: Any, progress: mmap.mmap, receive: Any) -> Outcome | str:
    """Wait for what a worker has to say; return what happened to it if it says nothing."""
    process = psutil.Process(worker.pid)
    seen, since = progress[:8], (0.0, time.monotonic())
    while not receive.poll(0.2):
        # Of its processor, because a busy machine may not let it run at all.
        now = (sum(process.cpu_times()[:2]), time.monotonic()) if worker.is_alive() else since
        if progress[:8] != seen:
            seen, since = progress[:8], now
        if now[0] - since[0] > BUSY_LIMIT or now[1] - since[1] > SILENCE_LIMIT:
            worker.kill()
            worker.join()
            return f"no end after {now[0] - since[0]:.0f} s of its processor, and {now[1] - since[1]:.0f} s"
    try:
        return receive.recv()
    except EOFError:
        return f"the process ended with {worker.exitcode}"
    finally:
        worker.join()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=300_000, help="for all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    options = parser.parse_args()
    names = list(READERS) if options.reader == "all" else [options.reader]
    failures: list[str] = []
    began, num_inputs = time.monotonic(), 0
    for name in names:
        outcome = fuzz(name, options.seed, options.inputs // len(names))
        num_inputs += outcome.num_inputs
        failures += outcome.failures
        rate = outcome.num_inputs / max(outcome.seconds, 1e-9)
        print(
            f"{name:10} {outcome.num_inputs:>10,} inputs, {rate:>8,.0f} per second of one processor, "
            f"{outcome.num_accepted:,} accepted, {len(outcome.failures)} failures",
            flush=True,
        )
        for line in outcome.failures[:10]:
            print(f"    {line}", flush=True)
    seconds = time.monotonic() - began
    print(f"seed {options.seed}: {num_inputs:,} inputs in {seconds:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
