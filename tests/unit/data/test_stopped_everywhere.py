"""Scripts that are stopped at each place they come to, one after the other, train on the same samples as one that is not."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate import Accelerator
from accelerate.runtime import preemption
from accelerate.session.state import AcceleratorState
from accelerate.utils import Preempted, ProjectConfiguration


class Run:
    """One process of a run, which a signal reaches just before place number `stop`, from 0."""

    def __init__(self, folder: Path, sizes: tuple[int, ...], counts: int, stop: int | None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",))
        self.accelerator = Accelerator(cpu=True, project_config=project)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loaders = [DataLoader(100 * number + torch.arange(float(size))) for number, size in enumerate(sizes)]
        self.model, self.optimizer, *self.loaders = self.accelerator.prepare(model, optimizer, *loaders)
        self.counts = self.loaders[counts]
        """The loader that each epoch reads to its end."""
        self.trained: list[tuple[int, ...]] = []
        assert preemption.current is not None
        self.watch, self.reach = preemption.current, preemption.current.reach
        self.stop, self.places = stop, 0
        preemption.current.reach = self.noted
        self.accelerator.resume("auto")

    def noted(self) -> None:
        if self.places == self.stop:
            signal.raise_signal(signal.SIGTERM)
        self.places += 1
        self.reach()

    def train(self, *batches: torch.Tensor) -> None:
        self.accelerator.backward(self.model(torch.ones(1, 1)).sum())
        self.optimizer.step()
        self.trained.append((self.counts.iteration, *(int(batch) for batch in batches)))

    @property
    def epochs(self) -> range:
        return range(self.counts.position.epoch, 3)


def side_by_side(run: Run) -> None:
    for _ in run.epochs:
        for batches in zip(*run.loaders, strict=False):
            run.train(*batches)


def one_alone_and_two_side_by_side(run: Run) -> None:
    alone, *beside = run.loaders
    for _ in run.epochs:
        for batch in alone:
            run.train(batch)
            for _ in zip(*beside, strict=False):
                pass


def asks_before_training(run: Run) -> None:
    for _ in run.epochs:
        for batch in run.loaders[0]:
            run.accelerator.check_preemption()
            run.train(batch)


def asks_after_training(run: Run) -> None:
    for _ in run.epochs:
        for batches in zip(*run.loaders, strict=False):
            run.train(*batches)
            run.accelerator.check_preemption()


def asks_in_evaluations_before_and_after_training(run: Run) -> None:
    training, evaluation = run.loaders
    for _ in run.epochs:
        for batch in training:
            for _ in evaluation:
                run.accelerator.check_preemption()
            run.train(batch)
            for _ in evaluation:
                run.accelerator.check_preemption()


# The sizes of the loaders, and which of them is read to its end in each epoch.
SCRIPTS: dict[str, tuple[Callable[[Run], None], tuple[int, ...], int]] = {
    "one": (side_by_side, (3,), 0),
    "the first is shorter": (side_by_side, (3, 5), 0),
    "the first is longer": (side_by_side, (5, 3), 1),
    "the last of three is shortest": (side_by_side, (4, 5, 3), 2),
    "the middle of three is shortest": (side_by_side, (4, 2, 5), 1),
    "an evaluation inside": (one_alone_and_two_side_by_side, (3, 2, 4), 0),
    "asks before training": (asks_before_training, (3,), 0),
    "asks after training": (asks_after_training, (3, 3), 0),
    "asks in evaluations": (asks_in_evaluations_before_and_after_training, (2, 2), 0),
}


def outcome(folder: Path, name: str, stop: int | None) -> tuple[Run, bool]:
    loops, sizes, counts = SCRIPTS[name]
    run = Run(folder, sizes, counts, stop)
    try:
        loops(run)
    except Preempted:
        return run, True
    return run, False


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_samples(tmp_path, name):
    whole, _ = outcome(tmp_path / "whole", name, None)
    assert whole.places > 2
    for stop in range(whole.places):
        folder = tmp_path / str(stop)
        first, stopped = outcome(folder, name, stop)
        assert stopped
        # The resumed run is stopped again, at the first place that it comes to, if there is one.
        second, stopped = outcome(folder, name, 0)
        third, _ = outcome(folder, name, None) if stopped else (None, False)
        trained = first.trained + second.trained + (third.trained if third else [])
        assert trained == whole.trained, f"stopped at place {stop}"
