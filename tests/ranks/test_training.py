"""Training on 2 ranks: what prepare() makes of any order, when gradients are averaged, and mistakes that would be silent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers load it: here, and not in each of the processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    patch_environment,
)

from ..support.ranks import run_on_ranks


def fresh(**options: Any) -> Accelerator:
    """Return an Accelerator as the first of this process; the process group stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def unit(size: int = 1) -> nn.Linear:
    """Return y = w x with w = 1."""
    model = nn.Linear(size, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def numbers(count: int, batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(torch.arange(1.0, count + 1)[:, None], batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def gradient(model: nn.Module) -> float:
    found = next(model.parameters()).grad
    assert found is not None
    return found.item()


def error_of(call: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n\n" not in str(caught.value)
    return str(caught.value)


# Prepare --------------------------------------------------------------------------------------------------------------


def any_order() -> dict[str, float]:
    weights = {}
    kinds = ("model", "optimizer", "scheduler", "loader")
    calls = [(order,) for order in itertools.permutations(kinds)]
    calls += [tuple((kind,) for kind in order) for order in itertools.permutations(kinds)]
    calls += [(("optimizer", "scheduler"), ("loader", "model")), (("model", "loader"), ("scheduler", "optimizer"))]
    for call in calls:
        accelerator = fresh()
        model = unit()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        things: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": numbers(8)}
        for names in call:
            prepared = accelerator.prepare(*(things[name] for name in names))
            things.update(zip(names, prepared if len(names) > 1 else [prepared], strict=True))
        assert isinstance(things["model"], DistributedDataParallel)
        assert isinstance(things["loader"], DataLoaderShard)
        for batch in things["loader"]:
            accelerator.backward(things["model"](batch).sum())
            things["optimizer"].step()
            things["scheduler"].step()
            things["optimizer"].zero_grad()
        counts = (accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders)
        assert [len(kept) for kept in counts] == [1, 1, 1, 1]
        weights[" | ".join(",".join(names) for names in call)] = model.weight.item()
    return weights


def test_any_order_and_number_of_calls_trains_the_same() -> None:
    first, second = run_on_ranks(any_order, 2)
    assert first == second
    assert len(first) == 24 + 24 + 2
    # Means of gradients 1.5, 3.5, 5.5, 7.5; rates 0.1, then a quarter at each step: two scheduler steps each.
    expected = 1 - 0.1 * (1.5 + 3.5 / 4 + 5.5 / 16 + 7.5 / 64)
    assert len(set(first.values())) == 1
    assert next(iter(first.values())) == pytest.approx(expected)


def passes_through() -> None:
    accelerator = fresh()
    model, loader = unit(), numbers(4)
    prepared, same, text, again = accelerator.prepare(model, loader, "text", model)
    assert text == "text"
    assert accelerator._models == [model]
    assert accelerator.unwrap_model(prepared) is model
    assert accelerator.unwrap_model(again) is model
    assert list(accelerator.get_state_dict(prepared)) == ["weight"]
    assert list(accelerator.get_state_dict(prepared, unwrap=False)) == ["module.weight"]
    assert accelerator.prepare(prepared) is prepared
    assert accelerator.prepare(same) is same
    frozen = accelerator.prepare(unit().requires_grad_(False))
    assert not isinstance(frozen, DistributedDataParallel), "nothing to average"
    evaluated = accelerator.prepare_model(unit(), evaluation_mode=True)
    assert not isinstance(evaluated, DistributedDataParallel)
    assert accelerator.free_memory(prepared, same) == [None, None]
    assert accelerator._models == accelerator._dataloaders == []


def test_what_prepare_keeps_and_unwraps() -> None:
    run_on_ranks(passes_through, 2)


def weights_from_rank_0() -> list[float]:
    accelerator = fresh(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=3)])
    model = unit()
    nn.init.constant_(model.weight, float(accelerator.process_index + 5))
    wrapped = accelerator.prepare(model)
    assert wrapped.find_unused_parameters
    assert wrapped.bucket_bytes_cap == 3 * 1024 * 1024
    return [model.weight.item()]


def test_ranks_start_from_the_weights_of_rank_0_with_the_options_of_the_handler() -> None:
    assert run_on_ranks(weights_from_rank_0, 2) == [[5.0], [5.0]]


def split_batches() -> list[list[float]]:
    accelerator = fresh(split_batches=True)
    assert accelerator.split_batches
    assert accelerator.dataloader_config.split_batches
    return [batch.flatten().tolist() for batch in accelerator.prepare(numbers(8, batch_size=4))]


def test_split_batches_argument_splits_batches() -> None:
    assert run_on_ranks(split_batches, 2) == [[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [7.0, 8.0]]]


def spread() -> list[str]:
    accelerator = fresh()
    model = unit()
    model.hf_device_map = {"a": 0, "b": 1}
    found = [error_of(lambda: accelerator.prepare(model))]
    assert accelerator._models == []
    with patch_environment(ACCELERATE_BYPASS_DEVICE_MAP="true"):
        accelerator.prepare(model)
    return found


def test_model_spread_over_devices_is_refused() -> None:
    for text in run_on_ranks(spread, 2):
        assert "Linear was loaded with a device_map over several devices." in text[0]
        assert "Accepted: a whole model on one device for each process." in text[0]
        assert "accelerate launch --num_processes 1" in text[0]


# Synchronising --------------------------------------------------------------------------------------------------------


def two_models() -> list[tuple[bool, float, float]]:
    accelerator = fresh(gradient_accumulation_steps=2)
    first, second = accelerator.prepare(unit(), unit())
    value = torch.tensor([[accelerator.process_index + 1.0]])
    seen = []
    for _ in range(2):
        with accelerator.accumulate(first, second):
            accelerator.backward((first(value) + 2 * second(value)).sum())
        seen.append((accelerator.sync_gradients, gradient(first), gradient(second)))
    return seen


def test_two_models_accumulate_together() -> None:
    first, second = run_on_ranks(two_models, 2)
    assert first == [(False, 0.5, 1.0), (True, 1.5, 3.0)]
    assert second == [(False, 1.0, 2.0), (True, 1.5, 3.0)]


def windows(sync_each_batch: bool) -> list[float]:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=sync_each_batch)
    accelerator = fresh(gradient_accumulation_plugin=plugin)
    model = accelerator.prepare(unit())
    value = torch.tensor([[accelerator.process_index + 1.0]])
    seen = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(value).sum())
        seen.append(gradient(model))
    return seen


def test_gradients_stay_local_inside_a_window_unless_each_batch_synchronises() -> None:
    assert run_on_ranks(windows, 2, False) == [[0.5, 1.5], [1.0, 1.5]]
    assert run_on_ranks(windows, 2, True) == [[0.75, 1.5], [0.75, 1.5]]


def late_sync() -> list[float]:
    accelerator = fresh()
    model = accelerator.prepare(unit())
    value = torch.tensor([[accelerator.process_index + 1.0]])
    seen = []
    with accelerator.no_sync(model):
        loss = model(value).sum()
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    seen.append(gradient(model))
    # Afterwards all is as it was: batches synchronise, and no_sync does not.
    accelerator.backward(model(value).sum())
    seen.append(gradient(model))
    with accelerator.no_sync(model):
        accelerator.backward(model(value).sum())
    seen.append(gradient(model))
    # So it is inside no_sync too.
    model.zero_grad()
    with accelerator.no_sync(model):
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(model(value).sum())
        seen.append(gradient(model))
        accelerator.backward(model(value).sum())
        seen.append(gradient(model))
    return seen


def test_trigger_sync_in_backward_serves_one_backward() -> None:
    assert run_on_ranks(late_sync, 2) == [[1.5, 3.0, 4.0, 1.5, 2.5], [1.5, 3.0, 5.0, 1.5, 3.5]]


def unused_and_late() -> str:
    accelerator = fresh(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    model = accelerator.prepare(unit())
    return error_of(lambda: accelerator.trigger_sync_in_backward(model).__enter__())


def test_trigger_sync_in_backward_refuses_unused_parameters() -> None:
    for text in run_on_ranks(unused_and_late, 2):
        assert "find_unused_parameters=True" in text
        assert "outside no_sync" in text


def clipped() -> list[list[float]]:
    accelerator = fresh()
    model = unit(2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    # Gradients (6, 0) and (0, 8): of mean (3, 4), of norm 5.
    value = torch.tensor([[0.0, 8.0]] if accelerator.process_index else [[6.0, 0.0]])
    accelerator.backward(model(value).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.dim() == 0
    found = [[norm.item()], model.module.weight.grad[0].tolist()]
    accelerator.clip_grad_value_(model.parameters(), 0.7)
    optimizer.step()
    return [*found, model.module.weight[0].tolist()]


def test_clipping_sees_the_averaged_gradients() -> None:
    first, second = run_on_ranks(clipped, 2)
    assert first == second
    assert first == [[5.0], pytest.approx([0.6, 0.8]), pytest.approx([0.4, 0.3])]


def joined(even_batches: bool | None, configured: bool) -> tuple[int, float, int]:
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(even_batches=configured))
    model = unit()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), numbers(5))
    count = 0
    with accelerator.join_uneven_inputs([model], even_batches=even_batches):
        for batch in loader:
            accelerator.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
            count += 1
    assert loader.batch_sampler.even_batches is configured
    return count, model.module.weight.item(), len(list(loader))


def test_ranks_may_run_out_of_batches_at_different_times() -> None:
    # Gradients 1 and 2, 3 and 4, then 5 alone: means over both ranks.
    weight = 1 - (1.5 + 3.5 + 2.5)
    assert run_on_ranks(joined, 2, False, True) == [(3, weight, 3), (2, weight, 3)]
    # The loader may be uneven by itself.
    assert run_on_ranks(joined, 2, None, False) == [(3, weight, 3), (2, weight, 2)]
    # And the region does no harm to one that is even: the last rank sees sample 1 again.
    assert run_on_ranks(joined, 2, None, True) == [(3, 1 - (1.5 + 3.5 + 3.0), 3)] * 2


def joined_over_iterable() -> None:
    class Stream(torch.utils.data.IterableDataset[float]):
        def __iter__(self):
            yield from (1.0, 2.0, 3.0, 4.0)

    accelerator = fresh()
    model, _ = accelerator.prepare(unit(), DataLoader(Stream(), batch_size=1))
    with (
        pytest.warns(UserWarning, match=r"even_batches=False has no meaning for DataLoader\w+ over an iterable"),
        accelerator.join_uneven_inputs([model], even_batches=False),
    ):
        pass
    text = error_of(lambda: accelerator.join_uneven_inputs([unit()]).__enter__())
    assert "join_uneven_inputs got objects that cannot be joined: Linear." in text
    assert "Accepted: models that prepare() returned." in text


def test_join_says_what_it_cannot_do() -> None:
    run_on_ranks(joined_over_iterable, 2)


# Silent mistakes ------------------------------------------------------------------------------------------------------


def lost_model() -> str:
    accelerator = fresh()
    model = unit()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = error_of(lambda: accelerator.backward(model(torch.ones(1, 1)).sum()))
    assert model.weight.grad is None
    return found


def test_lost_model() -> None:
    for text in run_on_ranks(lost_model, 2):
        assert "backward() was called before the prepared Linear ran" in text
        assert "would not be averaged over the 2 processes" in text
        assert "Accepted: a loss computed with what prepare() returned." in text
        assert "model, optimizer = accelerator.prepare(model, optimizer)" in text


def not_lost() -> None:
    # One of two prepared models is enough, and a loss may leave them out once they ran.
    accelerator = fresh()
    first, _ = accelerator.prepare(unit(), unit())
    accelerator.backward(first(torch.ones(1, 1)).sum())
    raw = unit()
    accelerator.backward(raw(torch.ones(1, 1)).sum())
    assert gradient(raw) == 1.0
    # Nothing was prepared: there is nothing to lose.
    accelerator = fresh()
    accelerator.backward(raw(torch.ones(1, 1)).sum())


def test_models_that_are_not_lost() -> None:
    run_on_ranks(not_lost, 2)


def as_it_was() -> list[str]:
    accelerator = fresh(gradient_accumulation_steps=2)
    model = unit()
    prepared = accelerator.prepare(model)
    found = [error_of(lambda: accelerator.no_sync(model)), error_of(lambda: accelerator.accumulate(model))]
    with accelerator.no_sync(prepared), accelerator.no_sync(unit()):
        pass  # a model that never was prepared is nobody's mistake
    return found


def test_model_as_it_was_before_prepare() -> None:
    for no_sync, accumulate in run_on_ranks(as_it_was, 2):
        assert "no_sync(Linear) got the model as it was before prepare(), which made a wrapper of it." in no_sync
        assert "accumulate(Linear) got the model as it was before prepare()" in accumulate
        assert "Accepted: the model that prepare() returned." in accumulate
        assert "model = accelerator.prepare(model)" in accumulate


def mixed_up() -> str:
    accelerator = fresh()
    old, new = unit(), unit()
    found = error_of(lambda: accelerator.prepare(torch.optim.SGD(old.parameters(), lr=1.0), new))
    assert accelerator._models == accelerator._optimizers == []
    return found


def test_optimizer_of_another_model() -> None:
    for text in run_on_ranks(mixed_up, 2):
        assert "the optimizer SGD, which holds no parameter of any prepared model" in text


def second_differs() -> list[str]:
    fresh(mixed_precision="bf16")
    found = [error_of(lambda: Accelerator(mixed_precision="no"))]
    with pytest.warns(UserWarning, match=r"InitProcessGroupKwargs\(.*\) comes too late"):
        fresh(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", init_method="env://")])
    return found


def test_second_accelerator_that_contradicts() -> None:
    for text in run_on_ranks(second_differs, 2):
        assert "mixed_precision='no' contradicts 'bf16'" in text[0]
