"""The loss scale of fp16: overflow, several optimizers, clipping. All on the CPU, whose scaler works like a GPU's."""

from __future__ import annotations

import gc

import pytest
import torch

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.stepping import clip
from accelerate.stepping.scaling import LossScaling
from accelerate.utils import GradScalerKwargs

INF = float("inf")


def parameter(value=1.0):
    return torch.nn.Parameter(torch.tensor([value]))


def half(scale=8.0, **options):
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=scale)], **options
    )
    assert accelerator.scaler.get_scale() == scale
    return accelerator


class Model(torch.nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.weight = parameter(value)

    def forward(self, factor):
        return (self.weight * factor).sum()


def prepared(accelerator, lr=1.0, **options):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    return accelerator.prepare(model, optimizer)


# One optimizer ----------------------------------------------------------------------------------------------------------


def test_a_step_is_taken_at_the_true_size():
    accelerator = half()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(0.5))
    assert model.weight.grad.item() == 0.5 * 8
    optimizer.step()
    assert model.weight.item() == 0.5
    assert not optimizer.step_was_skipped
    assert not accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_step_and_lowers_the_scale(fused):
    """A fused optimizer skips inside its kernel: only the scaler's finding tells."""
    accelerator = half()
    model, optimizer = prepared(accelerator, fused=fused)
    accelerator.backward(model(INF))
    optimizer.step()
    assert model.weight.item() == 1.0
    assert optimizer.step_was_skipped
    assert accelerator.optimizer_step_was_skipped
    assert accelerator.scaler.get_scale() == 4.0
    optimizer.zero_grad()
    accelerator.backward(model(0.5))
    optimizer.step()
    assert model.weight.item() == 0.5
    assert not optimizer.step_was_skipped


def test_the_scheduler_waits_while_steps_are_skipped():
    accelerator = half()
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rates = []
    for factor in (0.0, INF, 0.0):
        accelerator.backward(model(factor))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.9, 0.9, 0.8]


@pytest.mark.parametrize("units", [None, "optimizer_steps"])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_skipped_step_leaves_everything_as_it_was(make, kind, units):
    """Also where the optimizer's kernel skips, which the optimizer itself does not tell."""
    accelerator = half(gradient_accumulation_steps=2, scheduler_units=units)
    model = Model()
    optimizer = make(model.parameters(), lr=0.5, **({"momentum": 0.9} if make is torch.optim.SGD else {}), **kind)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def window(*factors):
        for factor in factors:
            with accelerator.accumulate(model):
                accelerator.backward(model(factor))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        state = optimizer.state[model.weight]
        held = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
        return {"weight": model.weight.detach().clone(), **held, "rate": torch.tensor(scheduler.get_last_lr())}

    before = window(1.0, 0.5)
    assert not optimizer.step_was_skipped
    assert before["rate"].item() == 0.25
    for overflow in ((1.0, INF), (INF, 1.0)):
        after = window(*overflow)
        assert optimizer.step_was_skipped
        assert accelerator.optimizer_step_was_skipped
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    after = window(1.0, 0.5)
    assert not optimizer.step_was_skipped
    assert after["rate"].item() == 0.125
    assert not torch.equal(before["weight"], after["weight"])
    if make is torch.optim.AdamW:
        assert (before["step"].item(), after["step"].item()) == (1, 2)


def test_whether_a_step_was_skipped_is_found_out_when_asked():
    """Asking the device makes the caller wait, so the step itself must not."""
    accelerator = half()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(INF))
    optimizer.step()
    assert callable(optimizer._skipped)
    assert optimizer.step_was_skipped
    assert optimizer._skipped is True


def test_accumulated_gradients_keep_one_scale():
    accelerator = half(gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(0.5))
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == 0.5


def test_a_disabled_scaler_scales_nothing():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(enabled=False)])
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(0.5))
    assert model.weight.grad.item() == 0.5
    optimizer.step()
    assert not optimizer.step_was_skipped


# Several optimizers -----------------------------------------------------------------------------------------------------


def test_two_optimizers_step_with_one_scale():
    accelerator = half()
    (first, one), (second, two) = prepared(accelerator), prepared(accelerator)
    accelerator.backward(first(0.5) + second(INF))
    one.step()
    two.step()
    assert (first.weight.item(), second.weight.item()) == (0.5, 1.0)
    assert not one.step_was_skipped
    assert two.step_was_skipped
    assert accelerator.optimizer_step_was_skipped
    one.zero_grad()
    two.zero_grad()
    accelerator.backward(first(0.25) + second(0.5))
    assert accelerator.scaler.get_scale() == 4.0, "the overflow of one lowers the scale of both"
    one.step()
    two.step()
    assert (first.weight.item(), second.weight.item()) == (0.25, 0.5)


def test_an_overflow_of_the_first_does_not_change_the_size_of_the_seconds_step():
    accelerator = half()
    (first, one), (second, two) = prepared(accelerator), prepared(accelerator)
    accelerator.backward(first(INF) + second(0.5))
    one.step()
    assert accelerator.scaler.get_scale() == 8.0
    two.step()
    assert (first.weight.item(), second.weight.item()) == (1.0, 0.5)
    assert one.step_was_skipped
    assert not two.step_was_skipped


def test_an_optimizer_that_waits_a_round_is_not_lost():
    accelerator = half()
    (first, one), (second, two) = prepared(accelerator), prepared(accelerator)
    for _ in range(2):
        accelerator.backward(first(0.25))
        one.step()
        one.zero_grad()
    accelerator.backward(second(0.5))
    two.step()
    assert (first.weight.item(), second.weight.item()) == (0.5, 0.5)


# Clipping ---------------------------------------------------------------------------------------------------------------


def test_the_norm_is_clipped_at_the_true_size():
    accelerator = half()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(4.0))
    assert accelerator.clip_grad_norm_(model.parameters(), 0.5).item() == 4.0
    assert model.weight.grad.item() == pytest.approx(0.5, rel=1e-5)
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.5, rel=1e-5)


def test_gradients_are_unscaled_once_however_often_they_are_clipped():
    accelerator = half()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(4.0))
    accelerator.unscale_gradients()
    accelerator.unscale_gradients(optimizer)
    assert accelerator.clip_grad_norm_(model.parameters(), 100.0).item() == 4.0
    accelerator.clip_grad_value_(model.parameters(), 0.25)
    assert model.weight.grad.item() == 0.25
    optimizer.step()
    assert model.weight.item() == 0.75


def test_clipping_before_the_end_of_a_window_keeps_the_scale():
    accelerator = half(gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    with accelerator.accumulate(model):
        accelerator.backward(model(4.0))
        assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == 2.0
        assert model.weight.grad.item() == pytest.approx(8.0, rel=1e-5), "clipped to 1, and still scaled by 8"
        optimizer.step()
        optimizer.zero_grad()
    with accelerator.accumulate(model):
        accelerator.backward(model(4.0))
        assert accelerator.clip_grad_norm_(model.parameters(), 100.0).item() == pytest.approx(3.0, rel=1e-5)
        optimizer.step()
    assert model.weight.item() == pytest.approx(-2.0, rel=1e-5)


def test_clipping_values_before_the_end_of_a_window_keeps_the_scale():
    accelerator = half(gradient_accumulation_steps=2)
    model, _ = prepared(accelerator)
    with accelerator.accumulate(model):
        accelerator.backward(model(4.0))
        accelerator.clip_grad_value_(model.weight, 0.5)
    assert model.weight.grad.item() == 4.0


def test_clipping_without_a_scaler_clips_each_time():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _ = prepared(accelerator)
    found = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(4.0))
            found.append((accelerator.clip_grad_norm_(model.parameters(), 1.0).item(), accelerator.sync_gradients))
    assert found == [(2.0, False), (pytest.approx(3.0, rel=1e-5), True)]


def test_only_the_optimizers_of_the_clipped_parameters_are_unscaled():
    first, second = parameter(), parameter()
    one, two = torch.optim.SGD([first], lr=1.0), torch.optim.SGD([second], lr=1.0)
    assert clip.owners([first], [one, two]) == [one]
    assert clip.owners([first, second], [one, two]) == [one, two]
    assert clip.owners([parameter()], [one, two]) == []


def test_the_infinite_norm():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, -4.0, 2.0])
    assert clip.clip_norm([weight], 2.0, INF).item() == 4.0
    assert weight.grad.tolist() == pytest.approx([0.5, -2.0, 1.0], rel=1e-5)


# Without an Accelerator -------------------------------------------------------------------------------------------------


def test_an_optimizer_with_a_scaler_of_ones_own():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = parameter()
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=1.0), scaler=scaler)
    scaler.scale((weight * 0.5).sum()).backward()
    optimizer.step()
    assert weight.item() == 0.5
    assert not optimizer.step_was_skipped


def test_there_is_one_scaling_for_each_scaler_and_it_does_not_keep_it():
    scaler = torch.amp.GradScaler("cpu")
    scaling = LossScaling.of(scaler)
    assert LossScaling.of(scaler) is scaling
    assert LossScaling.of(torch.amp.GradScaler("cpu")) is not scaling
    assert scaling.scaler is scaler
    del scaler
    gc.collect()
    with pytest.raises(RuntimeError, match="The loss scaler was deleted"):
        scaling.scaler  # noqa: B018


def test_a_closure_is_refused_as_torchs_scaler_does():
    accelerator = half()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(0.5))
    with pytest.raises(RuntimeError, match="[Cc]losure"):
        optimizer.step(lambda: 1.0)
