from __future__ import annotations

import gc
import logging
import random
import weakref

import numpy as np
import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import SettingError, WrongTypeError
from accelerate.runtime.memory import (
    clear_device_cache,
    find_executable_batch_size,
    release_memory,
    should_reduce_batch_size,
)
from accelerate.utils import DataLoaderConfiguration
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


def test_a_function_may_take_any_number_of_arguments():
    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size, *words):
        return batch_size, words

    assert train("one", "two") == (8, ("one", "two"))


def test_keywords_take_no_place_of_the_batch_size():
    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size, *, lr=1):
        return batch_size

    with pytest.raises(WrongTypeError, match="train was called with its batch size"):
        train(8)


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


def run_out():
    raise RuntimeError("CUDA out of memory. Tried a lot.\nA long table follows.")


def test_each_retry_is_told(caplog):
    @find_executable_batch_size(starting_batch_size=10)
    def train(batch_size):
        if batch_size > 8:
            run_out()

    with caplog.at_level(logging.WARNING):
        train()
    assert caplog.messages == [
        f"train: batch size {size} ran out of memory (RuntimeError: CUDA out of memory. Tried a lot.). "
        f"The next is {following}."
        for size, following in ((10, 9), (9, 8))
    ]


def test_a_failed_attempt_draws_no_random_numbers():
    drawn = []

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        if batch_size > 1:
            run_out()

    train()
    assert drawn[0] == drawn[1]
    assert random.random() != drawn[0][0]  # what ran stays drawn


def test_a_failed_attempt_leaves_accumulation_as_it_was():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    seen = []

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size):
        seen.append((accelerator.sync_gradients, accelerator.gradient_state.in_dataloader))
        loader = accelerator.prepare(torch.utils.data.DataLoader(range(8), batch_size=batch_size))
        for _ in loader:
            with accelerator.accumulate():
                if batch_size > 1:
                    run_out()

    train()
    assert seen == [(True, False)] * 2


def test_an_accelerator_forgets_what_a_failed_attempt_prepared():
    accelerator = Accelerator()
    models = []

    @find_executable_batch_size(starting_batch_size=2, accelerator=accelerator)
    def train(batch_size):
        assert all(model() is None for model in models)
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        models.append(weakref.ref(model))
        if batch_size > 1:
            run_out()
        return model

    assert train() is models[1]()


# Searching ----------------------------------------------------------------------------------------------------------


def test_a_probe_finds_the_size_before_the_function_runs(caplog):
    probed, ran = [], []

    def probe(batch_size, word):
        probed.append((batch_size, word, torch.rand(()).item()))
        if batch_size > 100:
            run_out()
        return batch_size

    @find_executable_batch_size(probe=probe)
    def train(batch_size, word):
        ran.append((batch_size, word, torch.rand(()).item()))
        return batch_size

    with caplog.at_level(logging.WARNING):
        assert train("z") == 100
    assert [size for size, _, _ in probed] == [128, 64, 96, 112, 104, 100]
    assert {item[1:] for item in probed} == {ran[0][1:]}, "a probe leaves no trace in the random states"
    assert [message[-16:] for message in caplog.messages] == [
        " The next is 64.",
        "The next is 104.",
        "The next is 100.",
    ]


def test_a_function_that_takes_more_than_its_probe_shrinks_further():
    ran = []

    @find_executable_batch_size(starting_batch_size=20, probe=lambda batch_size: None)
    def train(batch_size):
        ran.append(batch_size)
        if batch_size > 16:
            run_out()

    train()
    assert ran == [20, 18, 16]


def test_no_size_fits_a_probe():
    @find_executable_batch_size(starting_batch_size=2, probe=lambda batch_size: run_out())
    def train(batch_size):
        raise AssertionError("it has no size to run with")

    with pytest.raises(RuntimeError, match="reached zero"):
        train()


def test_the_global_batch_is_kept_while_the_function_runs():
    accelerator = Accelerator(gradient_accumulation_steps=3)
    tried = []

    def probe(batch_size):
        tried.append((batch_size, accelerator.gradient_accumulation_steps))
        if batch_size > 11:
            run_out()

    @find_executable_batch_size(starting_batch_size=32, accelerator=accelerator, keep_global_batch=True, probe=probe)
    def train(batch_size):
        tried.append((batch_size, accelerator.gradient_accumulation_steps))
        if batch_size > 7:
            run_out()

    train()
    assert tried == [(32, 3), (16, 6), (8, 12), (12, 8), (8, 12), (6, 16)]
    assert accelerator.gradient_accumulation_steps == 3
    tried.clear()
    train()
    assert tried[0] == (32, 3)


def test_options_that_contradict_each_other():
    with pytest.raises(SettingError, match="probe and reduce_batch_size_fn"):
        find_executable_batch_size(lambda size: None, probe=lambda size: None, reduce_batch_size_fn=lambda: 1)
    with pytest.raises(SettingError, match="keep_global_batch=True.* got no accelerator"):
        find_executable_batch_size(lambda size: None, keep_global_batch=True)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(global_batch_size=8))
    with pytest.raises(SettingError, match="global_batch_size=8.* both set accumulation"):
        find_executable_batch_size(lambda size: None, accelerator=accelerator, keep_global_batch=True)


# Giving memory back -------------------------------------------------------------------------------------------------


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
