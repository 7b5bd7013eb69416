"""What is kept of samplers and datasets, and where a loader says that it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from accelerate.core.errors import CheckpointError
from accelerate.data.loader import DataLoaderShard
from accelerate.data.position import Place, capture, plain_values, put_back
from accelerate.data.prepare import prepare_data_loader
from tests.support.data_tables import Counting


def prepare(loader: DataLoader[Any], **options: Any) -> DataLoaderShard:
    return prepare_data_loader(loader, **{"device": "cpu", "put_on_device": True, "rng_types": ["generator"]} | options)


def numbers(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


class Shuffling(Sampler[int]):
    """Shuffles with whatever it is given."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        order = list(range(12))
        if isinstance(self.draw, torch.Generator):
            order = torch.randperm(12, generator=self.draw).tolist()
        else:
            self.draw.shuffle(order)
        yield from order


GENERATORS = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": np.random.default_rng,
    "old numpy": np.random.RandomState,
    "python": random.Random,
}


class Counted(Sampler[int]):
    """Its order follows from a number that it counts up itself."""

    def __init__(self) -> None:
        self.passes, self.step = 0, 5

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from np.random.RandomState(self.passes).permutation(12).tolist()


class Saving(Sampler[int]):
    """Its order follows from what only its own state tells."""

    def __init__(self) -> None:
        self.seeds = iter(range(100))
        self.seed = [0]

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        order = np.random.RandomState(self.seed[0]).permutation(12).tolist()
        self.seed = [self.seed[0] + 1]
        yield from order

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = [state["seed"]]


@pytest.mark.parametrize(
    "make",
    [*(lambda seed, kind=kind: Shuffling(GENERATORS[kind](seed)) for kind in GENERATORS), lambda _: Counted(),
     lambda _: Saving()],
    ids=[*GENERATORS, "counting", "own state"],
)  # fmt: skip
@pytest.mark.parametrize("done", [0, 2, 4])
def test_a_sampler_goes_on_from_what_it_drew_from(make, done):
    loader = prepare(DataLoader(range(12), batch_size=3, sampler=make(1)))
    numbers(loader)
    saved, rest = loader.position_state(), []
    for step, batch in enumerate(loader, start=1):
        if step > done:
            rest.append(batch.tolist())
        elif step == done:
            saved = loader.position_state()
    rest += numbers(loader)
    again = prepare(DataLoader(range(12), batch_size=3, sampler=make(2)))
    again.load_position_state(saved)
    assert numbers(again) + (numbers(again) if done < 4 else []) == rest


def test_only_numbers_that_changed_are_kept_besides_those_that_may_be_set_otherwise():
    sampler = Counted()
    sampler.epoch = 0  # pyright: ignore[reportAttributeAccessIssue]
    before = [plain_values(sampler)]
    assert capture([sampler], before)[0]["values"] == {"epoch": 0}
    list(sampler)
    assert capture([sampler], before)[0]["values"] == {"epoch": 0, "passes": 1}


def test_a_sampler_without_a_generator_goes_on_without_and_with_one_goes_on_with_it():
    alone, on_ranks = RandomSampler(range(9)), RandomSampler(range(9), generator=torch.Generator().manual_seed(4))
    states = capture([alone]), capture([on_ranks])
    put_back([on_ranks], states[0])
    assert on_ranks.generator is None
    put_back([alone], states[1])
    assert alone.generator is not None
    assert torch.equal(alone.generator.get_state(), torch.Generator().manual_seed(4).get_state())


def test_other_samplers_than_those_saved_are_refused():
    saved = capture([Saving()])
    with pytest.raises(CheckpointError, match="2 samplers above each other, and 1 when"):
        put_back([SequentialSampler(range(3)), BatchSampler(range(3), 2, False)], saved)
    with pytest.raises(CheckpointError, match=r"SequentialSampler has no load_state_dict\(\)"):
        put_back([SequentialSampler(range(3))], saved)


class Placed(Counting):
    """Says where it is."""

    place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_where_a_dataset_was_left_is_not_where_its_next_pass_begins():
    dataset = Placed(6)
    dataset.place = 4
    assert "own" not in capture([dataset])[0]


def test_a_place_comes_back_from_its_state():
    loader = prepare(DataLoader(range(12), batch_size=3, shuffle=True))
    next(iter(loader))
    state = loader.position_state()["place"]
    assert Place.from_state(state).to_state() == state
    assert state["check"]["rows"] == 3
