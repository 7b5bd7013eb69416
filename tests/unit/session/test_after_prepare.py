"""What a run must not get wrong after prepare: marks that travel, settings assigned late, steps that were skipped."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, GradScalerKwargs
from accelerate.settings import env
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object, set_seed, tqdm
from tests.support.ranks import run_on_ranks


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


class Adapter(torch.nn.Module):
    """Forwards attributes it lacks to the model inside, as adapters do."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.extra = torch.nn.Linear(1, 1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, inputs):
        return self.extra(self.inside(inputs))


def trained(prepare) -> list[float]:
    accelerator = Accelerator()
    wrapped, optimizer = prepare(accelerator)
    inputs = torch.full((1, 2), float(accelerator.process_index + 1))
    for _ in range(2):
        accelerator.backward(wrapped(inputs).sum())
        optimizer.step()
        optimizer.zero_grad()
    return [value for p in accelerator.unwrap_model(wrapped).parameters() for value in p.flatten().tolist()]


def sgd(one):
    return torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1)


def after_evaluation(accelerator):
    one = model()
    accelerator.prepare_model(one, evaluation_mode=True)
    return accelerator.prepare(one, sgd(one))


def after_evaluation_and_freeing(accelerator):
    one = model()
    accelerator.prepare_model(one, evaluation_mode=True)
    accelerator.free_memory()
    return accelerator.prepare(one, sgd(one))


def after_thawing(accelerator):
    one = accelerator.prepare(model().requires_grad_(False))
    one.requires_grad_(True)
    return accelerator.prepare(one, sgd(one))


def inside_an_adapter(accelerator):
    one = Adapter(accelerator.prepare(model().requires_grad_(False)))
    return accelerator.prepare(one, sgd(one))


def wrapped_by_the_user(accelerator):
    one = torch.nn.parallel.DistributedDataParallel(model())
    return accelerator.prepare(one, sgd(one))


@pytest.mark.parametrize(
    "prepare",
    [after_evaluation, after_evaluation_and_freeing, after_thawing, inside_an_adapter, wrapped_by_the_user],
)
def test_ranks_stay_together_however_a_model_came_to_training(prepare):
    first, second = run_on_ranks(trained, 2, prepare)
    assert first == second


def test_a_model_of_another_precision_is_wrapped_anew():
    one = model()
    Accelerator(cpu=True, mixed_precision="bf16").prepare(one)
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = []
    one.register_forward_hook(lambda module, args, output: seen.append(torch.is_autocast_enabled("cpu")))
    again = Accelerator(cpu=True).prepare(one)
    reference = model()(torch.full((1, 2), 0.3))
    assert torch.equal(again(torch.full((1, 2), 0.3)), reference)


def late_settings() -> tuple[bool, int, float]:
    accelerator = Accelerator()
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator.dataloader_config = DataLoaderConfiguration(split_batches=True)
    accelerator.step_scheduler_with_optimizer = False
    one = model()
    optimizer = sgd(one)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    loader = torch.utils.data.DataLoader(range(8), batch_size=4)
    wrapped, _, loader, scheduler = accelerator.prepare(one, optimizer, loader, scheduler)
    scheduler.step()
    return wrapped.find_unused_parameters, loader.total_batch_size, scheduler.get_last_lr()[0]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_settings_assigned_before_prepare_have_an_effect():
    assert run_on_ranks(late_settings, 2) == [(True, 4, pytest.approx(0.09))] * 2


def test_lists_and_rng_types_can_be_assigned():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model())
    accelerator._models = []
    assert accelerator._session.models == []
    accelerator.rng_types = ["torch"]
    assert accelerator.rng_types == ["torch"]
    with pytest.raises(ValueError, match="'zz', which names no random generator"):
        accelerator.rng_types = ["zz"]
    with pytest.raises(AttributeError):
        accelerator.scaler = None


def before_any_state() -> tuple[float, list[int], bool]:
    set_seed(1, device_specific=True)
    drawn = torch.rand(1).item()
    bar = tqdm(range(1))
    disabled = bar.disable
    bar.close()
    started = bool(PartialState._shared_state)
    assert not started, "seeding and progress bars must not join the group"
    return drawn, gather_object([PartialState().process_index]), disabled


def test_helpers_know_their_rank_before_there_is_a_state():
    (a, ranks, shown), (b, same, hidden) = run_on_ranks(before_any_state, 2)
    assert a != b
    assert ranks == same == [0, 1]
    assert (shown, hidden) == (False, True)


def fp16():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    one = model()
    wrapped, optimizer = accelerator.prepare(one, torch.optim.SGD(one.parameters(), 0.1))
    return accelerator, wrapped, optimizer


def test_clipping_without_a_step_does_not_spoil_the_next_one():
    accelerator, wrapped, optimizer = fp16()
    norms = []
    for index in range(4):
        accelerator.backward(wrapped(torch.ones(1, 2)).sum())
        norms.append(accelerator.clip_grad_norm_(wrapped.parameters(), 1.0).item())
        if index % 2:
            optimizer.step()
        optimizer.zero_grad()
    assert norms == [norms[0]] * 4


def test_unscaling_inside_a_window_is_refused():
    accelerator, wrapped, _ = fp16()
    accelerator.gradient_accumulation_steps = 2
    with accelerator.accumulate(wrapped):
        accelerator.backward(wrapped(torch.ones(1, 2)).sum())
        with pytest.raises(ValueError, match="inside a window of accumulation"):
            accelerator.unscale_gradients()


def test_a_copy_of_an_fp16_optimizer_still_unscales():
    accelerator, wrapped, optimizer = fp16()
    copied_model, copied = copy.deepcopy((wrapped, optimizer))
    accelerator.backward(copied_model(torch.ones(1, 2)).sum())
    before = copied_model.weight.detach().clone()
    copied.step()
    assert torch.allclose(before - copied_model.weight.detach(), torch.full((1, 2), 0.1))


def test_a_failed_accelerator_leaves_nothing_behind():
    with pytest.raises(ValueError, match="fp8"):
        Accelerator(cpu=True, mixed_precision="fp8")
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_the_launchers_precision_is_no_second_argument():
    with env.applied({"ACCELERATE_MIXED_PRECISION": "bf16"}):
        Accelerator(cpu=True, mixed_precision="no")
        assert Accelerator(cpu=True).mixed_precision == "no"


def test_generators_of_other_devices_are_refused():
    with pytest.raises(ValueError, match="rng_types contains 'cuda', and this run computes on cpu"):
        Accelerator(cpu=True, rng_types=["cuda"])


def test_a_window_has_at_least_one_batch():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0"):
        accelerator.gradient_accumulation_steps = 0


def test_a_window_that_was_broken_off_ends_with_the_run():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with accelerator.accumulate():
        assert not accelerator.sync_gradients
    accelerator.free_memory()
    assert accelerator.sync_gradients


def test_words_are_no_truth_values():
    with pytest.raises(TypeError, match="cpu='false' is a text"):
        Accelerator(cpu="false")


def test_unknown_options_of_a_group_are_refused():
    with pytest.raises(TypeError, match=r"timout=3.*Did you mean 'timeout'"):
        PartialState(cpu=True, timout=3)


def test_optimising_something_else_than_the_model_passes():
    accelerator = Accelerator(cpu=True)
    latent = torch.nn.Parameter(torch.ones(5, 5))
    accelerator.prepare(model(), torch.optim.SGD([latent], 0.1))


def test_compiled_before_prepare_loses_its_precision_again():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    compiled = accelerator.prepare(torch.compile(model(), backend="eager"))
    plain = accelerator.unwrap_model(compiled, keep_fp32_wrapper=False)
    inputs = torch.full((1, 2), 0.3)
    assert torch.equal(plain(inputs), model()(inputs))


def test_modules_below_are_found_after_a_plain_import():
    code = "import accelerate; accelerate.utils.set_seed; accelerate.state.PartialState; accelerate.utils.operations.gather"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fails_inside_with(rank_that_fails: int = 0) -> None:
    with Accelerator() as accelerator:
        if accelerator.process_index == rank_that_fails:
            torch.distributed.all_reduce(torch.ones(1), async_op=True)
            raise KeyError("the body failed")


def test_an_exception_inside_with_is_not_held_back():
    with pytest.raises(AssertionError, match="the body failed"):
        run_on_ranks(fails_inside_with, 2, timeout=20)
