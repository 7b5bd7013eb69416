"""The optimizer that `prepare` returns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.runtime.accumulation import GradientState


def sgd(lr=1.0, **options):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return parameter, torch.optim.SGD([parameter], lr=lr, **options)


@pytest.fixture
def pair():
    parameter, inner = sgd(momentum=0.5)
    parameter.grad = torch.ones(2)
    return parameter, inner, AcceleratedOptimizer(inner)


def test_it_is_an_optimizer_whose_parts_are_the_inner_ones(pair):
    _, inner, outer = pair
    assert isinstance(outer, torch.optim.Optimizer)
    assert outer.optimizer is inner
    assert outer.state is inner.state
    assert outer.param_groups is inner.param_groups
    assert outer.defaults is inner.defaults
    assert outer.state_dict() == inner.state_dict()
    assert repr(inner) in repr(outer)


def test_setting_a_part_sets_the_inner_one(pair):
    _, inner, outer = pair
    groups, state, defaults = inner.param_groups[:], {}, {"lr": 2.0}
    outer.param_groups, outer.state, outer.defaults = groups, state, defaults
    assert (inner.param_groups, inner.state, inner.defaults) == (groups, state, defaults)
    assert inner.param_groups is groups


def test_unknown_attributes_are_asked_of_the_inner_one(pair):
    _, inner, outer = pair
    inner.special = 5
    assert outer.special == 5
    with pytest.raises(AttributeError, match="nothing"):
        outer.nothing  # noqa: B018


def test_groups_can_be_added(pair):
    _, inner, outer = pair
    outer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 3.0})
    assert inner.param_groups[1]["lr"] == 3.0


def test_it_steps_and_clears_when_gradients_are_synchronised(pair):
    parameter, _, outer = pair
    outer.step()
    assert parameter.tolist() == [0.0, 1.0]
    assert outer.step_was_skipped is False
    outer.zero_grad()
    assert parameter.grad is None


def test_it_does_nothing_while_gradients_accumulate(pair):
    parameter, _, outer = pair
    GradientState()._set_sync_gradients(False)
    outer.step()
    outer.zero_grad()
    assert parameter.tolist() == [1.0, 2.0]
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("choice", "left"), [(None, None), (True, None), (False, [0.0, 0.0])])
def test_gradients_are_cleared_as_asked(pair, choice, left):
    parameter, _, outer = pair
    outer.zero_grad(set_to_none=choice)
    assert (parameter.grad if left is None else parameter.grad.tolist()) == left


def test_an_optimizer_that_clears_without_options():
    class Old(torch.optim.SGD):
        def zero_grad(self):
            self.cleared = True

    outer = AcceleratedOptimizer(Old([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    outer.zero_grad()
    assert outer.cleared
    with pytest.raises(TypeError, match="set_to_none"):
        outer.zero_grad(set_to_none=False)


def test_a_closure_is_passed_on(pair):
    parameter, _, outer = pair
    called = []

    def closure():
        called.append(True)
        return torch.tensor(1.0)

    outer.step(closure)
    assert called == [True]
    assert parameter.tolist() == [0.0, 1.0]


def test_an_optimizer_that_takes_no_closure():
    class Bare(torch.optim.SGD):
        def step(self):
            self.stepped = True

    outer = AcceleratedOptimizer(Bare([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    outer.step()
    assert outer.stepped


def test_training_and_evaluation_are_passed_on_where_the_inner_one_knows_them(pair):
    _, inner, outer = pair
    assert (outer.train(), outer.eval()) == (None, None)
    modes = []
    inner.train, inner.eval = lambda: modes.append("train"), lambda: modes.append("eval")
    outer.train()
    outer.eval()
    assert modes == ["train", "eval"]


def test_its_state_is_loaded_into_the_inner_one(pair):
    parameter, inner, outer = pair
    outer.step()
    saved = copy.deepcopy(outer.state_dict())
    outer.step()
    outer.load_state_dict(saved)
    assert inner.state[parameter]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_state_is_moved_to_the_runs_device():
    from accelerate import PartialState
    from accelerate.settings import env

    parameter = torch.nn.Parameter(torch.ones(2, device="meta"))
    inner = torch.optim.SGD([parameter], lr=1.0, momentum=0.5)
    inner.state[parameter] = {"momentum_buffer": torch.ones(2)}
    with env.applied({"ACCELERATE_TORCH_DEVICE": "meta"}):
        PartialState()
    AcceleratedOptimizer(inner, device_placement=False)
    assert inner.state[parameter]["momentum_buffer"].device.type == "cpu"
    AcceleratedOptimizer(inner)
    assert inner.state[parameter]["momentum_buffer"].device.type == "meta"


def test_it_can_be_pickled(pair):
    _, _, outer = pair
    again = pickle.loads(pickle.dumps(outer))
    assert again.param_groups[0]["lr"] == 1.0
    assert again.scaler is None
    assert again.gradient_state.__dict__ is GradientState._shared_state
    again.step()


def test_something_can_be_done_before_its_first_step_only(pair):
    _, _, outer = pair
    calls = []
    outer.before_first_step = lambda: calls.append("first")
    GradientState()._set_sync_gradients(False)
    outer.step()
    assert calls == []
    GradientState()._set_sync_gradients(True)
    outer.step()
    outer.step()
    assert calls == ["first"]


def test_a_scheduler_takes_it_for_an_optimizer(pair):
    _, inner, outer = pair
    scheduler = torch.optim.lr_scheduler.LambdaLR(outer, lambda step: 1 - step / 10)
    outer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.9
