"""Feed the readers of checkpoints with broken files: `python -m tests.fault.fuzz --inputs 1000000`.

A reader may accept an input or refuse it with a `CheckpointError`. Anything else is a failure: another exception, a
crash, more than a second, more memory than a gigabyte, or anything read or written outside of the folder. Inputs that
failed are written to `tests/fault/crashes`, where a test reads them again.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from accelerate.checkpoint import commit, dcp, layout, manifest, source, train_state, trust, weights
from accelerate.checkpoint.tensor_file import read_header
from accelerate.core.errors import CheckpointError
from tests.fault.mutate import NODES, TEXTS, archived, changed_bytes, instructions, mutated, mutated_pickle
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


class TensorHeaders(Headers):
    """The same, where only the header is read, and a file is written anew without being loaded."""

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        found = read_header(self.file)
        sum(info.numel for info in found.tensors.values())
        check_announced(source.open_weights(self.folder).num_bytes, len(content))


def check_announced(num_bytes: int, size: int) -> None:
    """Refuse that a small file becomes a large one."""
    if num_bytes > source._REPEATED * size + source._REPEATED_BYTES:
        raise Escape(f"{size} bytes announce {num_bytes}")


def sharded(folder: Path) -> None:
    """Write what torch writes for shards: two tensors, one of them in two pieces, a scalar and something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"model": {"w": torch.ones(4), "b": torch.ones(2, 3).half(), "n": torch.tensor(1)}, "epoch": 3}
        torch_dcp.save(state, checkpoint_id=folder, no_dist=True)
    file, data = folder / dcp.METADATA_NAME, folder / "__0_0.distcp"
    found = pickle.loads(file.read_bytes())
    half = io.BytesIO()
    torch.save(torch.ones(2), half)
    chunks = [ChunkStorageMetadata(torch.Size([place]), torch.Size([2])) for place in (0, 2)]
    found.state_dict_metadata["model.w"].chunks[:] = chunks
    places = {index: place for index, place in found.storage_data.items() if index.fqn != "model.w"}
    begin = data.stat().st_size
    for number, chunk in enumerate(chunks):
        info = torch_dcp.filesystem._StorageInfo(data.name, begin + number * half.tell(), half.tell())
        places[MetadataIndex("model.w", chunk.offsets, number)] = info
    found.storage_data = places
    data.write_bytes(data.read_bytes() + 2 * half.getvalue())
    file.write_bytes(pickle.dumps(found))


class Shards(Reader):
    """`.metadata` of a sharded folder, whose tensors are read then."""

    def __init__(self, base: Path):
        super().__init__(base)
        sharded(self.folder)
        (self.folder / "link").symlink_to(self.victim)
        self.file = self.folder / dcp.METADATA_NAME
        found = pickle.loads(self.file.read_bytes())
        self.good = [pickle.dumps(found, protocol) for protocol in (2, 4)]
        self.parts = [instructions(content) for content in self.good]
        self.size = sum(path.stat().st_size for path in self.folder.glob("*.distcp"))

    def make(self, draw: random.Random) -> bytes:
        if draw.random() < 0.2:
            return changed_bytes(draw.choice(self.good), self.good, draw)
        return mutated_pickle(self.parts, draw)

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        found = dcp.read_folder(self.folder)
        if any(not os.path.realpath(self.folder / name).startswith(f"{self.folder}/") for name in found.files):
            raise Escape(f"{list(found.files)} was accepted")
        if not found.missing:
            check_announced(sum(entry.info.num_bytes for entry in found.weights.values()), self.size)
        for name in found.weights:
            dcp.read_tensor(found, name)


class Records(Shards):
    """The same, as any plain records."""

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        trust.read_records(self.file, dcp._CLASSES)


class Saved(Reader):
    """Files of `torch.save`, in its format of today and the one before."""

    def __init__(self, base: Path):
        super().__init__(base)
        self.file = self.folder / layout.WEIGHTS_NAME
        self.archives: list[tuple[list[bytes], list[tuple[str, bytes]]]] = []
        self.old: list[tuple[list[bytes], bytes, bytes]] = []
        for state in self.states():
            stream = io.BytesIO()
            torch.save(state, stream)
            self.good.append(stream.getvalue())
            with zipfile.ZipFile(stream) as archive:
                entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
            content = next(content for name, content in entries if name.endswith(".pkl"))
            self.archives.append((instructions(content), [item for item in entries if item[1] is not content]))
            stream = io.BytesIO()
            torch.save(state, stream, _use_new_zipfile_serialization=False)
            self.good.append(self._without_addresses(stream.getvalue()))
            self.old.append(self._divided(self.good[-1]))

    @staticmethod
    def _without_addresses(content: bytes) -> bytes:
        """Call storages by a number, which is the same in every process, and not by where they lay."""
        known: dict[bytes, bytes] = {}
        return re.sub(
            rb"\d{14,}", lambda found: known.setdefault(found[0], b"%0*d" % (len(found[0]), len(known))), content
        )

    @staticmethod
    def _divided(content: bytes) -> tuple[list[bytes], bytes, bytes]:
        """Return the fourth of the pickles, which holds the state, and what stands before and behind it."""
        stream = io.BytesIO(content)
        for _ in range(3):
            pickle.load(stream)
        begin = stream.tell()
        parts = instructions(content[begin:])
        end = begin + len(b"".join(parts))
        return parts, content[:begin], content[end:]

    def states(self) -> list[Any]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        base = torch.arange(6.0)
        views = {"a": base, "b": base.view(2, 3).t(), "c": torch.nn.Parameter(base[2:4]), "d": base.half()}
        kinds = {
            "set": {1, 2},
            "o": OrderedDict(a=1),
            (1, "a"): torch.Size([1]),
            "z": 1j,
            "s": torch.eye(2).to_sparse(),
        }
        rng = {"numpy": np.random.RandomState(0).get_state()[:1], "array": np.arange(4), "torch": torch.ones(8).byte()}
        return [model.state_dict(), optimizer.state_dict(), views, kinds, rng]

    def make(self, draw: random.Random) -> bytes:
        kind = draw.random()
        if kind < 0.2:
            return changed_bytes(draw.choice(self.good), self.good, draw)
        if kind < 0.6:
            parts, entries = draw.choice(self.archives)
            return archived([("archive/data.pkl", mutated_pickle([parts], draw)), *entries], draw)
        parts, head, tail = draw.choice(self.old)
        return head + mutated_pickle([parts], draw) + tail

    def read(self, content: bytes) -> None:
        self.file.write_bytes(content)
        found = trust.read_pickle(self.file, mapped=len(content) % 2 == 0)
        if isinstance(found, dict):
            check_announced(source.open_weights(self.folder).num_bytes, len(content))


class Pieces(Saved):
    """One tensor in a `.distcp` file."""

    def states(self) -> list[Any]:
        return [torch.ones(2, 3), torch.arange(6).view(2, 3).t(), torch.tensor(1.0), torch.ones(3).bfloat16()]

    def read(self, content: bytes) -> None:
        trust.load_tensor(io.BytesIO(content), "the piece")


READERS: dict[str, Callable[[Path], Reader]] = {
    "manifest": Manifests,
    "index": Indices,
    "document": Documents,
    "header": Headers,
    "journal": Journals,
    "names": Names,
    "tensor-header": TensorHeaders,
    "shards": Shards,
    "records": Records,
    "saved": Saved,
    "piece": Pieces,
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
        worker.join()
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
            f"{name:14} {outcome.num_inputs:>10,} inputs, {rate:>8,.0f} per second of one processor, "
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
