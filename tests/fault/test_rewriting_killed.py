"""Processes that convert or merge are killed before each of their file operations: nothing is lost, nothing is half."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp

from accelerate.checkpoint import dcp, layout
from accelerate.checkpoint.convert import convert, merge_fsdp_weights, plan
from accelerate.checkpoint.describe import describe, verify
from accelerate.checkpoint.weights import load_weights

from ..unit.checkpoint.support import Counter, Run, Tied, same_bits

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"}
STATE = {"a": torch.arange(6.0), "b": torch.ones(3)}


def killed(act: Callable[[], None], place: Path, number: int) -> bool:
    """Run `act` in a process that is killed before file operation `number` below `place`; tell whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and args and str(args[0]).startswith(str(place)):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def test_a_merge_that_removes_its_source_never_loses_the_weights(tmp_path: Path) -> None:
    number, removed, merged = 0, 0, 0
    while True:
        number += 1
        work = tmp_path / str(number)
        work.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_dcp.save({"model": STATE}, checkpoint_id=work / "fsdp", no_dist=True)
        again = killed(partial(merge_fsdp_weights, work / "fsdp", work / "out", True, True), work, number)
        if (work / "out").exists():
            merged += 1
            assert same_bits(load_weights(work / "out"), STATE)
        else:
            found = dcp.read_folder(work / "fsdp")
            assert same_bits({name: dcp.read_tensor(found, name) for name in STATE}, STATE)
        removed += not (work / "fsdp" / ".metadata").exists()
        if not again:
            break
        merge_again(work)
    assert number > 10
    assert merged > 2
    assert removed >= 1


def merge_again(work: Path) -> None:
    """What a killed merge has left behind is not in the way of the next one."""
    if (work / "fsdp" / ".metadata").exists() and (work / "fsdp" / "__0_0.distcp").exists():
        merge_fsdp_weights(work / "fsdp", work / "out")
        assert same_bits(load_weights(work / "out"), STATE)


def test_a_converted_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    old = Run().having(models=[Tied()], custom_objects=[Counter(3)]).save(tmp_path / "old")
    planned = plan(old)
    number, there = 0, 0
    while True:
        number += 1
        work = tmp_path / str(number)
        again = killed(partial(convert, planned, work / "new", 40), work, number)
        if (work / "new").exists():
            there += 1
            assert describe(work / "new").health == "complete"
            assert verify(work / "new").problems == ()
        if not again:
            break
        if not (work / "new").exists():
            convert(planned, work / "new")
            assert sorted(path.name for path in work.iterdir()) == ["new"]
    assert number > 10
    assert there >= 1
    assert layout.MANIFEST_NAME in os.listdir(work / "new")
