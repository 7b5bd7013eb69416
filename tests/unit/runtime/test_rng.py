"""Random generators."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from accelerate import PartialState
from accelerate.core.enums import RNGType
from accelerate.core.errors import SettingError
from accelerate.runtime import rng, state
from accelerate.topology import Process
from tests.support.ranks import run_on_ranks


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_a_seed_repeats_all_generators():
    rng.set_seed(5)
    first = draw()
    assert draw() != first
    rng.set_seed(5)
    assert draw() == first
    rng.set_seed(6)
    assert draw() != first


def test_a_seed_of_its_own_for_each_rank(monkeypatch):
    rng.set_seed(5 + 3)
    expected = draw()
    PartialState()
    monkeypatch.setitem(state.SHARED, "_runtime", replace(state.current(), process=Process(rank=3, world_size=4)))
    rng.set_seed(5, device_specific=True)
    assert draw() == expected


def test_deterministic_algorithms_are_chosen_when_asked():
    rng.set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()
    rng.set_seed(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


def test_the_devices_generators_are_seeded_too(monkeypatch):
    seeded = []
    PartialState()
    monkeypatch.setattr(type(state.current().hardware), "manual_seed_all", lambda self, seed: seeded.append(seed))
    rng.set_seed(9)
    assert seeded == [9]


def test_one_process_has_nothing_to_synchronise():
    before = torch.get_rng_state()
    rng.synchronize_rng_states(["torch", "generator", "cuda"])
    rng.synchronize_rng_state(None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", ["zz", "TORCH", ""])
def test_an_unknown_generator_is_refused_even_alone(value):
    with pytest.raises(SettingError, match="names no random generator") as caught:
        rng.synchronize_rng_states(["torch", value])
    assert repr(value) in str(caught.value)
    assert "'torch', 'cuda'" in str(caught.value)


@pytest.mark.parametrize("value", ["torch", RNGType.TORCH])
def test_generators_are_named_by_value_or_member(value):
    assert rng.check_rng_type(value) is RNGType.TORCH


def drawn_after_synchronising() -> dict:
    import torch

    from accelerate import PartialState
    from accelerate.core.errors import SettingError
    from accelerate.utils import set_seed, synchronize_rng_states

    rank = PartialState().process_index
    set_seed(1, device_specific=True)
    apart = torch.rand(1).item()
    synchronize_rng_states(["torch"])
    together = torch.rand(1).item()
    generator = torch.Generator().manual_seed(10 + rank)
    synchronize_rng_states(["generator"], generator)
    try:
        synchronize_rng_states(["generator"])
    except SettingError as error:
        message = str(error)
    return {"apart": apart, "together": together, "generator": generator.initial_seed(), "error": message,
            "drawn": torch.rand(1, generator=generator).item()}  # fmt: skip


def test_two_ranks_draw_the_same_after_synchronising():
    first, second = run_on_ranks(drawn_after_synchronising, 2)
    assert first["apart"] != second["apart"]
    assert first["together"] == second["together"]
    assert first["drawn"] == second["drawn"] == torch.rand(1, generator=torch.Generator().manual_seed(10)).item()
    assert "no generator to synchronise" in first["error"]
