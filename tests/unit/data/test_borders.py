"""Which places in loops are those at which a run may be saved: each script below stops at every one it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.runtime import preemption
from accelerate.utils import ProjectConfiguration


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0))


class Run:
    """A run over three batches that notes each place it comes to, as what the loops have given until there."""

    def __init__(self, folder: Path, *, trains: bool = True, dispatch: bool | None = None) -> None:
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=("SIGUSR1",))
        data = DataLoaderConfiguration(dispatch_batches=dispatch)
        self.accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=data)
        self.model = torch.nn.Linear(1, 1)
        self.given: list[str] = []
        self.places: list[str] = []
        if trains:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        assert preemption.current is not None
        reach = preemption.current.reach

        def noted() -> None:
            self.places.append(" ".join(self.given))
            reach()

        preemption.current.reach = noted

    def loader(self, dataset=None, batch_size: int = 2):
        return self.accelerator.prepare(DataLoader(dataset or torch.arange(6.0), batch_size=batch_size))

    def train(self, *names: str) -> None:
        self.given += names
        self.accelerator.backward(self.model(torch.ones(1, 1)).sum())
        self.optimizer.step()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_training_loop_stops_between_batches_and_before_the_first_but_not_after_the_last(run):
    loader = run.loader()
    for epoch in "ab":
        for step, _ in enumerate(loader):
            run.train(f"{epoch}{step}")
    # Before its first batch nobody knows that the loop trains; after the last one the end of the epoch is to come.
    assert run.places == ["a0", "a0 a1", "a0 a1 a2", "a0 a1 a2 b0", "a0 a1 a2 b0 b1"]


@pytest.mark.parametrize("dispatch", [None, False])
def test_streams_stop_in_the_same_places(tmp_path, dispatch):
    run = Run(tmp_path, dispatch=dispatch)
    for step, _ in enumerate(run.loader(Stream())):
        run.train(str(step))
    assert run.places == ["0", "0 1"]


def test_a_loop_of_one_batch_stops_before_it(run):
    loader = run.loader(batch_size=6)
    for epoch in range(3):
        for _ in loader:
            run.train(str(epoch))
    assert run.places == ["0", "0 1"]


def test_an_evaluation_is_not_stopped(run):
    training, evaluation = run.loader(), run.loader()
    for step, _ in enumerate(training):
        run.train(str(step))
        for _ in evaluation:
            run.given.append("e")
    for _ in evaluation:
        run.given.append("f")
    assert run.places == ["0 e e e", "0 e e e 1 e e e"]


def test_loops_side_by_side_stop_when_none_has_given_the_next_batch(run):
    for step, _ in enumerate(zip(run.loader(), run.loader(), strict=True)):
        run.train(str(step))
    assert run.places == ["0", "0 1"]


def test_an_iterator_beside_the_loop_is_no_place_to_stop(run):
    beside = iter(run.loader())
    for step, _ in enumerate(run.loader()):
        next(beside)
        run.train(str(step))
    assert run.places == ["0", "0 1"]


def test_a_loop_inside_another_one_is_not_stopped(run):
    inner = run.loader()
    for outer, _ in enumerate(run.loader()):
        for step, _ in enumerate(inner):
            run.train(f"{outer}{step}")
    assert run.places == ["00 01 02", "00 01 02 10 11 12"]


def test_without_optimizers_each_loop_that_is_alone_is_stopped(tmp_path):
    run = Run(tmp_path, trains=False)
    for step, _ in enumerate(run.loader()):
        run.given.append(str(step))
    for _ in zip(run.loader(), run.loader(), strict=True):
        run.given.append("z")
    assert run.places == ["0", "0 1"]


def test_an_epoch_that_is_broken_off_is_begun_anew_at_its_border(run, monkeypatch):
    loader = run.loader()
    for step, _ in enumerate(loader):
        run.train(str(step))
        if step == 1:
            break
    saved = []
    monkeypatch.setattr(preemption.current, "reach", lambda: saved.append(loader.position))
    for _ in loader:
        break
    assert [(place.epoch, place.step) for place in saved] == [(0, 0)]


def test_check_preemption_is_a_place_of_its_own(run):
    run.accelerator.check_preemption()
    assert run.places == [""]
    run.accelerator.end_training()
    run.accelerator.check_preemption()
    assert run.places == [""]
