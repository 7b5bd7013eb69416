"""The runs: training from the start, saving at every step, and resuming. Each function here runs on every rank."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from tests.exact.cells import Cell
from tests.exact.sources import FEATURES, Numbers, StatefulStream, Stream, sampling

EPOCHS = 3
ENDLESS_STEPS = 12
SEED, OTHER_SEED = 1234, 987

# The first optimizer of a process loads torch's compiler, which takes a second; forked ranks have it then.
torch.optim.SGD([torch.zeros(1)], lr=0.1)


class Step(NamedTuple):
    """What a rank saw in one step."""

    epoch: int
    indices: tuple[int, ...]
    real: int
    """How many of the indices, from the front, are not padding."""
    loss: float


@dataclass
class Trace:
    """A run as one rank saw it."""

    steps: list[Step] = field(default_factory=list)
    started_at: tuple[int, int, int | None] = (0, 0, 0)
    """What `loader.position` said before the loops began."""
    ended_at: tuple[int, int, int | None] = (0, 0, 0)
    weights: list[torch.Tensor] = field(default_factory=list)
    samples_read: int = 0
    """How many samples a dataset with a state of its own gave in this process."""


@dataclass
class Run:
    """The prepared objects of a run."""

    accelerator: Accelerator
    loader: Any
    model: Any = None
    optimizer: Any = None

    def close(self) -> None:
        """End worker processes that stay: a forked rank leaves without finalising."""
        self.loader.base_dataloader._iterator = None


def make_loader(cell: Cell, seed: int) -> DataLoader[Any]:
    """Make the loader of a cell as a user would, before `prepare`."""
    arguments: dict[str, Any] = {"num_workers": cell.num_workers, "persistent_workers": cell.persistent}
    if cell.iterable:
        kind = StatefulStream if cell.keeps_state else Stream
        return DataLoader(kind(cell.size, cell.order, cell.augmented), batch_size=cell.batch_size, **arguments)
    arguments |= sampling(cell.order, cell.size, cell.batch_size, seed)
    return DataLoader(Numbers(cell.size, cell.augmented), **arguments)


def build(cell: Cell, seed: int, *, trains: bool = True, **options: Any) -> Run:
    """Begin a run: an `Accelerator`, and everything prepared."""
    gc.freeze()  # collecting would look at, and so copy, all that a forked process has from its parent
    config = DataLoaderConfiguration(
        dispatch_batches=cell.dispatched,
        use_seedable_sampler=cell.order == "seedable",
        use_stateful_dataloader=cell.loader == "stateful",
    )
    accelerator = Accelerator(dataloader_config=config, **options)
    set_seed(seed)
    loader = make_loader(cell, seed)
    if not trains:
        return Run(accelerator, accelerator.prepare(loader))
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return Run(accelerator, loader, model, optimizer)


def learn(run: Run, batch: Any) -> float:
    """Take one step of training; return the loss."""
    if run.model is None:
        return 0.0
    with run.accelerator.accumulate(run.model):
        loss = (run.model(batch[1]) - batch[1].mean()).square().mean()
        run.accelerator.backward(loss)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss.item()


def seen(epoch: int, loader: Any, batch: Any, loss: float) -> Step:
    """Note one step."""
    indices = tuple(batch[0].tolist())
    padding = loader.padding
    return Step(epoch, indices, len(indices) if padding is None else padding.real[loader.shard_index], loss)


def place(loader: Any) -> tuple[int, int, int | None]:
    """Return the position as plain numbers."""
    position = loader.position
    return position.epoch, position.step, position.samples


def loop(
    run: Run,
    cell: Cell,
    *,
    first: int = 0,
    steps_per_epoch: int | None = None,
    save: Callable[[str], Any] | None = None,
) -> Trace:
    """Train to the end, in the habit of the cell.

    Args:
        run: A run that has just begun, or loaded a checkpoint.
        cell: Whose habit.
        first: How many steps were done before, as scripts that count know it.
        steps_per_epoch: What such scripts divide by; `None` in a run from the start.
        save: Called with a name after each step inside the loop, and after each epoch.
    """
    trace = Trace(started_at=place(run.loader))
    done = first
    starting_epoch, resume_step = divmod(first, steps_per_epoch) if steps_per_epoch else (0, None)
    if cell.habit in ("load", "set-epoch"):
        starting_epoch, resume_step = run.loader.position.epoch, None
    for epoch in range(starting_epoch, 1 if cell.endless else EPOCHS):
        batches = run.loader
        if cell.habit in ("recipe", "set-epoch"):
            run.loader.set_epoch(epoch)
        if epoch == starting_epoch and resume_step is not None:
            batches = run.accelerator.skip_first_batches(run.loader, resume_step)
        for batch in batches:
            done += 1
            trace.steps.append(seen(epoch, batches, batch, learn(run, batch)))
            if save is not None:
                save(f"{done}")
            if cell.endless and done >= ENDLESS_STEPS:
                break
        if save is not None and not cell.endless:
            save(f"{done}-after-epoch")
    trace.ended_at, trace.samples_read = place(run.loader), StatefulStream.read
    if run.model is not None:
        trace.weights = [tensor.detach().clone() for tensor in run.accelerator.unwrap_model(run.model).parameters()]
    return trace


def uninterrupted(cell: Cell, folder: Path | None, trains: bool = True, options: dict[str, Any] | None = None) -> Trace:
    """Train from the start to the end; with a folder, save at every step."""
    run = build(cell, SEED, trains=trains, **options or {})
    save = None if folder is None else lambda name: run.accelerator.save_state(folder / name)
    trace = loop(run, cell, save=save)
    run.close()
    return trace


def resumed(
    cell: Cell,
    folder: Path,
    name: str,
    steps_per_epoch: int,
    save_again: Path | None = None,
    trains: bool = True,
    options: dict[str, Any] | None = None,
) -> Trace:
    """Begin anew with other seeds, load what was saved under `name`, and train to the end."""
    run = build(cell, OTHER_SEED, trains=trains, **options or {})
    torch.rand(5)  # nothing of what the new process drew may matter
    run.accelerator.load_state(folder / name)
    save = None if save_again is None else lambda name: run.accelerator.save_state(save_again / name)
    trace = loop(run, cell, first=steps_in(name), steps_per_epoch=steps_per_epoch, save=save)
    run.close()
    return trace


def steps_in(name: str) -> int:
    """Return how many steps were done when a checkpoint got this name."""
    return int(name.partition("-")[0])


def names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in `folder`, in the order in which they were saved."""
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (steps_in(name), len(name)))


def steps_of_first_epoch(trace: Trace) -> int:
    """Return how many steps an epoch has."""
    return sum(step.epoch == 0 for step in trace.steps)
