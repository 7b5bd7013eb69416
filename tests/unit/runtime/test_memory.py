from __future__ import annotations

import gc
import weakref

import pytest
import torch

from accelerate.core.errors import WrongTypeError
from accelerate.runtime.memory import (
    clear_device_cache,
    find_executable_batch_size,
    release_memory,
    should_reduce_batch_size,
)
from tests.support.observed import OBSERVED

SEEN = OBSERVED["find_executable_batch_size"]


@pytest.fixture(autouse=True)
def quick_collection():
    """Let the collector look at the test's own objects only; it runs before each attempt."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_batch_sizes_are_tried_as_in_the_peer():
    tried = []

    @find_executable_batch_size(starting_batch_size=64)
    def train(batch_size, word):
        tried.append(batch_size)
        if batch_size > 20:
            raise RuntimeError("CUDA out of memory.")
        return [batch_size, word]

    assert [train("z"), tried] == SEEN["febs"]


def test_the_next_size_can_be_ones_own():
    tried = []

    @find_executable_batch_size(starting_batch_size=64, reduce_batch_size_fn=lambda: 10)
    def train(batch_size):
        tried.append(batch_size)
        if batch_size > 20:
            raise RuntimeError("CUDA out of memory.")
        return batch_size

    assert [train(), tried] == SEEN["febs reduce fn"]


def test_a_plain_decorator_starts_at_128_and_keeps_the_name():
    @find_executable_batch_size
    def train(batch_size):
        """Doc."""
        return batch_size

    assert train() == 128
    assert (train.__name__, train.__doc__) == ("train", "Doc.")


def test_each_call_starts_anew():
    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size, fits):
        if batch_size > fits:
            raise torch.OutOfMemoryError("x")
        return batch_size

    assert train(1) == 1
    assert train(100) == 8


def test_nothing_fits():
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size):
        raise RuntimeError("out of memory.")

    assert SEEN["febs zero"] == "RuntimeError"
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        train()


def test_other_errors_are_the_callers():
    @find_executable_batch_size
    def train(batch_size):
        raise ValueError("boom")

    assert SEEN["febs other error"] == "ValueError"
    with pytest.raises(ValueError, match="boom"):
        train()


def test_the_size_is_passed_by_the_decorator_only():
    @find_executable_batch_size
    def train(batch_size, model, steps):
        return batch_size

    assert SEEN["febs called with bs"] == "TypeError"
    with pytest.raises(WrongTypeError) as caught:
        train(64, "model", 3)
    assert "train was called with its batch size, which the decorator passes." in str(caught.value)
    assert "Call it without: train(model='model', steps=3)" in str(caught.value)


def test_memory_of_a_failed_attempt_is_given_back_before_the_next():
    held = []

    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size):
        assert all(item() is None for item in held), "a failed attempt is still in memory"
        tensor = torch.zeros(batch_size)
        held.append(weakref.ref(tensor))
        if batch_size > 2:
            raise RuntimeError("out of memory.")
        return batch_size

    assert train() == 2


def test_released_objects_are_gone_once_nobody_holds_them():
    class Thing:
        pass

    first, second = Thing(), Thing()
    seen = weakref.ref(first)
    first, second = release_memory(first, second)
    assert (first, second) == (None, None)
    gc.collect()
    assert seen() is None
    assert release_memory() == []


def test_garbage_is_collected_when_asked():
    class Cycle:
        pass

    item = Cycle()
    item.itself = item
    seen = weakref.ref(item)
    del item
    clear_device_cache(garbage_collection=True)
    assert seen() is None


def test_memory_errors_are_recognised():
    assert should_reduce_batch_size(RuntimeError("CUDA out of memory."))
    assert not should_reduce_batch_size(RuntimeError("boom"))
