"""Gradients that wait: multiplied, left out, taken along."""

from __future__ import annotations

import pytest
import torch

from accelerate.core.errors import CheckpointError
from accelerate.stepping.gradients import left_out, pack, put_back, rescale, unpack


def parameter(value, gradient=None):
    made = torch.nn.Parameter(torch.tensor(value))
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)])
def test_gradients_are_multiplied_in_place(factor):
    one, two, none = parameter([1.0, 2.0], [4.0, 6.0]), parameter([3.0], [8.0]), parameter([1.0])
    held = one.grad
    rescale([one, none, two], factor)
    assert one.grad is held
    assert (one.grad.tolist(), two.grad.tolist(), none.grad) == ([2.0, 3.0], [4.0], None)
    rescale([none], factor)
    rescale([], factor)


def test_half_precision_is_multiplied_by_the_factor_as_it_is():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    weight.grad = torch.full((1,), 252.0, dtype=torch.bfloat16)
    rescale([weight], 1.003)  # 252.756, which rounds to 253; in bfloat16 the factor would be 1
    assert weight.grad.item() == 253.0


def test_a_loss_can_be_left_out_whatever_it_is():
    used, before, frozen = parameter([1.0]), parameter([2.0], [5.0]), parameter([3.0]).requires_grad_(False)
    loss = (used * before * frozen).sum() / torch.zeros(())
    with left_out([used, before, frozen]):
        (loss * 0).backward()
    assert (used.grad.tolist(), before.grad.tolist(), frozen.grad) == ([0.0], [5.0], None)
    (used * before).sum().backward()
    assert (used.grad.tolist(), before.grad.tolist()) == ([2.0], [6.0])


def sparse():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 3, 3])).sum().backward()
    return embedding.weight


def test_gradients_come_back_as_they_were():
    dense, thin = parameter([[1.0, 2.0]], [[3.0, 4.0]]), sparse()
    assert torch.equal(unpack(pack(dense.grad)), dense.grad)
    back = unpack(pack(thin.grad))
    assert back.is_sparse
    assert torch.equal(back.to_dense(), thin.grad.to_dense())


def test_sparse_gradients_are_multiplied_too():
    weight = sparse()
    rescale([weight], 2.0)
    assert weight.grad.to_dense().tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [4.0, 4.0]]


def test_gradients_are_put_back_by_name():
    one, two = parameter([0.0, 0.0]), parameter([0.0])
    put_back({"one": one, "two": two}, {"one": torch.tensor([1.0, 2.0])}, "model 0")
    assert (one.grad.tolist(), two.grad) == ([1.0, 2.0], None)


@pytest.mark.parametrize("named", [{}, {"one": torch.nn.Parameter(torch.zeros(3))}])
def test_gradients_that_fit_nothing_are_an_error(named):
    with pytest.raises(CheckpointError, match="holds a gradient of shape .2,. for parameter 'one' of model 0"):
        put_back(named, {"one": torch.zeros(2)}, "model 0")
