"""Passes that are opened in the middle: what they draw, where they begin, and what they refuse."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from accelerate.core.errors import CheckpointError
from accelerate.data.prepare import prepare_data_loader
from accelerate.data.resume import skip_first_batches
from tests.support.data_tables import Counting


def prepare(loader: DataLoader[Any], **options: Any) -> Any:
    return prepare_data_loader(loader, **{"device": "cpu", "put_on_device": True, "rng_types": ["generator"]} | options)


def numbers(loader: Any) -> list[list[float]]:
    return [batch.tolist() for batch in loader]


def noise() -> float:
    return random.random() + float(np.random.rand()) + torch.rand(()).item()


class Noisy(Dataset[float]):
    """Draws for the samples that are listed, which are then never the same."""

    def __init__(self, drawing: Any) -> None:
        self.drawing = drawing

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        return index + noise() / 4 if index in self.drawing else float(index)


class NoisyStream(IterableDataset[float]):
    """Draws for each sample, and goes on from a state of its own, which it hands out as it is."""

    def __init__(self, size: int) -> None:
        self.size, self.state = size, {"next": 0}
        self.continues = False

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state, self.continues = dict(state), True

    def __iter__(self) -> Iterator[float]:
        if not self.continues:
            self.state["next"] = 0
        self.continues = False
        while self.state["next"] < self.size:
            self.state["next"] += 1
            yield self.state["next"] + noise() / 4


def train(loader: Any, save_at: int = 0) -> tuple[list[Any], Any]:
    """Loop, and draw in the loop as dropout does; return the batches and what was saved."""
    batches, saved = [], None
    for step, batch in enumerate(loader, start=1):
        torch.rand(3), random.random(), np.random.rand()
        batches.append(batch.tolist())
        if step == save_at:
            saved = loader.position_state()
    return batches, saved


# Random numbers of reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("drawing", [range(12), (0, 1, 9, 10)], ids=["always", "sometimes"])
def test_what_is_read_ahead_draws_the_same_again(drawing, workers):
    def loader() -> Any:
        return prepare(DataLoader(Noisy(drawing), batch_size=3, num_workers=workers), dispatch_batches=True)

    torch.manual_seed(3)
    whole, saved = train(loader(), save_at=1)
    torch.manual_seed(3)
    random.seed(9), np.random.seed(9), torch.rand(9)
    again = loader()
    again.load_position_state(saved)
    assert train(again)[0] == whole[1:]


def test_each_pass_of_a_stream_draws_other_numbers():
    loader = prepare(DataLoader(NoisyStream(6), generator=torch.Generator()))
    first, second = numbers(loader), numbers(loader)
    assert not set(sum(first, [])) & set(sum(second, []))


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_goes_on_from_its_own_state_with_the_numbers_it_would_have_drawn(count):
    """The state is taken every 16 batches; the last round is topped up with the first samples."""

    def loader() -> Any:
        dataset = NoisyStream(18 * 2 * count + 1)
        options = {"num_processes": count, "process_index": count - 1, "dispatch_batches": False}
        return prepare(DataLoader(dataset, batch_size=2), **options)

    torch.manual_seed(3)
    whole, saved = train(loader(), save_at=18)
    assert saved["place"]["snapshot"]["done"] == 16 * 2 * count
    assert saved["place"]["snapshot"]["dataset"] == {"next": 16 * 2 * count}
    torch.manual_seed(4)
    again = loader()
    again.load_position_state(saved)
    assert train(again)[0] == whole[18:]


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize(("stop", "at"), [(16, None), (18, None), (20, None), (47, None), (49, 96), (51, 96)])
def test_the_state_of_a_stream_of_whole_global_batches_is_taken_between_them(stop, at, dispatch):
    """With `drop_last` a global batch is read at once, so that inside of it the dataset is ahead of what it gave."""

    def loader() -> Any:
        dataset = NoisyStream(110)
        return prepare(
            DataLoader(dataset, batch_size=2, drop_last=True), global_batch_size=6, dispatch_batches=dispatch
        )

    torch.manual_seed(3)
    whole, saved = train(loader(), save_at=stop)
    assert len(whole) == 108 // 2
    torch.manual_seed(4)
    again = loader()
    again.load_position_state(saved)
    assert train(again)[0] == whole[stop:]
    assert (saved["place"]["snapshot"] or {"done": None})["done"] == at


def test_a_loader_made_later_draws_what_the_one_that_was_saved_would_have_drawn():
    torch.manual_seed(3)
    whole, saved = train(prepare(DataLoader(Noisy(range(12)), batch_size=3, num_workers=1)), save_at=2)
    for _ in range(2):
        again = prepare(DataLoader(Noisy(range(12)), batch_size=3, num_workers=1))
        again.load_position_state(saved)
        torch.manual_seed(3)
        assert train(again)[0] == whole[2:]


# Worker processes that stay ---------------------------------------------------------------------------------------


def lasting(size: int = 12) -> Any:
    return prepare(DataLoader(range(size), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True))


def test_workers_that_stay_are_seeded_once_as_in_a_plain_loop():
    torch.manual_seed(5)
    plain = DataLoader(range(12), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True)
    expected = [numbers(plain) for _ in range(3)]
    torch.manual_seed(5)
    loader = lasting()
    assert [numbers(loader) for _ in range(3)] == expected


@pytest.mark.parametrize("epoch", [0, 1])
def test_workers_that_stay_are_continued_by_the_process_that_saved(epoch):
    torch.manual_seed(5)
    loader = lasting()
    for _ in range(epoch):
        numbers(loader)
    whole, saved = train(loader, save_at=2)
    loader.load_position_state(saved)
    assert train(loader)[0] == whole[2:]


# Where a pass begins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("dataset", [range(12), Counting(12)], ids=["map", "stream"])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_an_explicit_skip_replaces_a_restored_place(dataset, dispatch, skipped):
    def loader() -> Any:
        return prepare(DataLoader(dataset, batch_size=2), dispatch_batches=dispatch)

    whole, saved = train(loader(), save_at=2)
    again = loader()
    again.load_position_state(saved)
    skipping = skip_first_batches(again, skipped)
    assert numbers(skipping) == whole[skipped:]
    assert numbers(again) == whole, "the next pass begins at its start"


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("seedable", [False, True])
def test_another_epoch_gives_a_restored_place_up(seedable, dispatch):
    """It begins at its start, in the order of the run that saved where that follows from a seed and the epoch."""

    def loader(seed: int) -> Any:
        torch.manual_seed(seed)
        loader = DataLoader(range(12), batch_size=3, shuffle=seedable)
        return prepare(loader, dispatch_batches=dispatch, use_seedable_sampler=seedable)

    before = loader(1)
    _, saved = train(before, save_at=2)
    for epoch in (1, 2):
        again = loader(2)
        again.load_position_state(saved)
        again.set_epoch(epoch)
        before.set_epoch(epoch)
        assert numbers(again) == numbers(before)
    again = loader(2)
    again.load_position_state(saved)
    again.set_epoch(0)
    assert len(numbers(again)) == 2, "in its own epoch it is kept"


@pytest.mark.parametrize("workers", [0, 1])
def test_whoever_else_reads_the_dataset_gets_plain_samples_from_its_start(workers):
    def loader(count: int) -> Any:
        options = {"num_processes": count, "process_index": 0, "dispatch_batches": False}
        return prepare(DataLoader(Counting(21), batch_size=2, num_workers=workers), **options)

    _, saved = train(loader(3), save_at=2)
    again = loader(2)  # other steps, so that the dataset is told where to start
    again.load_position_state(saved)
    batches = iter(again)
    next(batches)
    assert next(iter(again.dataset)) == 0
    list(batches)
    assert list(again.dataset) == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 0]


# What is refused --------------------------------------------------------------------------------------------------


class Batches(BatchSampler):
    """Batches that have no fixed size, as far as one can know."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index] for index in self.sampler])

    def __len__(self) -> int:
        return len(self.sampler)  # pyright: ignore[reportArgumentType]


def test_a_place_counted_in_samples_is_not_one_in_batches():
    _, saved = train(prepare(DataLoader(range(12), batch_size=3)), save_at=2)
    again = prepare(DataLoader(range(12), batch_sampler=Batches(SequentialSampler(range(12)), 1, False)))
    with pytest.raises(CheckpointError, match="has 12 batches to read, and had 12 samples"):
        again.load_position_state(saved)


def test_a_stream_over_other_workers_is_refused_inside_a_pass():
    def loader(workers: int) -> Any:
        return prepare(DataLoader(Counting(12), batch_size=3, num_workers=workers))

    for saved_with, loaded_with in ((0, 1), (1, 0), (1, 2)):
        _, saved = train(loader(saved_with), save_at=2)
        again = loader(loaded_with)
        again.load_position_state(saved)
        with pytest.raises(CheckpointError, match=f"num_workers={loaded_with}, and {saved_with} when it was saved"):
            numbers(again)
        again.load_position_state(saved)
        again.set_epoch(1)  # as the message advises
        assert len(numbers(again)) >= 4


class Shards(IterableDataset[int]):
    """Shares its samples out by itself."""

    shards_itself = True

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


def test_data_that_shares_itself_out_is_refused_on_another_number_of_ranks_inside_a_pass():
    def loader(count: int) -> Any:
        options = {"num_processes": count, "process_index": 0, "dispatch_batches": False}
        return prepare(DataLoader(Shards(), batch_size=3), **options)

    loader(3).load_position_state(loader(2).position_state())  # between passes it does not matter
    inside = loader(2)
    next(iter(inside))
    saved = inside.position_state()
    loader(2).load_position_state(saved)
    with pytest.raises(CheckpointError, match="among 3 processes here and 2 when it was saved"):
        loader(3).load_position_state(saved)


def nested_rows(samples: list[torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they are prototypes
        return torch.nested.nested_tensor([torch.arange(float(sample) + 1) for sample in samples])


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_stream_of_batches_that_nobody_can_look_into_goes_on_where_it_was(dispatch):
    loader, again = (
        prepare(DataLoader(Counting(8), batch_size=2, collate_fn=nested_rows), dispatch_batches=dispatch)
        for _ in range(2)
    )
    for count, _ in enumerate(loader, start=1):
        if count == 2:
            break
    again.load_position_state(loader.position_state())
    assert [[len(row) for row in batch.unbind()] for batch in again] == [[5, 6], [7, 8]]


@pytest.mark.parametrize("taken", [1, 4, 5, 7])
@pytest.mark.parametrize("sampler", ["a generator", "seedable"])
@pytest.mark.parametrize("workers_before", [0, 2])
def test_few_batches_that_workers_read_while_a_pass_is_opened(workers_before: int, sampler: str, taken: int) -> None:
    """The pass ends before it has begun, for the first time or, where as many read ahead, again."""

    def loader(workers: int) -> Any:
        generator = torch.Generator().manual_seed(3)
        plain = DataLoader(range(24), batch_size=3, shuffle=True, generator=generator, num_workers=workers)
        return prepare(plain, use_seedable_sampler=sampler == "seedable", data_seed=3)

    first = loader(workers_before)
    batches = iter(first)
    for _ in range(taken):
        next(batches)
    saved = first.position_state()
    rest = [batch.tolist() for batch in batches]
    second = loader(2)
    second.load_position_state(saved)
    assert numbers(second) == rest
    assert numbers(second) == numbers(first)
