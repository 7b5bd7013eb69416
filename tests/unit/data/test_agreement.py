"""What agreement between ranks is made of; the exchange itself is tested on real ranks in `tests/ranks`."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate.data.agreement import Agreement, Measured, TopUp


def collate(samples: list[Any]) -> list[Any]:
    return list(samples)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([1, 2, 3], Measured([1, 2, 3], 3, 3)),
        ([1, 2], Measured([1, 2, 1], 3, 2)),
        ([1], Measured([1, 1, 1], 3, 1)),
        ([1, 2, 3, 4], Measured([1, 2, 3, 4], 4, 4)),
    ],
)
def test_short_batches_are_topped_up_before_they_are_collated(samples: list[int], expected: Measured) -> None:
    assert TopUp(collate, 3)(samples) == expected


def test_topping_up_twice_is_topping_up_once() -> None:
    assert TopUp(TopUp(collate, 2), 4)([1]) == Measured([1, 1, 1, 1], 4, 1)


def test_topping_up_travels_to_worker_processes() -> None:
    again = pickle.loads(pickle.dumps(TopUp(collate, 2)))
    assert again([7]) == Measured([7, 7], 2, 1)
    loader = DataLoader(list(range(3)), batch_size=2, num_workers=1, collate_fn=again)  # pyright: ignore[reportArgumentType]
    assert list(loader) == [Measured([0, 1], 2, 2), Measured([2, 2], 2, 1)]


def test_topping_up_leaves_the_samples_as_they_are() -> None:
    samples = [1]
    TopUp(collate, 3)(samples)
    assert samples == [1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_process_agrees_with_itself(count: int) -> None:
    batches = [torch.tensor([place]) for place in range(count)]
    found = list(Agreement().walk(batches))
    assert [batch.item() for batch, _, _ in found] == list(range(count))
    assert [padding for _, padding, _ in found] == [None] * count
    assert [last for _, _, last in found] == [False] * (count - 1) + [True] * bool(count)


def test_one_process_may_leave_and_settle() -> None:
    agreement = Agreement()
    for _ in agreement.walk([Measured("text", 1, 1)] * 3):
        break
    assert not agreement.left
    agreement.settle()
    assert [batch for batch, _, _ in agreement.walk([Measured("text", 1, 1)])] == ["text"]
