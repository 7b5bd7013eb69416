"""Training with `Accelerator` computes the same numbers, bit for bit, as the loop one would write by hand.

By hand means: a plain loop on one process, `DistributedDataParallel` with batches dealt out by hand on 2 and 4. Compared
are every loss, every learning rate and all final weights, with `torch.equal`.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers load it: here, and not in each of the processes
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradScalerKwargs

from ..support.ranks import run_on_ranks

BATCH = 8
BATCHES = 6  # for each rank and epoch: not a multiple of 4, so that the last window of accumulation is short
EPOCHS = 2
# So large that the first steps overflow, and growing so soon that later ones do again.
SCALER = {"init_scale": 2.0**20, "growth_interval": 2}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One combination of options."""

    optimizer: str
    steps: int
    precision: str
    clip: str

    def __str__(self) -> str:
        return f"{self.optimizer}-accumulate{self.steps}-{self.precision}-clip_{self.clip}"


CELLS = [
    Cell(*options)
    for options in itertools.product(("sgd", "adamw"), (1, 4), ("no", "bf16", "fp16"), ("none", "norm", "value"))
]


@dataclass
class Run:
    """What a loop computed."""

    losses: list[torch.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Network(nn.Module):
    """Has what may go wrong: a convolution under autocast, random numbers, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.normalization = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(4 * 6 * 6, 16)
        self.scores = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = self.normalization(self.convolution(images)).relu().flatten(1)
        return self.scores(self.hidden(self.dropout(seen)).relu())


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


def parts(cell: Cell, world_size: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, DataLoader[Any]]:
    """Return fresh objects, the same ones each time; the random generators stand at the same place afterwards."""
    torch.manual_seed(0)
    model = Network()
    if cell.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1 if cell.optimizer == "sgd" else 1e-2, total_steps=EPOCHS * BATCHES * world_size
    )
    images, labels = digits()
    count = BATCH * BATCHES * world_size
    loader = DataLoader(
        TensorDataset(images[:count], labels[:count]),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    torch.manual_seed(1)
    return model, optimizer, scheduler, loader


def by_hand(cell: Cell, rank: int, world_size: int) -> Run:
    """Train without the library."""
    model, optimizer, scheduler, loader = parts(cell, world_size)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    scaler = torch.amp.GradScaler("cpu", enabled=cell.precision == "fp16", **SCALER)
    run = Run()
    for _ in range(EPOCHS):
        own = [batch for number, batch in enumerate(loader) if number % world_size == rank]
        for number, (images, labels) in enumerate(own, start=1):
            sync = number % cell.steps == 0 or number == len(own)
            first = (number - 1) // cell.steps * cell.steps
            window = min(cell.steps, len(own) - first)  # the last one is short, and a mean over the batches it has
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not sync else nullcontext():
                with torch.autocast("cpu", HALF.get(cell.precision), enabled=cell.precision != "no"):
                    scores = wrapped(images)
                loss = nn.functional.cross_entropy(scores.float(), labels)
                run.losses.append(loss.detach().clone())
                scaler.scale(loss / window).backward()
            if sync:
                if cell.clip != "none":
                    scaler.unscale_(optimizer)
                if cell.clip == "norm":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                elif cell.clip == "value":
                    nn.utils.clip_grad_value_(model.parameters(), 0.01)
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                run.skipped.append(scaler.get_scale() < before)
                if not run.skipped[-1]:
                    for _ in range(world_size):
                        scheduler.step()
                optimizer.zero_grad()
            run.rates.append(optimizer.param_groups[0]["lr"])
    run.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return run


def with_accelerator(cell: Cell, world_size: int) -> Run:
    """Train with the library, as its documentation shows."""
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=cell.precision,
        gradient_accumulation_steps=cell.steps,
        kwargs_handlers=[GradScalerKwargs(**SCALER)] if cell.precision == "fp16" else None,
    )
    assert accelerator.num_processes == world_size
    model, optimizer, scheduler, loader = accelerator.prepare(*parts(cell, world_size))
    run = Run()
    for _ in range(EPOCHS):
        for images, labels in loader:
            # Both forms of the loop: with and without the region.
            with accelerator.accumulate(model) if cell.steps > 1 else nullcontext():
                loss = nn.functional.cross_entropy(model(images), labels)
                run.losses.append(loss.detach().clone())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if cell.clip == "norm":
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    elif cell.clip == "value":
                        accelerator.clip_grad_value_(model.parameters(), 0.01)
                optimizer.step()
                if accelerator.sync_gradients:
                    run.skipped.append(accelerator.optimizer_step_was_skipped)
                scheduler.step()
                optimizer.zero_grad()
            run.rates.append(optimizer.param_groups[0]["lr"])
    run.weights = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return run


def differences(ours: Run, reference: Run) -> list[str]:
    """Name what is not the same."""
    found = []
    if len(ours.losses) != len(reference.losses):
        found.append(f"{len(ours.losses)} losses, by hand {len(reference.losses)}")
    for number, (one, other) in enumerate(zip(ours.losses, reference.losses, strict=False)):
        if not torch.equal(one, other):
            found.append(f"loss {number}: {one.item()!r}, by hand {other.item()!r}")
    if ours.rates != reference.rates:
        found.append(f"rates {ours.rates}, by hand {reference.rates}")
    if ours.skipped != reference.skipped:
        found.append(f"skipped steps {ours.skipped}, by hand {reference.skipped}")
    if list(ours.weights) != list(reference.weights):
        found.append(f"weights named {list(ours.weights)}, by hand {list(reference.weights)}")
    for name, value in reference.weights.items():
        if name in ours.weights and not torch.equal(ours.weights[name], value):
            found.append(f"final {name}")
    return found


def compare(cell: Cell, rank: int, world_size: int) -> tuple[list[str], Run]:
    reference = by_hand(cell, rank, world_size)
    return differences(with_accelerator(cell, world_size), reference), reference


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_one_process_equals_a_plain_loop(cell: Cell) -> None:
    torch.set_num_threads(1)
    found, reference = compare(cell, 0, 1)
    assert not found
    check_exercises(cell, reference, [reference])


def compare_all(world_size: int) -> dict[Cell, tuple[list[str], Run]]:
    first = Accelerator(cpu=True)
    rank = first.process_index
    AcceleratorState._reset_state()
    assert dist.get_world_size() == world_size
    return {cell: compare(cell, rank, world_size) for cell in CELLS}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[Cell, tuple[list[str], Run]]]:
    """What all ranks found for all cells; processes are started once for each world size."""
    return run_on_ranks(compare_all, request.param, request.param, timeout=120)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_processes_equal_ddp_by_hand(cell: Cell, ranks: list[dict[Cell, tuple[list[str], Run]]]) -> None:
    assert not [(rank, line) for rank, result in enumerate(ranks) for line in result[cell][0]]
    references = [result[cell][1] for result in ranks]
    check_exercises(cell, references[0], references)
    weights = [reference.weights["scores.weight"] for reference in references]
    assert all(torch.equal(weights[0], other) for other in weights), "DDP keeps ranks the same; the reference is wrong"
    assert references[0].losses[0] != references[1].losses[0], "ranks must see different data to prove anything"


def check_exercises(cell: Cell, reference: Run, references: list[Run]) -> None:
    """Make sure that the reference itself trains, steps as often as meant and, in fp16, skips some steps."""
    windows = 2 if cell.steps == 4 else BATCHES  # 6 batches are windows of 4 and 2
    assert len(reference.skipped) == EPOCHS * windows
    assert len(reference.losses) == EPOCHS * BATCHES
    assert not all(reference.skipped)
    if cell.precision == "fp16" and cell.steps == 1:
        assert any(reference.skipped), "no step overflowed: choose a larger initial scale"
    if cell.precision != "fp16":
        assert not any(reference.skipped)
    assert len({round(rate, 12) for rate in reference.rates}) > 1
    assert all(bool(loss.isfinite()) for one in references for loss in one.losses)
