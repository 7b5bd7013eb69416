"""A disk that refuses: the old checkpoint stays, all ranks hear of it, and the next save needs no cleaning."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate.checkpoint import commit, layout
from accelerate.core.errors import CheckpointError
from accelerate.runtime.state import ProcessSettings, start
from tests.fault import disk
from tests.support.ranks import run_on_ranks
from tests.unit.checkpoint.support import Counter, Run

Fault = Callable[[Path], AbstractContextManager[None]]

FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "small files": (disk.small_files, ("EFBIG", "ulimit -f", "bytes are free", "it needs")),
    "no descriptors": (disk.no_descriptors, ("EMFILE", "ulimit -n")),
    "EIO on fsync": (disk.failing_fsync(disk.FSYNC_ERRORS["EIO on fsync"]), ("EIO", "dmesg", "/checkpoint_")),
    "EDQUOT on fsync": (disk.failing_fsync(disk.FSYNC_ERRORS["EDQUOT on fsync"]), ("EDQUOT", "quota", "free")),
    "read only": (disk.read_only, ("EROFS", "Mount it writable")),
    "no rights": (disk.no_rights, ("EACCES", "Let this user write")),
    "full": (disk.full_disk, ("ENOSPC", "Free some space", "bytes are free", "it needs")),
}
"""Name -> the fault, and what the error has to say besides the path."""

EVERYWHERE = ["small files", "no descriptors", "EIO on fsync", "EDQUOT on fsync"]
AS_ROOT = ["read only", "no rights"]
PLACES = [(1, 0), (2, 0), (2, 1)]
"""World size, and the rank with the fault."""

needs_mount = pytest.mark.skipif(not disk.can_mount(), reason="mounting a file system needs root")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


class Trained:
    """A run with one of each, whose object says what was saved last."""

    def __init__(self, folder: Path):
        self.runtime = start(ProcessSettings(cpu=True))
        self.folder = folder / "checkpoints"
        self.box = Counter("old")
        model = torch.nn.Linear(40, 40)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 40)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        self.run = Run(folder, self.runtime, automatic_checkpoint_naming=True, total_limit=1).having(
            models=[model], optimizers=[optimizer], schedulers=[scheduler], custom_objects=[self.box]
        )
        self.run.save()

    def barrier(self) -> None:
        self.runtime.collectives.barrier()

    def visible(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def checkpoints(self) -> dict[str, str]:
        files = disk.fingerprint(self.folder)
        return {name: content for name, content in files.items() if name.startswith("checkpoint_")}

    def meet(self, fault: AbstractContextManager[None], name: str) -> dict[str, Any]:
        """Save with a fault and without; return what was seen."""
        before, old = self.checkpoints(), self.box.value
        self.barrier()
        self.box.value = name
        with fault:
            self.barrier()
            began = time.monotonic()
            error = error_of(self.run.save)
            seconds = time.monotonic() - began
            self.barrier()
        self.barrier()
        kept = self.checkpoints()
        self.run.load()
        seen = {"error": error, "seconds": seconds, "kept": kept == before, "old": self.box.value == old}
        self.box.value = name
        self.run.save()
        self.box.value = None
        seen["again"] = self.run.load().folder.name == self.visible()[0] and self.box.value == name
        return seen | {"left": self.visible()[1:]}


def error_of(action: Callable[[], Any]) -> str:
    """Return the class and the text of the error that `action` raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _meet_faults(folder: Path, rank: int, names: list[str]) -> dict[str, Any]:
    trained = Trained(folder)
    own = trained.runtime.process.rank
    none = contextlib.nullcontext()
    return {name: trained.meet(FAULTS[name][0](folder) if own == rank else none, name) for name in names}


def check(results: list[dict[str, Any]], rank: int | None, words: dict[str, tuple[str, ...]], folder: Path) -> None:
    for name in results[0]:
        texts = {result[name]["error"] for result in results}
        assert len(texts) == 1, f"{name}: ranks raise different errors: {texts}"
        text = texts.pop()
        assert text.startswith("CheckpointError: "), f"{name}: {text}"
        for word in (str(folder), *words[name]):
            assert word in text, f"{name}: {word!r} is not in: {text}"
        if len(results) > 1 and rank is not None:
            assert f"rank {rank}: " in text, f"{name}: {text}"
        for result in results:
            seen = result[name]
            assert seen["seconds"] < 10, (name, seen)
            assert (seen["kept"], seen["old"], seen["again"], seen["left"]) == (True, True, True, []), (name, seen)


def meet_faults(folder: Path, world: int, rank: int, names: list[str]) -> None:
    results = run_on_ranks(_meet_faults, world, folder, rank, names)
    check(results, rank, {name: FAULTS[name][1] for name in names}, folder)


@pytest.mark.parametrize(("world", "rank"), PLACES)
def test_a_refused_write_leaves_the_old_checkpoint_and_tells_all_ranks(tmp_path: Path, world: int, rank: int) -> None:
    meet_faults(tmp_path, world, rank, EVERYWHERE)


@needs_mount
@pytest.mark.parametrize(("world", "rank"), PLACES)
def test_a_folder_that_may_not_be_written(tmp_path: Path, world: int, rank: int) -> None:
    meet_faults(tmp_path, world, rank, AS_ROOT)


@needs_mount
@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_is_really_full(tmp_path: Path, world: int) -> None:
    def on_small_disk() -> list[dict[str, Any]]:
        # In a process of its own, so that the mount ends with it.
        disk.own_mounts()
        disk.subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(tmp_path)], check=True)
        return run_on_ranks(_meet_faults, world, tmp_path, 0, ["full"])

    [results] = run_on_ranks(on_small_disk, 1)
    check(results, None, {"full": FAULTS["full"][1]}, tmp_path)


def _long_name(folder: Path) -> dict[str, Any]:
    trained = Trained(folder)
    before = disk.fingerprint(folder)
    run = Run(runtime=trained.runtime).having(custom_objects=[trained.box])
    error = error_of(lambda: run.save(folder / ("n" * 300)))
    trained.barrier()
    return {"error": error, "kept": disk.fingerprint(folder) == before, "names": sorted(os.listdir(folder))}


@pytest.mark.parametrize("world", [1, 2])
def test_a_name_that_is_too_long(tmp_path: Path, world: int) -> None:
    for seen in run_on_ranks(_long_name, world, tmp_path):
        assert seen["error"].startswith("CheckpointError")
        for word in ("ENAMETOOLONG", "shorter name", str(tmp_path), "n" * 300):
            assert word in seen["error"]
        assert (seen["kept"], seen["names"]) == (True, ["checkpoints"])


# The last step ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_may_not_be_durable_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Counter("new")
    run = Run(tmp_path, automatic_checkpoint_naming=True).having(custom_objects=[box])
    real = commit.durable.flush_folder

    def flush(folder: Path) -> None:
        if folder.name == layout.CHECKPOINTS_FOLDER:
            raise CheckpointError("the disk is gone")
        real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(commit.durable, "flush_folder", flush)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            run.save()
    assert os.listdir(tmp_path / "checkpoints") == []
    assert run.save().name == "checkpoint_0"


def _one_node_fails_at_its_last_step(folder: Path) -> Any:
    runtime = start(ProcessSettings(cpu=True))
    rank = runtime.process.rank
    runtime = replace(runtime, process=replace(runtime.process, local_rank=0, local_world_size=1))
    node = folder / f"disk{rank}"
    run = Run(node, runtime, automatic_checkpoint_naming=True, save_on_each_node=True).having(
        custom_objects=[Counter(1)]
    )
    real = commit.durable.flush_folder

    def flush(path: Path) -> None:
        if path.name == layout.CHECKPOINTS_FOLDER:
            raise CheckpointError("the disk is gone")
        real(path)

    if rank == 1:
        (node / layout.CHECKPOINTS_FOLDER).mkdir(parents=True)
        commit.durable.flush_folder = flush
    error = error_of(run.save)
    commit.durable.flush_folder = real
    runtime.collectives.barrier()
    left = os.listdir(node / "checkpoints")
    return error, left, run.save().name


def test_what_one_node_could_not_put_in_place_is_on_no_node(tmp_path: Path) -> None:
    for error, left, again in run_on_ranks(_one_node_fails_at_its_last_step, 2, tmp_path):
        assert "rank 1: CheckpointError" in error
        assert "rank 0" not in error
        assert (left, again) == ([], "checkpoint_0")


# Every file, every call ---------------------------------------------------------------------------------------------

# The package safetensors writes under another name.
WRITES = "write,pwrite64,writev,rename,renameat,renameat2"
INJECTED = [
    (WRITES, "ENOSPC", "Free some space"),
    (WRITES, "EIO", "dmesg"),
    (WRITES, "EDQUOT", "quota"),
    ("fsync", "EIO", "dmesg"),
    ("openat", "EMFILE", "ulimit -n"),
    ("openat", "EROFS", "writable"),
    ("openat", "EACCES", "this user"),
]


def _meet_injected(folder: Path, rank: int, cases: list[tuple[str, str, str]], every: int) -> dict[str, Any]:
    trained = Trained(folder)
    own = trained.runtime.process.rank
    seen = {}
    mine = (f"random_states_{rank}.json", f"random_states_{rank}.safetensors")
    shared = [
        name for name in disk.fingerprint(trained.folder / "checkpoint_0") if not name.startswith("random_states")
    ]
    files = [*mine, *(shared if rank == 0 else [])][::every]
    for calls, error, _ in cases:
        for name in files:
            final = f"checkpoint_{trained.run.project.iteration}"
            staging = trained.folder / f"{layout.SAVING_NAME}-{commit._short(final)}" / final
            tracer = disk.injected([staging / name], calls, error) if own == rank else contextlib.nullcontext()
            seen[f"{calls} {error} {name}"] = trained.meet(tracer, name)
    return seen


def meet_injected(folder: Path, world: int, rank: int, cases: list[tuple[str, str, str]], every: int = 1) -> int:
    results = run_on_ranks(_meet_injected, world, folder, rank, cases, every, timeout=600)
    advice = {f"{calls} {error}": (error, remedy) for calls, error, remedy in cases}
    words = {name: (*advice[name.rpartition(" ")[0]], name.rpartition(" ")[2]) for name in results[0]}
    check(results, rank, words, folder)
    return len(results[0])


@needs_strace
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_an_error_of_the_kernel_names_the_file(tmp_path: Path, world: int, rank: int) -> None:
    assert meet_injected(tmp_path, world, rank, INJECTED[:1], every=3) >= 1


@needs_strace
@pytest.mark.full
@pytest.mark.parametrize(("world", "rank"), PLACES)
@pytest.mark.parametrize("case", INJECTED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_file_meets_every_error_of_the_kernel(
    tmp_path: Path, world: int, rank: int, case: tuple[str, str, str]
) -> None:
    print(f"\n{case[0]} {case[1]}, rank {rank} of {world}: {meet_injected(tmp_path, world, rank, [case])} saves")
