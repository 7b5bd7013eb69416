"""What `prepare` gives back and keeps, through `Accelerator`, in one process."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.core.errors import SettingError
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.parallel.unwrap import is_compiled_module
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import AutocastKwargs, TorchDynamoPlugin

X = torch.ones(1, 2)


def objects():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return (
        model,
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 1),
        torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2),
    )


def test_each_object_is_prepared_in_its_place():
    model, optimizer, scheduler, loader = objects()
    accelerator = Accelerator(cpu=True)
    other = object()
    found = accelerator.prepare(scheduler, loader, other, model, optimizer)
    assert [type(item) for item in found] == [
        AcceleratedScheduler,
        DataLoaderShard,
        object,
        torch.nn.Linear,
        AcceleratedOptimizer,
    ]
    assert found[3] is model
    assert found[2] is other
    assert found[4].optimizer is optimizer
    assert found[0].optimizers == [found[4]]
    assert found[1].dataset is loader.dataset
    assert model._is_accelerate_prepared


def test_preparing_again_gives_the_same_objects_and_keeps_them_once():
    accelerator = Accelerator(cpu=True)
    first = accelerator.prepare(*objects())
    second = accelerator.prepare(*first)
    assert all(a is b for a, b in zip(first, second, strict=True))
    kept = accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders
    assert [len(items) for items in kept] == [1, 1, 1, 1]


def test_one_object_comes_back_alone_and_none_is_refused():
    accelerator = Accelerator(cpu=True)
    assert accelerator.prepare("anything") == "anything"
    with pytest.raises(IndexError, match="without anything to prepare"):
        accelerator.prepare()
    with pytest.raises(SettingError, match="device_placement has 2 entries for 1 objects"):
        accelerator.prepare(torch.nn.Linear(1, 1), device_placement=[True, True])


def test_single_objects_have_words_of_their_own():
    accelerator = Accelerator(cpu=True)
    model, optimizer, _, loader = objects()
    assert accelerator.prepare_model(model) is model
    assert isinstance(accelerator.prepare_optimizer(optimizer), AcceleratedOptimizer)
    assert isinstance(accelerator.prepare_data_loader(loader), DataLoaderShard)

    class Schedule:
        steps = 0

        def step(self):
            self.steps += 1

    schedule = accelerator.prepare_scheduler(Schedule())
    assert isinstance(schedule, AcceleratedScheduler)
    schedule.step()
    assert schedule.steps == 1


def test_an_optimizer_prepared_before_its_scheduler_is_found():
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler, _ = objects()
    prepared = accelerator.prepare(optimizer)
    accelerator.prepare(model)
    assert accelerator.prepare(scheduler).optimizers == [prepared]


def test_the_optimizer_of_another_model_is_refused():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(SettingError, match="holds no parameter of any prepared model"):
        accelerator.prepare(torch.nn.Linear(1, 1), torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0))
    assert accelerator._models == []


# Precision and compilation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "native", "inner", "scaled"),
    [("no", False, torch.float32, False), ("bf16", True, torch.bfloat16, False), ("fp16", True, torch.float16, True)],
)
def test_a_model_answers_in_single_precision_whatever_it_computes_in(precision, native, inner, scaled):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert model(X).dtype == torch.float32
    assert model.weight.dtype == torch.float32
    assert accelerator.mixed_precision == precision
    assert accelerator.native_amp is native
    assert (accelerator.scaler is not None) == scaled
    with accelerator.autocast():
        assert torch.mm(X, X.T).dtype == inner
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        assert torch.mm(X, X.T).dtype == torch.float32


def test_the_precision_can_be_taken_off_a_model():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    assert "forward" in model.__dict__
    assert accelerator.unwrap_model(model) is model
    assert "forward" in model.__dict__
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert "forward" not in model.__dict__


def test_a_model_is_compiled_when_asked_and_kept_without_the_wrapper():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    given = torch.nn.Linear(2, 2)
    model = accelerator.prepare(given)
    assert is_compiled_module(model)
    assert accelerator._models == [given]
    assert model(X).dtype == torch.float32
    assert accelerator.unwrap_model(model) is model
    assert accelerator.unwrap_model(model, keep_torch_compile=False) is given
    assert set(accelerator.get_state_dict(model)) == {"weight", "bias"}
    assert accelerator.prepare(model) is model


# The first step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixed_precision": "fp16"}, "gradients are scaled for fp16"),
        ({"gradient_accumulation_steps": 3}, "gradients are accumulated over 3 batches"),
        (
            {"mixed_precision": "fp16", "gradient_accumulation_steps": 3},
            "gradients are scaled for fp16 and gradients are accumulated over 3 batches",
        ),
    ],
)
def test_stepping_the_old_optimizer_is_refused_where_numbers_would_be_wrong(options, reason):
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer, _, _ = objects()
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.backward(model(X).sum())
    with pytest.raises(SettingError) as caught:
        optimizer.step()
    assert "SGD.step() was called on the optimizer as it was before prepare(), although " in str(caught.value)
    assert reason in str(caught.value)
    assert "Assign the result: optimizer = accelerator.prepare(optimizer)." in str(caught.value)


@pytest.mark.parametrize("options", [{"mixed_precision": "fp16"}, {"gradient_accumulation_steps": 1}])
def test_stepping_the_prepared_optimizer_first_lifts_the_guard(options):
    accelerator = Accelerator(cpu=True, **options)
    model, inner, _, _ = objects()
    model, optimizer = accelerator.prepare(model, inner)
    accelerator.backward(model(X).sum())
    optimizer.step()
    optimizer.zero_grad()
    assert len(inner._optimizer_step_pre_hooks) == 0


def test_stepping_the_old_optimizer_is_right_where_nothing_differs():
    accelerator = Accelerator(cpu=True)
    model, optimizer, _, _ = objects()
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.backward(model(X).sum())
    optimizer.step()


def test_a_guarded_optimizer_can_be_pickled():
    import pickle

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    pickle.loads(pickle.dumps(accelerator.prepare(*objects()[:2])[1]))


# Forgetting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["free_memory", "clear"])
def test_everything_is_forgotten_and_freed(word):
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler, loader = accelerator.prepare(*objects())
    seen = weakref.ref(model)
    lists = accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders
    accelerator.step = 3
    assert getattr(accelerator, word)(model, optimizer) == [None, None]
    assert [len(items) for items in lists] == [0, 0, 0, 0]
    assert accelerator.step == 0
    del model, optimizer, scheduler
    gc.collect()
    assert seen() is None


def test_a_with_block_ends_the_run_so_that_another_one_may_differ():
    with Accelerator(cpu=True, mixed_precision="bf16") as accelerator:
        accelerator.prepare(torch.nn.Linear(1, 1))
    assert accelerator._models == []
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"


def test_a_loader_of_webdataset_is_told_that_it_passes_through():
    kind = type("WebLoader", (), {"__module__": "webdataset.compat"})
    loader = type("Mine", (kind,), {})()
    with pytest.warns(UserWarning, match="Mine is no torch DataLoader, and prepare gives it back as it is"):
        assert Accelerator(cpu=True).prepare(loader) is loader
    other = type("WebLoader", (), {"__module__": "elsewhere"})()
    assert Accelerator(cpu=True).prepare(other) is other


# A global batch size --------------------------------------------------------------------------------------------------


def with_global_batch():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(global_batch_size=8))


def test_accumulation_that_a_global_batch_size_decides_can_be_read_and_not_set():
    accelerator = with_global_batch()
    loader, shorter = accelerator.prepare(DataLoader(range(64), batch_size=2), DataLoader(range(8), batch_size=4))
    assert accelerator.gradient_accumulation_steps == 4, "of the longest loader, which is the one for training"
    for _ in shorter:
        assert accelerator.gradient_accumulation_steps == 2
    for steps in (1, 2):
        with pytest.raises(ValueError, match=f"set to {steps}, and global_batch_size=8 .* decides it: 4"):
            accelerator.gradient_accumulation_steps = steps
    accelerator.gradient_accumulation_steps = 4
    for _ in loader:
        assert accelerator.gradient_accumulation_steps == 4


def test_a_loader_that_was_prepared_without_the_global_batch_size_is_refused():
    accelerator = with_global_batch()
    made = prepare_data_loader(DataLoader(range(8), batch_size=2))
    with pytest.raises(
        ValueError, match=r"global_batch_size=8 .* this DataLoaderShard, .* with global_batch_size=None"
    ):
        accelerator.prepare(made)
    same = prepare_data_loader(DataLoader(range(8), batch_size=2), global_batch_size=8)
    assert accelerator.prepare(same) is same


@pytest.mark.parametrize("inside", [False, True])
def test_a_loader_that_cannot_keep_the_global_batch_size_evaluates_only(inside):
    accelerator = with_global_batch()
    model, rows = torch.nn.Linear(1, 1), torch.ones(6, 1)
    with pytest.warns(UserWarning, match="global_batch_size=8 .* is for evaluation only"):
        model, loader = accelerator.prepare(model, DataLoader(rows, batch_sampler=[[0, 1], [2], [3, 4, 5]]))
    assert [len(batch) for batch in loader] == [2, 1, 3]
    assert loader.global_batch is None
    for number, batch in enumerate(skip_first_batches(loader, 1) if inside else loader):
        with pytest.raises(ValueError, match="global_batch_size=8 .* for evaluation only"):  # noqa: PT012 - either of them
            with accelerator.accumulate(model) if inside else contextlib.nullcontext():
                accelerator.backward(model(batch).mean())
    assert number
