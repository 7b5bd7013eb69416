"""Runs that are asked to stop: all ranks save at the same place, and continue as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # the first step of an optimizer would load it, in each process
from torch.utils.data import DataLoader

from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.collectives.crossing import Crossing
from accelerate.core.errors import CheckpointError
from accelerate.core.leaving import NOTE_VARIABLE, Preempted
from accelerate.utils import ProjectConfiguration
from tests.fault.preempted import train
from tests.support.ranks import run_on_ranks


def run(folder: str, options: dict[str, Any]) -> Any:
    try:
        return train(Path(folder), **options)
    except Preempted as left:
        return left.code, left.folder.name


def run_all(world_size: int, folder: Path, **options: Any) -> Any:
    """Run on all ranks, which end alike."""
    found = run_on_ranks(run, world_size, str(folder), options)
    assert found == [found[0]] * world_size
    return found[0]


@cache
def whole(world_size: int, folder: Path) -> Any:
    return run_all(world_size, folder, fixed_buckets=world_size > 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def stopped_and_continued(tmp_path: Path, folders: Path, first: int, then: int, **options: Any) -> None:
    fixed = {"fixed_buckets": then > 2}  # see docs/explain/checkpoints.md, "To the last bit"
    status, checkpoint = run_all(first, tmp_path, **fixed, **options)
    assert status == 75
    assert checkpoint == max(path.name for path in (tmp_path / "checkpoints").iterdir())
    count, digest, weights = run_all(then, tmp_path, resume="auto", parts=options.get("parts", 1), **fixed)
    expected = whole(1, folders / "1")
    assert (count, digest) == expected[:2]
    if first == then:
        assert weights == whole(then, folders / str(then))[2]


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        (1, 2, {"place": "step 1 2", "name": "SIGUSR1"}),
        (2, 2, {"place": "step 1 2", "to": "1"}),
        (2, 1, {"place": "evaluation 0 2"}),
        (3, 2, {"place": "step 1 5", "to": "all"}),
    ],
    ids=["one", "one-of-two", "in-an-evaluation", "all-of-three"],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_samples(tmp_path, folders, first, then, options):
    stopped_and_continued(tmp_path, folders, first, then, **options)


@pytest.mark.full
@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"place": "before"},
        {"place": "step 0 0", "name": "SIGUSR1"},
        {"place": "step 1 4", "to": "all"},
        {"place": "step 1 5"},
        {"place": "evaluation 1 0", "to": "all"},
        {"place": "evaluation 0 5"},
        {"place": "saving", "save_each": True},
    ],
    ids=lambda options: options["place"].replace(" ", "-"),
)
def test_wherever_it_is_stopped(tmp_path, folders, first, then, options):
    stopped_and_continued(tmp_path, folders, first, then, **{"to": str(first - 1), **options})


def test_a_signal_while_it_saves_lets_the_save_be_finished(tmp_path, folders):
    status, checkpoint = run_all(2, tmp_path, place="saving", to="1", save_each=True)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert (status, checkpoint) == (75, saved[-1])
    assert saved[0] == "checkpoint_0"
    assert all((tmp_path / "checkpoints" / name / "accelerate_manifest.json").exists() for name in saved)
    assert run_all(2, tmp_path, resume="auto") == whole(2, folders / "2")


def test_it_may_be_stopped_inside_a_window_of_accumulation(tmp_path, folders):
    # 2 processes x 3 batches of 2: the window that is open is saved, and continued.
    expected = run_all(2, folders / "parts", parts=6)
    status, _ = run_all(2, tmp_path, place="step 1 3", to="1", parts=6)
    assert status == 75
    assert next(tmp_path.glob("checkpoints/*/accumulation_rank1.json"), None)
    assert run_all(2, tmp_path, resume="auto", parts=6) == expected


def test_a_run_that_ends_before_the_next_place_is_done(tmp_path, folders):
    assert run_all(2, tmp_path, place="evaluation 2 1", to="1") == whole(2, folders / "2")
    assert not (tmp_path / "checkpoints").exists()


def quiet(folder: str) -> Any:
    for name in ("stand", "move", "call", "speak_for"):
        setattr(Crossing, name, None)
    return train(Path(folder))


def test_without_a_signal_the_ranks_exchange_nothing(tmp_path, folders):
    assert run_on_ranks(quiet, 2, str(tmp_path)) == [whole(2, folders / "2")] * 2


# Ranks that do not do the same -----------------------------------------------------------------------------------


def start(
    folder: str, *, even_batches: bool = True, seconds: float | None = None, trains: bool = True
) -> tuple[Accelerator, Any, Any]:
    limit = [] if seconds is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))]
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(folder, automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",)),
        dataloader_config=DataLoaderConfiguration(even_batches=even_batches),
        kwargs_handlers=limit,
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if trains:
        model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def train_unevenly(folder: str, to: int, at: tuple[int, int]) -> Any:
    accelerator, model, optimizer = start(folder, even_batches=False)
    loader = accelerator.prepare(DataLoader(torch.randn(10, 1), batch_size=2))  # 3 batches on rank 0, 2 on rank 1
    epoch = -1
    try:
        for epoch in range(3):
            with accelerator.join_uneven_inputs([model]):
                for step, batch in enumerate(loader):
                    if (accelerator.process_index, epoch, step) == (to, *at):
                        os.kill(os.getpid(), signal.SIGTERM)
                    accelerator.backward(model(batch).sum())
                    optimizer.step()
                    optimizer.zero_grad()
    except Preempted:
        return epoch, loader.position.epoch
    return None


@pytest.mark.parametrize(
    ("to", "at", "where"),
    # Where rank 1 has no further batch to come to, both go on to the next epoch; rank 0 may be a step ahead.
    [
        (1, (0, 0), [(0, 0), (1, 1)]),
        (0, (0, 1), [(1, 1)]),
        (1, (0, 1), [(1, 1)]),
        (0, (1, 2), [(2, 2)]),
        (1, (2, 1), [None]),
    ],
)
def test_ranks_that_run_out_of_batches_at_different_times_stop_in_the_same_epoch(tmp_path, to, at, where):
    first, second = run_on_ranks(train_unevenly, 2, str(tmp_path), to, at)
    assert first == second
    assert first in where


def evaluate_on_the_main_process_only(folder: str, to: int) -> Any:
    accelerator, model, optimizer = start(folder)
    loader = accelerator.prepare(DataLoader(torch.randn(8, 1), batch_size=1))
    plain = DataLoader(torch.randn(6, 1))
    done = 0
    try:
        for step, batch in enumerate(loader):
            accelerator.backward(model(batch).sum())
            optimizer.step()
            if step == 1:
                if accelerator.process_index == to:
                    os.kill(os.getpid(), signal.SIGTERM)
                for _ in plain if accelerator.is_main_process else ():
                    model.module(torch.ones(1, 1))
                accelerator.wait_for_everyone()
            done = step
    except Preempted:
        return done
    return None


@pytest.mark.parametrize("to", [0, 1])
def test_an_evaluation_on_the_main_process_is_waited_for(tmp_path, to):
    first, second = run_on_ranks(evaluate_on_the_main_process_only, 2, str(tmp_path), to)
    assert first == second
    assert first in (1, 2)  # the other rank may have begun the next step already


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_elsewhere(folder: str, trains: bool) -> Any:
    """Rank 1 leaves its loop and comes to no further place until rank 0 has given up."""
    accelerator, _, optimizer = start(folder, seconds=1, trains=trains)
    loader = accelerator.prepare(DataLoader(torch.randn(8, 1), batch_size=1))
    there, given_up = Path(folder) / "there", Path(folder) / "given up"
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, _ in enumerate(loader):
            if trains:
                optimizer.step()
            if step == 1 and accelerator.process_index == 0:
                wait_for(there)
                os.kill(os.getpid(), signal.SIGTERM)
            if step == 1 and accelerator.process_index == 1:
                there.touch()
                wait_for(given_up)
        told = [str(item.message) for item in caught if item.category is RuntimeWarning]
    if accelerator.process_index == 0:
        given_up.touch()
    return told, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("trains", [True, False])
def test_a_rank_that_does_not_come_is_named_once_and_the_run_goes_on(tmp_path, trains):
    results = run_on_ranks(wait_elsewhere, 2, str(tmp_path), trains)
    (told,), restored = results[0]
    assert restored
    assert re.match(
        r"rank 0 received SIGTERM, and the ranks did not come to the same place to save the run \(rank 0 waited for 1 s\)\. "
        r"rank 0 waits at place 2 between the batches of loop 1; rank 1 comes to place 2 between the batches of loop 1 "
        r"next\.",
        told,
    )
    assert not (tmp_path / "checkpoints").exists()
    assert results[1][1], "rank 1 heard of it at its next place"


def fail_to_save(folder: str) -> Any:
    accelerator, _, optimizer = start(folder)

    def refuse(*_: Any) -> None:
        if accelerator.process_index == 1:
            raise OSError("no space left")

    accelerator.register_save_state_pre_hook(refuse)
    loader = accelerator.prepare(DataLoader(torch.randn(8, 1), batch_size=1))
    told, batches = [], iter(loader)
    for step in range(4):
        try:
            next(batches)
        except CheckpointError as error:
            told.append((step, str(error)))
            batches = iter(loader)
            next(batches)
        optimizer.step()
        if step == 1 and accelerator.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        accelerator.wait_for_everyone()
    return told, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_save_that_fails_is_told_on_all_ranks_and_further_signals_have_their_usual_effect(tmp_path):
    for told, restored in run_on_ranks(fail_to_save, 2, str(tmp_path)):
        ((step, text),) = told
        assert step in (2, 3)
        assert "no space left" in text
        assert restored
    assert not list((tmp_path / "checkpoints").glob("checkpoint_*"))


def save_for_a_launcher(folder: str, note: str) -> Any:
    os.environ[NOTE_VARIABLE] = note
    return run(folder, {"place": "step 0 0"})


def test_only_a_launcher_of_this_machine_gets_a_note_and_status_0(tmp_path):
    here, elsewhere = str(tmp_path / "note"), str(tmp_path / "of-another-machine" / "note")

    ended = [
        run_on_ranks(save_for_a_launcher, 1, str(tmp_path / str(n)), note) for n, note in enumerate((here, elsewhere))
    ]
    assert [code for ((code, _),) in ended] == [0, 75]
    assert "the run saved itself" in Path(here).read_text()


def begin_anew(folder: str) -> bool:
    """Begin as after a restart: the launcher finds what an earlier attempt has noted, if nobody removes it."""
    note = Path(folder) / os.environ["RANK"]
    note.write_text("rank 0 received SIGTERM: the run saved itself")
    os.environ[NOTE_VARIABLE] = str(note)
    start(folder)
    return note.exists()


def test_the_note_of_an_attempt_that_was_restarted_is_removed_once_on_each_node(tmp_path):
    assert run_on_ranks(begin_anew, 2, str(tmp_path)) == [False, True]
