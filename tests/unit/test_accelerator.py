"""`Accelerator` on one process: what it prepares, shares and forgets, and what it says to bad input."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, PartialState
from accelerate.core.errors import UnsupportedCombination
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    extract_model_from_parallel,
    is_compiled_module,
    patch_environment,
    tqdm,
)


def error_of(call: Any, kind: type[Exception] = ValueError) -> str:
    """Return the text of the error, which is one paragraph of at most four parts."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n\n" not in text
    assert len(text) < 900
    return text


def trained(steps: int = 1, **options: Any) -> tuple[Accelerator, nn.Module, Any]:
    """Return a prepared model with w = 1 and its optimizer."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, **options)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return accelerator, model, optimizer


# State ----------------------------------------------------------------------------------------------------------------


def test_instances_share_their_state_and_forget_it_in_place() -> None:
    assert PartialState._shared_state == {}
    assert AcceleratorState._shared_state == {}
    accelerator = Accelerator(cpu=True)
    shared = PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state
    assert all(shared)
    assert PartialState().__dict__ is PartialState._shared_state
    assert PartialState().device == torch.device("cpu")
    assert Accelerator().state.__dict__ is accelerator.state.__dict__
    assert GradientState().__dict__ is accelerator.gradient_state.__dict__
    assert accelerator.state.deepspeed_plugin is None
    assert not hasattr(accelerator.state, "fsdp_plugin")
    assert accelerator.distributed_type is DistributedType.NO
    assert not accelerator.multi_device
    assert not accelerator.use_distributed
    state = PartialState()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not any(shared)
    assert "'device'" in error_of(lambda: state.device, AttributeError)
    with pytest.raises(ValueError, match="AcceleratorState does not exist yet"):
        AcceleratorState()


def test_logging_before_there_is_a_state_explains_itself() -> None:
    text = error_of(lambda: get_logger("tests").info("too early"), RuntimeError)
    assert "Create an Accelerator() or a PartialState() before the first message." in text


def test_with_statement_ends_the_run_so_that_another_may_differ() -> None:
    with Accelerator(cpu=True, mixed_precision="bf16") as first:
        first.prepare(nn.Linear(1, 1))
        assert first.mixed_precision == "bf16"
    assert first._models == []
    assert AcceleratorState._shared_state == {}
    assert Accelerator(cpu=True, mixed_precision="fp16").mixed_precision == "fp16"


def test_end_training_without_a_group_does_nothing_twice() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.end_training()
    accelerator.end_training()
    accelerator.state.destroy_process_group()
    assert accelerator.num_processes == 1


@pytest.mark.parametrize("given", ["BF16", "bf16", "Bf16"])
def test_precision_names_in_any_case(given: str) -> None:
    assert Accelerator(cpu=True, mixed_precision=given).mixed_precision == "bf16"
    AcceleratorState._reset_state()
    with patch_environment(ACCELERATE_MIXED_PRECISION=given):
        assert Accelerator(cpu=True).mixed_precision == "bf16"


# Prepare --------------------------------------------------------------------------------------------------------------


def test_device_placement_for_each_object() -> None:
    with patch_environment(ACCELERATE_TORCH_DEVICE="meta"):
        accelerator = Accelerator()
    loader = DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=2)
    moved, stays, placed, left = accelerator.prepare(
        nn.Linear(1, 1), nn.Linear(1, 1), loader, copy.deepcopy(loader), device_placement=[True, False, True, False]
    )
    assert moved.weight.device.type == "meta"
    assert stays.weight.device.type == "cpu"
    assert next(iter(placed))[0].device.type == "meta"
    assert next(iter(left))[0].device.type == "cpu"
    by_default = accelerator.prepare(nn.Linear(1, 1), nn.Linear(1, 1), device_placement=[None, False])
    assert [model.weight.device.type for model in by_default] == ["meta", "cpu"]
    assert accelerator.prepare_model(nn.Linear(1, 1), device_placement=False).weight.device.type == "cpu"
    assert Accelerator(device_placement=False).prepare(nn.Linear(1, 1)).weight.device.type == "cpu"


def test_prepared_loader_keeps_what_clients_read() -> None:
    accelerator = Accelerator(cpu=True)
    dataset = TensorDataset(torch.arange(5.0))
    loader = accelerator.prepare(DataLoader(dataset, batch_size=2))
    assert isinstance(loader, DataLoader)
    assert loader.dataset is dataset
    assert accelerator.prepare(loader) is loader
    assert len(accelerator._dataloaders) == 1


def test_forgetting_frees_what_was_prepared() -> None:
    accelerator, model, optimizer = trained(steps=3)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
    assert accelerator.step == 1
    assert accelerator.free_memory(model, optimizer) == [None, None]
    assert accelerator.step == 0
    assert [len(kept) for kept in (accelerator._models, accelerator._optimizers)] == [0, 0]
    # The public lists are the live ones, before and after.
    assert accelerator._models is accelerator._session.models
    accelerator.prepare(nn.Linear(1, 1))
    assert len(accelerator._models) == 1
    assert accelerator.clear() == []
    assert accelerator._models == []


def test_unwrapping_compiled_models() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inner = nn.Linear(1, 1)
    model = accelerator.prepare(torch.compile(inner, backend="eager"))
    assert is_compiled_module(model)
    assert accelerator.unwrap_model(model) is model
    assert accelerator.unwrap_model(model, keep_torch_compile=False) is inner
    assert list(accelerator.get_state_dict(model)) == ["weight", "bias"]
    plain = nn.Linear(1, 1)
    assert accelerator.unwrap_model(plain) is plain


def test_dynamo_backend_compiles_with_it() -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    model = accelerator.prepare(nn.Linear(1, 1))
    assert is_compiled_module(model)
    assert model(torch.ones(1, 1)).shape == (1, 1)
    assert not calls
    torch._dynamo.reset()


def test_precision_is_taken_off_a_model_in_place() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(super().forward(x).dtype)
            return super().forward(x)

    model = accelerator.prepare(Watched(2, 2))
    assert model(torch.ones(1, 2)).dtype is torch.float32
    assert seen.pop() is torch.bfloat16
    # A copy computes with its own parameters, under the same precision.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert not twin(torch.ones(1, 2)).any()
    assert seen.pop() is torch.bfloat16
    assert model(torch.ones(1, 2)).any()
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert plain is model
    seen.clear()
    plain(torch.ones(1, 2))
    assert seen == [torch.float32]
    assert "forward" not in model.__dict__
    assert extract_model_from_parallel(model, keep_fp32_wrapper=False) is model


def test_outputs_keep_half_precision_if_asked() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(outputs_to_fp32=False)])
    assert accelerator.prepare(nn.Linear(2, 2))(torch.ones(1, 2)).dtype is torch.bfloat16


# Step -----------------------------------------------------------------------------------------------------------------


def test_fp16_on_a_cpu_computes_in_float16_and_skips_steps_that_overflow() -> None:
    accelerator, model, optimizer = trained(
        mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**24, growth_interval=1)]
    )
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    with accelerator.autocast():
        assert model.weight.matmul(torch.ones(1, 1)).dtype is torch.float16
    assert accelerator.native_amp
    assert isinstance(accelerator.scaler, torch.amp.GradScaler)
    skipped = []
    for _ in range(12):
        before = model.weight.item(), optimizer.param_groups[0]["lr"]
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        after = model.weight.item(), optimizer.param_groups[0]["lr"]
        assert (before == after) == skipped[-1]
    assert skipped[:8] == [True] * 8  # 2**24 down to below 2**16, where float16 ends
    assert not all(skipped)


def test_each_scheduler_follows_its_own_optimizer() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    models = [nn.Linear(1, 1), nn.Linear(1, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]
    for optimizer in optimizers:  # torch warns of a schedule that begins before the first step
        optimizer.step()
    # In one call and in another one, before and after their optimizers.
    first, two, one = accelerator.prepare(schedulers[0], *reversed(optimizers))
    second = accelerator.prepare(schedulers[1])
    models = accelerator.prepare(*models)
    accelerator.backward(models[0](torch.ones(1, 1)).sum() * float("inf"))
    accelerator.backward(models[1](torch.ones(1, 1)).sum())
    for stepped in (one, two, first, second):
        stepped.step()
    assert (one.step_was_skipped, two.step_was_skipped) == (True, False)
    assert (first.get_last_lr(), second.get_last_lr()) == ([1.0], [0.5])
    assert accelerator.optimizer_step_was_skipped


def test_clipping_sees_gradients_at_their_true_size_under_fp16() -> None:
    accelerator, model, optimizer = trained(
        steps=2, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=256.0)]
    )
    for sync, norm in ((False, 2.0), (True, 3.0)):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), 4.0)).sum())
            assert accelerator.sync_gradients is sync
            assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(norm)
            assert accelerator.clip_grad_norm_(iter(model.parameters()), 1.0).item() == pytest.approx(1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(0.0, abs=1e-6)
    for sync, left in ((False, 0.25 * 256), (True, 0.25)):  # still scaled while more is added
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), 4.0)).sum())
            accelerator.clip_grad_value_(model.weight, 0.25)
            assert model.weight.grad is not None
            assert accelerator.sync_gradients is sync
            assert model.weight.grad.item() == pytest.approx(left)
            optimizer.step()
    assert model.weight.item() == pytest.approx(-0.25, abs=1e-6)


def test_accumulation_setter_and_region_count_together() -> None:
    accelerator, model, optimizer = trained()
    accelerator.gradient_accumulation_steps = 2
    seen = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
        seen.append((accelerator.sync_gradients, model.weight.item()))
    assert seen == [(False, 1.0), (True, 0.0), (False, 0.0), (True, -1.0)]


def test_join_needs_no_second_process() -> None:
    accelerator, model, _ = trained()
    with accelerator.join_uneven_inputs([model], even_batches=False):
        accelerator.backward(model(torch.ones(1, 1)).sum())
    assert next(model.parameters()).grad is not None


def test_progress_bar_is_shown_on_the_main_process() -> None:
    Accelerator(cpu=True)
    shown = io.StringIO()
    with redirect_stderr(shown):
        assert list(tqdm(range(3), desc="bar")) == [0, 1, 2]
    assert "bar: 100%" in shown.getvalue()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_wrong_precision_names() -> None:
    text = error_of(lambda: Accelerator(cpu=True, mixed_precision="fp61"))
    assert "mixed_precision='fp61' is not a precision (from the argument mixed_precision)." in text
    assert "Accepted: 'no', 'fp8', 'fp16', 'bf16'." in text
    assert "pass mixed_precision='no'" in text
    with patch_environment(ACCELERATE_MIXED_PRECISION="half"):
        text = error_of(lambda: Accelerator(cpu=True))
    assert "mixed_precision='half' is not a precision (from ACCELERATE_MIXED_PRECISION)." in text
    assert "unset the variable" in text


def test_fp8_needs_an_engine() -> None:
    text = error_of(lambda: Accelerator(cpu=True, mixed_precision="fp8"), UnsupportedCombination)
    assert "mixed_precision='fp8' (from the argument mixed_precision) needs an fp8 engine" in text
    assert "Accepted: one process, or data parallelism" in text


def test_second_accelerator_with_another_precision() -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    assert Accelerator().mixed_precision == "bf16"
    text = error_of(lambda: Accelerator(mixed_precision="no"))
    assert "mixed_precision='no' contradicts 'bf16', with which this process has been set up" in text
    assert "Accepted: 'bf16', or no mixed_precision." in text
    assert "with Accelerator(...) as accelerator:" in text


def test_cpu_too_late() -> None:
    with patch_environment(ACCELERATE_TORCH_DEVICE="meta"):
        Accelerator()
    text = error_of(lambda: Accelerator(cpu=True))
    assert "cpu=True contradicts meta, on which this process has been set up already." in text
    assert "ACCELERATE_USE_CPU=true" in text


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        (
            {"gradient_accumulation_steps": 2, "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=3)},
            ValueError,
            ("gradient_accumulation_steps=2 and gradient_accumulation_plugin=", "num_steps=3", "one of the two"),
        ),
        (
            {"split_batches": True, "dataloader_config": DataLoaderConfiguration()},
            ValueError,
            ("split_batches=True (argument of Accelerator) contradicts split_batches=False", "only"),
        ),
        (
            {"project_dir": "a", "project_config": ProjectConfiguration(project_dir="b")},
            ValueError,
            ("project_dir='a' (argument of Accelerator) contradicts project_dir='b' (in project_config)", "only"),
        ),
        (
            {"dynamo_backend": "eager", "dynamo_plugin": TorchDynamoPlugin()},
            ValueError,
            ("dynamo_backend='eager' and dynamo_plugin=", "one of the two"),
        ),
        (
            {"kwargs_handlers": [AutocastKwargs(), AutocastKwargs(enabled=False)]},
            ValueError,
            ("two AutocastKwargs: ", "enabled=True", "enabled=False", "at most one AutocastKwargs"),
        ),
        (
            {"kwargs_handlers": [DistributedDataParallelKwargs(), "ddp"]},
            TypeError,
            ("kwargs_handlers contains 'ddp', of type str.", "'AutocastKwargs', 'DistributedDataParallelKwargs'"),
        ),
        (
            {"rng_types": ["torch", "zz"]},
            ValueError,
            ("rng_types=['torch', 'zz'] contains 'zz'", "argument of Accelerator", "'generator'"),
        ),
        ({"gradient_accumulation_steps": 0}, ValueError, ("gradient_accumulation_steps=0", "an integer >= 1")),
        ({"gradient_accumulation_steps": 1.5}, ValueError, ("gradient_accumulation_steps=1.5", "an integer >= 1")),
        ({"dataloader_config": {}}, TypeError, ("dataloader_config={} has type dict.", "DataLoaderConfiguration")),
        ({"log_with": "wandb"}, UnsupportedCombination, ("log_with='wandb' (an argument", "experiment trackers")),
        ({"fsdp_plugin": object()}, UnsupportedCombination, ("fsdp_plugin=", "the FSDP engine", "accelerate 1.x")),
        ({"deepspeed_plugin": 1}, UnsupportedCombination, ("deepspeed_plugin=1", "the DeepSpeed engine")),
        ({"parallelism_config": 1}, UnsupportedCombination, ("parallelism_config=1", "device meshes")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_meant(options: dict[str, Any], kind: type[Exception], parts: tuple[str, ...]) -> None:
    text = error_of(lambda: Accelerator(cpu=True, **options), kind)
    assert [part for part in parts if part not in text] == []
    assert AcceleratorState._shared_state == {}, "a refused Accelerator must leave nothing behind"


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_variables_of_missing_engines(name: str) -> None:
    with patch_environment(**{f"ACCELERATE_USE_{name}": "true"}):
        text = error_of(lambda: Accelerator(cpu=True), UnsupportedCombination)
    assert f"ACCELERATE_USE_{name}=true (in the environment) needs" in text


def test_variable_of_the_launcher_beats_the_number_of_steps_and_says_so() -> None:
    with patch_environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="5"):
        with pytest.warns(UserWarning, match=r"gradient_accumulation_steps=2 .* gives way to 5 .*ACCELERATE_GRADIENT"):
            assert Accelerator(cpu=True, gradient_accumulation_steps=2).gradient_accumulation_steps == 5
        plugin = GradientAccumulationPlugin(num_steps=3)
        assert Accelerator(gradient_accumulation_plugin=plugin).gradient_accumulation_steps == 3


def test_objects_that_cannot_be_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    assert "without anything to prepare" in error_of(accelerator.prepare, IndexError)
    text = error_of(lambda: accelerator.prepare(nn.Linear(1, 1), device_placement=[True, False]))
    assert "device_placement has 2 entries for 1 objects." in text
    text = error_of(lambda: accelerator.register_for_checkpointing(3))
    assert "register_for_checkpointing got 3, of type int." in text


def test_optimizer_of_another_model() -> None:
    accelerator = Accelerator(cpu=True)
    old = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    new = copy.deepcopy(old)
    text = error_of(lambda: accelerator.prepare(new, optimizer))
    assert "the optimizer SGD, which holds no parameter of any prepared model" in text
    assert "the model Linear with parameters of the same shapes, which no optimizer holds" in text
    assert "Accepted: an optimizer made from the parameters of the model that is trained." in text
    assert accelerator._models == []
    assert accelerator._optimizers == []
    # What only looks like it is fine: a frozen model beside, a model prepared before, or one call for each.
    frozen = nn.Linear(1, 1).requires_grad_(False)
    accelerator.prepare(frozen, old, optimizer)
    other = nn.Linear(1, 1)
    accelerator.prepare(other)
    accelerator.prepare(nn.Linear(1, 1), torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixed_precision": "fp16"}, "gradients are scaled for fp16"),
        ({"gradient_accumulation_steps": 4}, "gradients are accumulated over 4 batches"),
        (
            {"mixed_precision": "fp16", "gradient_accumulation_steps": 4},
            "gradients are scaled for fp16 and gradients are accumulated over 4 batches",
        ),
    ],
    ids=("fp16", "accumulation", "both"),
)
def test_lost_optimizer(options: dict[str, Any], reason: str) -> None:
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    before = model.weight.item()
    text = error_of(optimizer.step)
    assert f"SGD.step() was called on the optimizer as it was before prepare(), although {reason}." in text
    assert "optimizer = accelerator.prepare(optimizer)" in text
    assert model.weight.item() == before


def test_prepared_optimizer_is_not_taken_for_a_lost_one() -> None:
    accelerator, model, optimizer = trained(steps=1, mixed_precision="fp16")
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() != 1.0


def test_missing_engines_of_methods() -> None:
    accelerator = Accelerator(cpu=True)
    assert "pipeline parallelism" in error_of(lambda: accelerator.pipeline_parallel_rank)
    assert "the LOMO engine" in error_of(lambda: accelerator.lomo_backward(torch.ones(1), 0.1))
    assert "no tensor-parallel axis" in error_of(lambda: accelerator.tensor_parallel_rank, RuntimeError)
    assert "There is no tracker 'wandb'." in error_of(lambda: accelerator.get_tracker("wandb"))
    accelerator.init_trackers("run", config={"a": 1})
    accelerator.log({"loss": 1.0}, step=1)
    text = error_of(lambda: accelerator.on_process(lambda: 1))
    assert "process_index is missing." in text
