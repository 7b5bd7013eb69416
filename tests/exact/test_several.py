"""Several loaders in one run, and loops that are left early: each loader goes on at its own place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from tests.exact import training
from tests.exact.cells import Cell
from tests.exact.sources import FEATURES
from tests.exact.training import EPOCHS, OTHER_SEED, SEED
from tests.support.ranks import run_on_ranks

Log = list[Any]


class Script:
    """A run with several loaders, which notes what it sees and saves under the number of its notes."""

    def __init__(self, cells: list[Cell], folder: Path | None, resume: Path | None) -> None:
        seedable = any(cell.order == "seedable" for cell in cells)
        config = DataLoaderConfiguration(dispatch_batches=cells[0].dispatched, use_seedable_sampler=seedable)
        self.accelerator = Accelerator(dataloader_config=config)
        seed = SEED if resume is None else OTHER_SEED
        set_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.4), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loaders = [training.make_loader(cell, seed) for cell in cells]
        self.model, self.optimizer, *self.loaders = self.accelerator.prepare(model, optimizer, *loaders)
        self.folder, self.log = folder, []
        self.before = 0 if resume is None else training.steps_in(resume.name)
        if resume is not None:
            self.accelerator.load_state(resume)

    def learn(self, kind: str, epoch: int, *batches: Any) -> None:
        loss = torch.stack([self.model(batch[1]).square().mean() for batch in batches]).sum()
        if kind == "train":
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        indices = [batch[0].tolist() for batch in batches]
        self.log.append((kind, epoch, indices, loss.item(), [training.place(loader) for loader in self.loaders]))

    def save(self, suffix: str = "") -> None:
        if self.folder is not None:
            self.accelerator.save_state(self.folder / f"{self.before + len(self.log)}{suffix}")


def check(script: Any, folder: Path, ranks: int, expected_saves: int, every: int = 1) -> list[Log]:
    """Run the script whole, then from its saves; each log has to be the end of the whole one. Return the whole ones."""
    whole = run_on_ranks(script, ranks, folder, None)
    assert whole == run_on_ranks(script, ranks, None, None), "saving changed the run"
    names = training.names(folder)
    assert len(names) == expected_saves
    for name in names[::every]:
        resumed = run_on_ranks(script, ranks, None, folder / name)
        for log, reference in zip(resumed, whole, strict=True):
            assert log == reference[training.steps_in(name) :], name
    return whole


# Training and evaluation ------------------------------------------------------------------------------------------


def train_and_evaluate(folder: Path | None, resume: Path | None) -> Log:
    script = Script([Cell("map", "plain"), Cell("map", "plain", size=7)], folder, resume)
    train, evaluation = script.loaders

    def evaluate() -> None:
        for batch in evaluation:
            script.learn("evaluate", evaluation.iteration, batch)
            script.save("-evaluating")

    if evaluation.position.step:
        evaluate()
    for epoch in range(train.position.epoch, EPOCHS):
        for batch in train:
            script.learn("train", epoch, batch)
            if train.position.step % 2 == 0:
                evaluate()
            script.save()
    return script.log


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize(("ranks", "saves"), [(1, 42), (2, 21)])
def test_evaluation_in_the_middle_of_training(ranks, saves, every, tmp_path):
    whole = check(train_and_evaluate, tmp_path, ranks, saves, every)
    assert [kind for kind, *_ in whole[0]].count("train") == saves - [kind for kind, *_ in whole[0]].count("evaluate")


# Two at once ------------------------------------------------------------------------------------------------------


def train_on_two(folder: Path | None, resume: Path | None) -> Log:
    script = Script([Cell("map", "seedable"), Cell("map", "seedable")], folder, resume)
    first, second = script.loaders
    for epoch in range(first.position.epoch, EPOCHS):
        for batches in zip(first, second, strict=False):
            script.learn("train", epoch, *batches)
            script.save()
        script.save("-after-epoch")
    return script.log


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize(("ranks", "saves"), [(1, 18), (2, 12)])
def test_two_loaders_of_the_same_length(ranks, saves, every, tmp_path):
    (log, *_) = check(train_on_two, tmp_path, ranks, saves, every)
    for number in (0, 1):
        orders = [[indices[number] for _, epoch, indices, *_ in log if epoch == wanted] for wanted in range(EPOCHS)]
        assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def train_on_unequal_two(folder: Path | None, resume: Path | None) -> Log:
    script = Script([Cell("map", "plain"), Cell("map", "plain", size=20)], folder, resume)
    first, second = script.loaders
    for epoch in range(first.position.epoch, EPOCHS):
        for batches in zip(first, second, strict=False):
            script.learn("train", epoch, *batches)
            if first.position.step:  # after the last batch of the first, the second one's pass is about to be left
                script.save()
    return script.log


def test_two_loaders_of_different_lengths(tmp_path):
    check(train_on_unequal_two, tmp_path, 1, 12, every=3)


# Loops that are left ----------------------------------------------------------------------------------------------


def leave_and_save(cell: Cell, folder: Path, step: int) -> Log:
    script = Script([cell], folder, None)
    (loader,) = script.loaders
    for batch in loader:
        script.learn("train", 0, batch)
        if len(script.log) == step:
            break
    script.save()
    return script.log


def train_plainly(cell: Cell, resume: Path | None) -> Log:
    script = Script([cell], None, resume)
    (loader,) = script.loaders
    for epoch in range(loader.position.epoch, EPOCHS):
        for batch in loader:
            script.learn("train", epoch, batch)
    return script.log


@pytest.mark.parametrize(
    "cell",
    [
        Cell("map", "plain"),
        Cell("map", "numpy", "2", 2),
        Cell("dispatched-map", "plain", ranks=2),
        Cell("iterable", "epoch", ranks=2),
        Cell("dispatched-iterable", "buffer", ranks=2),
    ],
    ids=str,
)
def test_a_loop_that_was_left_goes_on_where_it_was(cell, tmp_path):
    whole = run_on_ranks(train_plainly, cell.ranks, cell, None)
    run_on_ranks(leave_and_save, cell.ranks, cell, tmp_path, 2)
    resumed = run_on_ranks(train_plainly, cell.ranks, cell, tmp_path / "2")
    assert [log[2:] for log in whole] == resumed
