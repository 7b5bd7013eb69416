"""The scheduler that `prepare` returns: rates and counts as the peer's, on one and two processes."""

from __future__ import annotations

import pickle
import re
import warnings

import pytest
import torch
import torch._dynamo  # wrapping loads it; here once, for all ranks that are forked

from accelerate.runtime.accumulation import GradientState
from accelerate.scheduler import AcceleratedScheduler
from tests.support.observed import OBSERVED, on
from tests.support.ranks import run_on_ranks

RATES = OBSERVED["learning rates"]
COUNTS = OBSERVED["accumulation"]


def start(steps=1, *, split=False, with_optimizer=True, plugin=None):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(split_batches=split),
        gradient_accumulation_plugin=plugin,
        gradient_accumulation_steps=1 if plugin else steps,
        step_scheduler_with_optimizer=with_optimizer,
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return accelerator, model, optimizer


def step(accelerator, model, optimizer, scheduler, batch):
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def rates_of(row: str) -> list[float]:
    from accelerate.utils import GradientAccumulationPlugin

    split, with_optimizer, adjust, steps = (int(value) for value in re.findall(r"=(\d)", row))
    warnings.filterwarnings("ignore", r"GradientAccumulationPlugin\(adjust_scheduler=False\) changes nothing")
    plugin = GradientAccumulationPlugin(num_steps=steps, adjust_scheduler=bool(adjust))
    # Stepping regardless of the optimizer is what some rows ask for, and torch warns of it.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    accelerator, model, optimizer = start(split=bool(split), with_optimizer=bool(with_optimizer), plugin=plugin)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / 100)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    found = []
    for _ in range(6):
        step(accelerator, model, optimizer, scheduler, torch.ones(1, 1))
        found.append(round(scheduler.get_last_lr()[0], 4))
    return found


def counts_of(row: str) -> dict[str, list]:
    from accelerate.utils import GradientAccumulationPlugin

    count, steps = (int(value) for value in re.findall(r"=(\d+)", row)[:2])
    warnings.filterwarnings("ignore", r"GradientAccumulationPlugin\(adjust_scheduler=False\) changes nothing")
    plugin = GradientAccumulationPlugin(
        num_steps=steps,
        sync_with_dataloader="sync_with_dataloader=False" not in row,
        sync_each_batch="sync_each_batch=True" in row,
        adjust_scheduler="adjust_scheduler=False" not in row,
    )
    accelerator, model, optimizer = start(plugin=plugin)
    loader = torch.utils.data.DataLoader(torch.ones(count * accelerator.num_processes, 1), batch_size=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if "not prepared" not in row:
        loader = accelerator.prepare(loader)
    found = {"sync": [], "sched_last_epoch": []}
    for _ in range(2):
        for batch in loader:
            step(accelerator, model, optimizer, scheduler, batch)
            found["sync"].append(int(accelerator.sync_gradients))
            found["sched_last_epoch"].append(scheduler.scheduler.last_epoch)
        for values in found.values():
            values.append("|")
    return found


def one_cycle() -> list[float]:
    accelerator, model, optimizer = start()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    # Stepping on after its end is what this row is about, and several processes warn of it.
    warnings.filterwarnings("ignore", "The schedule OneCycleLR has 4 steps")
    found = []
    for _ in range(6):
        step(accelerator, model, optimizer, scheduler, torch.ones(1, 1))
        found.append(round(scheduler.get_last_lr()[0], 4))
    return found


def everything() -> dict:
    return {
        "rates": {row: rates_of(row) for row in RATES},
        "counts": {row: counts_of(row) for row in COUNTS},
        "one cycle": one_cycle(),
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_rates_and_counts_are_those_of_the_peer(processes):
    for found in run_on_ranks(everything, processes):
        for row, rates in found["rates"].items():
            assert rates == on(processes, RATES[row]), row
        for row, counts in found["counts"].items():
            assert counts == on(processes, COUNTS[row]), row
        assert found["one cycle"][:3] == [abs(value) for value in on(processes, OBSERVED["onecycle total_steps=4"])[:3]]


# The wrapper alone --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return inner, AcceleratedScheduler(inner, optimizer)


def test_it_is_no_scheduler_and_hands_on_everything(pair):
    inner, outer = pair
    assert not isinstance(outer, torch.optim.lr_scheduler.LRScheduler)
    assert outer.scheduler is inner
    assert outer.optimizers == [inner.optimizer]
    assert (outer.step_with_optimizer, outer.split_batches) == (True, False)
    assert outer.get_last_lr() == [1.0]
    assert outer.gamma == 0.5
    assert outer.state_dict() == inner.state_dict()
    with pytest.raises(AttributeError, match="nothing"):
        outer.nothing  # noqa: B018


def test_its_state_is_loaded_into_the_inner_one(pair):
    inner, outer = pair
    outer.load_state_dict({**inner.state_dict(), "last_epoch": 7})
    assert inner.last_epoch == 7


def test_it_waits_while_gradients_accumulate(pair):
    inner, outer = pair
    GradientState()._set_sync_gradients(False)
    outer.step()
    assert inner.last_epoch == 0
    inner.optimizer.step()
    GradientState()._set_sync_gradients(True)
    outer.step()
    assert inner.last_epoch == 1


def test_a_scheduler_that_takes_a_metric_gets_it():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    outer = AcceleratedScheduler(inner, [optimizer])
    outer.step(1.0)
    outer.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_prepared_before_its_optimizer_it_waits_for_its_steps_all_the_same():
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    models = [torch.nn.Linear(1, 1) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizers[1], 1, gamma=0.5))
    models, optimizers = accelerator.prepare(*models), accelerator.prepare(*optimizers)
    rates = []
    for overflows in (False, True, False):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(torch.ones(1, 1)).sum()
            accelerator.backward(loss * float("inf") if overflows and model is models[1] else loss)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.25]
    assert scheduler.optimizers == [optimizers[1]]


def test_it_can_be_pickled(pair):
    _, outer = pair
    assert pickle.loads(pickle.dumps(outer)).get_last_lr() == [1.0]
