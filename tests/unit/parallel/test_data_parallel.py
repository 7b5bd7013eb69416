"""Training on two processes: gradients, and the mistakes that would make them wrong."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo  # wrapping loads it; here once, for all ranks that are forked

from accelerate.core.errors import SettingError
from tests.support.observed import OBSERVED
from tests.support.ranks import run_on_ranks


class Weight(torch.nn.Module):
    """The gradient of its loss is the sum of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (self.weight * x).sum()


def gradients_of(row: str) -> list[float]:
    """Accumulate without stepping over inputs 1, 2, 3, ..., of which rank r of P sees every P-th."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    steps = int(row.split("steps=")[1][0])
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_each_batch="sync_each" in row)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = accelerator.prepare(Weight())
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    count, found = accelerator.num_processes, []
    for batch in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.tensor([float(batch * count + accelerator.process_index + 1)])))
            found.append(model.parameters().__next__().grad.item())
            optimizer.step()
            optimizer.zero_grad()
    return found


def all_gradients() -> dict:
    return {row: gradients_of(row) for row in OBSERVED["gradients"]}


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_are_those_of_the_peer(processes):
    results = run_on_ranks(all_gradients, processes)
    for row, expected in OBSERVED["gradients"].items():
        assert [result[row] for result in results] == expected[f"P{processes}"], row


def regions() -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=2)
    own = torch.tensor([accelerator.process_index + 1.0])
    model = accelerator.prepare(Weight())
    weight = accelerator.unwrap_model(model).weight
    found = {}
    with accelerator.no_sync(model):
        accelerator.backward(model(own))
    found["local"] = weight.grad.item()
    weight.grad = None
    with accelerator.no_sync(model):
        loss = model(own)
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    found["triggered"] = weight.grad.item()
    found["after"] = model.require_backward_grad_sync
    weight.grad = None
    accelerator.backward(model(own))
    found["plain"] = weight.grad.item()
    first, second = accelerator.prepare(Weight(), Weight())
    with accelerator.accumulate(first, second):
        pass
    with accelerator._session.strategy.no_sync([first, second]):
        found["both"] = (first.require_backward_grad_sync, second.require_backward_grad_sync)
    return found


def test_regions_that_hold_back_or_force_the_reduction():
    for rank, found in enumerate(run_on_ranks(regions, 2)):
        assert found == {
            "local": (rank + 1) / 2, "triggered": 0.75, "after": True, "plain": 0.75, "both": (False, False),
        }  # fmt: skip


def kinds() -> dict:
    from torch.nn.parallel import DistributedDataParallel

    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=3, gradient_as_bucket_view=True)]
    )
    trained = accelerator.prepare(Weight())
    again = accelerator.prepare(trained)
    compiled = accelerator.prepare(DistributedDataParallel(Weight()))
    return {
        "trained": isinstance(trained, DistributedDataParallel),
        "options": (trained.bucket_bytes_cap // 2**20, trained.gradient_as_bucket_view),
        "again": again is trained,
        "held once": (len(accelerator._models), type(accelerator._models[0]).__name__),
        "frozen": type(accelerator.prepare(Weight().requires_grad_(False))).__name__,
        "for evaluation": type(accelerator.prepare_model(Weight(), evaluation_mode=True)).__name__,
        "wrapped by the user": isinstance(compiled.module, Weight),
        "multi_device": accelerator.multi_device,
        "type": str(accelerator.distributed_type),
    }


def test_what_is_wrapped():
    for found in run_on_ranks(kinds, 2):
        assert found == {
            "trained": True,
            "options": (3, True),
            "again": True,
            "held once": (2, "Weight"),
            "frozen": "Weight",
            "for evaluation": "Weight",
            "wrapped by the user": True,
            "multi_device": False,
            "type": "DistributedType.MULTI_CPU",
        }


def mistakes() -> dict:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    def message(call):
        with pytest.raises(SettingError) as caught:
            call()
        return str(caught.value)

    accelerator = Accelerator(
        gradient_accumulation_steps=2, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    raw = Weight()
    model = accelerator.prepare(raw)
    return {
        "backward past the wrapper": message(lambda: accelerator.backward(raw(torch.ones(1)))),
        "accumulate": message(lambda: accelerator.accumulate(raw)),
        "no_sync": message(lambda: accelerator.no_sync(raw)),
        "trigger": message(lambda: accelerator.trigger_sync_in_backward(model).__enter__()),
        "join": message(lambda: accelerator.join_uneven_inputs([raw]).__enter__()),
    }


def test_mistakes_that_give_wrong_gradients_are_named():
    for found in run_on_ranks(mistakes, 2):
        assert "backward() was called before the prepared Weight ran" in found["backward past the wrapper"]
        assert "over the 2 processes" in found["backward past the wrapper"]
        assert (
            "Assign the result: model, optimizer = accelerator.prepare(model, optimizer)."
            in found["backward past the wrapper"]
        )
        assert "accumulate(Weight) got the model as it was before prepare()" in found["accumulate"]
        assert "no_sync(Weight) got the model as it was before prepare()" in found["no_sync"]
        assert "find_unused_parameters=True" in found["trigger"]
        assert "objects that cannot be joined: Weight" in found["join"]


def uneven() -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(torch.arange(1.0, 4.0), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    with accelerator.join_uneven_inputs([model], even_batches=False):
        for batch in loader:
            accelerator.backward(model(batch))
            seen.append(batch.tolist())
    return {"seen": seen, "even again": loader.batch_sampler.even_batches}


def test_ranks_may_run_out_of_batches_at_different_times():
    assert run_on_ranks(uneven, 2) == [
        {"seen": [[1.0], [3.0]], "even again": True},
        {"seen": [[2.0]], "even again": True},
    ]
