"""When gradients are synchronised."""

from __future__ import annotations

import gc
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.accumulation import GradientState, plan_sync
from accelerate.settings.options.accumulation import GradientAccumulationPlugin
from tests.support.observed import OBSERVED, on

ROWS = OBSERVED["accumulation"]


def batches(row: str, processes: int) -> int:
    count = int(re.search(r"n=(\d+)", row).group(1))
    # A loader that was not prepared is read whole by each of two processes, with twice the data.
    return count * processes if "not prepared" in row else count


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_the_batches_that_synchronise(row, processes):
    steps = int(re.search(r"steps=(\d+)", row).group(1))
    ends = "sync_with_dataloader=False" not in row and "not prepared" not in row
    count, step, flags = batches(row, processes), 0, []
    for _ in range(2):
        for index in range(count):
            step, sync = plan_sync(step, steps, end_of_dataloader=ends and index == count - 1)
            flags.append(int(sync))
        flags.append("|")
    assert flags == on(processes, ROWS[row])["sync"]


@pytest.mark.parametrize(
    ("step", "steps", "end", "result"),
    [
        (0, 1, False, (1, True)),
        (0, 2, False, (1, False)),
        (1, 2, False, (2, True)),
        (2, 3, False, (3, True)),
        (3, 3, False, (4, False)),
        (0, 3, True, (0, True)),
        (2, 3, True, (0, True)),
    ],
)
def test_one_decision(step, steps, end, result):
    assert plan_sync(step, steps, end_of_dataloader=end) == result


@given(st.integers(1, 8), st.integers(1, 40))
def test_every_window_is_as_long_as_asked_and_the_last_one_ends(steps, count):
    step, flags = 0, []
    for index in range(count):
        step, sync = plan_sync(step, steps, end_of_dataloader=index == count - 1)
        flags.append(sync)
    ends = [index + 1 for index, sync in enumerate(flags) if sync]
    assert ends == sorted({*range(steps, count + 1, steps), count})
    assert step == 0


class Loader:
    def __init__(self, end=False, remainder=-1):
        self.end_of_dataloader = end
        self.remainder = remainder


class Planned(Loader):
    class global_batch:
        accumulation = 6

    def batches_ahead(self):
        return 2


def test_all_instances_share_one_state():
    first, second = GradientState(), GradientState()
    first._set_sync_gradients(False)
    assert second.sync_gradients is False
    assert first.__dict__ is second.__dict__ is GradientState._shared_state


def test_the_state_of_a_new_process():
    assert GradientState._shared_state == {}
    state = GradientState()
    assert state.initialized
    assert (state.sync_gradients, state.num_steps, state.remainder) == (True, 1, -1)
    assert (state.sync_with_dataloader, state.sync_each_batch, state.adjust_scheduler) == (True, False, False)
    assert (state.in_dataloader, state.end_of_dataloader, state.active_dataloader) == (False, False, None)
    assert state.dataloader_references == [None]
    assert state.is_xla_gradients_synced is False


def test_a_plugin_says_how_many_and_another_one_replaces_it():
    state = GradientState(GradientAccumulationPlugin(num_steps=3, sync_each_batch=True, sync_with_dataloader=False))
    assert (state.num_steps, state.sync_each_batch, state.sync_with_dataloader) == (3, True, False)
    assert state.plugin_kwargs == {"num_steps": 3, "sync_each_batch": True, "sync_with_dataloader": False}
    GradientState(GradientAccumulationPlugin(num_steps=2))
    assert (state.num_steps, state.sync_each_batch, state.sync_with_dataloader) == (2, False, True)


def test_resetting_empties_the_shared_dictionary_in_place():
    state = GradientState(GradientAccumulationPlugin(num_steps=3))
    GradientState._reset_state()
    assert GradientState._shared_state == {}
    assert not state.initialized
    assert GradientState().num_steps == 1


def test_flags_follow_the_innermost_loader():
    state = GradientState()
    outer, inner = Loader(end=True, remainder=3), Loader(end=False, remainder=0)
    state._add_dataloader(outer)
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (True, True, 3)
    state._add_dataloader(inner)
    assert (state.active_dataloader, state.end_of_dataloader, state.remainder) == (inner, False, 0)
    assert state.dataloader_references == [None, outer, inner]
    state._remove_dataloader(inner)
    assert (state.active_dataloader, state.remainder) == (outer, 3)
    state._remove_dataloader(outer)
    assert not state.in_dataloader


def test_a_loader_with_a_global_batch_size_says_how_many_batches_a_window_has():
    state = GradientState(GradientAccumulationPlugin(num_steps=3))
    loader = Planned()
    state._add_dataloader(loader)
    assert (state.num_steps, state.plugin_kwargs["num_steps"]) == (6, 3)
    other = Loader()
    state._add_dataloader(other)
    assert state.num_steps == 3
    state._remove_dataloader(other)
    assert state.num_steps == 6
    state._remove_dataloader(loader)
    assert state.num_steps == 3


def test_what_the_innermost_loader_knows_of_the_batches_to_come():
    state = GradientState()
    assert state.batches_ahead is None
    loader, other = Planned(), Loader()  # the other one is a client's, which knows nothing of this
    state._add_dataloader(loader)
    assert state.batches_ahead == 2
    state._add_dataloader(other)
    assert state.batches_ahead is None


def test_loaders_may_be_left_in_any_order():
    state = GradientState()
    outer, inner = Loader(), Loader()
    state._add_dataloader(outer)
    state._add_dataloader(inner)
    state._remove_dataloader(outer)
    assert state.dataloader_references == [None, inner]


def test_the_same_loader_twice_is_left_once_each_time():
    state = GradientState()
    loader = Loader()
    state._add_dataloader(loader)
    state._add_dataloader(loader)
    state._remove_dataloader(loader)
    assert state.dataloader_references == [None, loader]


def test_the_innermost_of_the_same_loader_is_left_first():
    state = GradientState()
    loader, between = Loader(), Loader()
    for item in (loader, between, loader):
        state._add_dataloader(item)
    state._remove_dataloader(loader)
    assert state.dataloader_references == [None, loader, between]


def test_leaving_a_loader_that_was_never_entered_does_nothing():
    state = GradientState()
    loader = Loader()
    state._add_dataloader(loader)
    state._remove_dataloader(Loader())
    assert state.dataloader_references == [None, loader]


def test_an_abandoned_loader_is_not_kept_alive():
    state = GradientState()
    loader = Loader(end=True)
    state._add_dataloader(loader)
    del loader
    gc.collect()
    assert state.active_dataloader is None
    assert not state.end_of_dataloader


def test_references_can_be_set():
    state = GradientState()
    loader = Loader(remainder=5)
    state.dataloader_references = [None, loader]
    assert state.remainder == 5


def test_the_printed_state():
    state = GradientState(GradientAccumulationPlugin(num_steps=2))
    assert repr(state).splitlines() == [
        "Sync Gradients: True",
        "At end of current dataloader: False",
        "Extra samples added: -1",
        "Gradient accumulation plugin: {'num_steps': 2}",
    ]
