"""A global batch size means the same steps on any number of ranks, whatever the data comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers load it: here, and not in each of the processes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState

from ..support.ranks import run_on_ranks

GLOBAL = 16


class Stream(IterableDataset[torch.Tensor]):
    """Numbers in order; worker processes take turns, so that each has a short batch of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (torch.tensor([float(number)]) for number in range(first, self.count, step))


class StatefulStream(Stream):
    """The same, and it can save where it is."""

    at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < self.count:
            self.at += 1
            yield torch.tensor([float(self.at - 1)])
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def run(loader: DataLoader[Any], folder: Path | None = None, save_after: int = 0, **options: Any) -> list[Any]:
    """Train for two passes; return for each optimizer step its samples, and the weight before and gradient in it."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    settings = DataLoaderConfiguration(global_batch_size=GLOBAL, **options)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6), loader)
    if folder is not None and not save_after:
        accelerator.load_state(folder)
    steps, samples = [], []
    for _ in range(loader.position.epoch, 2):  # pyright: ignore[reportAttributeAccessIssue]
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward((model(batch) - batch).square().mean())
                samples += accelerator.gather_for_metrics(batch).flatten().tolist()
                if accelerator.sync_gradients:
                    weight = next(iter(model.parameters()))
                    steps.append((sorted(samples), weight.item(), weight.grad.item()))  # pyright: ignore[reportOptionalMemberAccess]
                    samples = []
                optimizer.step()
                optimizer.zero_grad()
            if save_after and len(steps) == save_after and accelerator.sync_gradients:
                assert folder is not None
                accelerator.save_state(folder)
                return steps
    assert not samples, "the last window of a pass ends with it"
    return steps


def check(steps: list[Any]) -> list[list[float]]:
    """Check that each gradient is that of one batch of the step's samples; return the samples."""
    for samples, weight, gradient in steps:
        expected = sum(2 * (weight - 1) * number**2 for number in samples) / len(samples)
        assert gradient == pytest.approx(expected, rel=1e-5), samples
    return [samples for samples, *_ in steps]


def shuffled(count: int, batch_size: int = 4) -> list[Any]:
    return run(DataLoader(torch.arange(float(count)).reshape(-1, 1), batch_size=batch_size, shuffle=True))  # pyright: ignore[reportArgumentType]


def train_shuffled(folder: Path, save_after: int, batch_size: int = 4) -> list[Any]:
    rows: Any = torch.arange(62.0).reshape(-1, 1)
    return run(DataLoader(rows, batch_size=batch_size, shuffle=True), folder, save_after)


@pytest.mark.parametrize(("before", "after", "batch_size"), [(2, 1, 4), (1, 2, 4), (4, 2, 4), (1, 1, 8)])
def test_a_run_saved_between_windows_goes_on_in_whole_ones(
    before: int, after: int, batch_size: int, tmp_path: Path
) -> None:
    whole = check(run_on_ranks(shuffled, 1, 62)[0])
    begun = check(run_on_ranks(train_shuffled, before, tmp_path, 1)[0])
    assert begun + check(run_on_ranks(train_shuffled, after, tmp_path, 0, batch_size)[0]) == whole


def train_by_hand(folder: Path, steps: int, save: bool) -> list[bool]:
    """The same with accumulation that the user chose by the number of ranks."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model: Any = accelerator.prepare(nn.Linear(1, 1))
    if not save:
        accelerator.load_state(folder)
    synced = []
    for _ in range(steps):
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
            accelerator.backward(model(torch.ones(1, 1)).mean())
    if save:
        accelerator.save_state(folder)
    return synced


def test_windows_of_another_length_begin_anew_on_other_ranks(tmp_path: Path) -> None:
    assert run_on_ranks(train_by_hand, 2, tmp_path, 2, True) == [[False, True]] * 2
    assert run_on_ranks(train_by_hand, 1, tmp_path, 4, False) == [[False, False, False, True]]


CASES = [(6, False), (62, False), (62, True)]


def streams(workers: int, dispatch: bool) -> list[Any]:
    """Return the steps of each case: a number of samples, and `drop_last`."""
    return [
        run(
            DataLoader(Stream(count), batch_size=4, num_workers=workers, drop_last=drop_last), dispatch_batches=dispatch
        )
        for count, drop_last in CASES
    ]


@pytest.mark.parametrize(("workers", "dispatch"), [(0, False), (0, True), (2, True)])
def test_streams_take_the_same_steps_on_any_number_of_ranks(workers: int, dispatch: bool) -> None:
    # Of batches of 4, each worker process ends with a short one of its own.
    alone, *others = [run_on_ranks(streams, ranks, workers, dispatch)[0] for ranks in (1, 2, 4)]
    for place, (count, drop_last) in enumerate(CASES):
        steps = check(alone[place])
        assert [check(other[place]) for other in others] == [steps, steps], (count, drop_last)
        if drop_last:
            assert {len(samples) for samples in steps} == {GLOBAL}
        else:
            assert sorted(sum(steps, [])) == sorted([*range(count)] * 2)


def stateful(folder: Path, save_after: int, dispatch: bool) -> list[Any]:
    loader = DataLoader(StatefulStream(200), batch_size=2, drop_last=True)
    return run(loader, folder, save_after, dispatch_batches=dispatch)


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2)])
def test_a_stream_that_is_read_ahead_goes_on_where_the_loop_was(
    before: int, after: int, dispatch: bool, tmp_path: Path
) -> None:
    begun = check(run_on_ranks(stateful, before, tmp_path, 9, dispatch)[0])
    steps = begun + check(run_on_ranks(stateful, after, tmp_path, 0, dispatch)[0])
    assert steps == [[float(number) for number in range(at, at + 16)] for at in range(0, 192, 16)] * 2


# Data in shards -------------------------------------------------------------------------------------------------------


class Shards(Stream):
    """Two shards of different lengths that can be read apart."""

    num_shards = 2

    def __init__(self, count: int, shards: tuple[int, ...] = (0, 1)) -> None:
        super().__init__(count)
        self.shards = shards

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.count, self.shards[index::num_shards])

    def __iter__(self) -> Iterator[torch.Tensor]:
        parts = (range(self.count // 4), range(self.count // 4, self.count))
        return (torch.tensor([float(number)]) for shard in self.shards for number in parts[shard])


def shards(dispatch: bool | None) -> list[Any]:
    return run(DataLoader(Shards(40), batch_size=4), dispatch_batches=dispatch)


@pytest.mark.parametrize("dispatch", [None, False])
def test_data_in_shards_is_read_in_one_order_where_steps_are_to_be_the_same(dispatch: bool | None) -> None:
    alone, together = (check(run_on_ranks(shards, ranks, dispatch)[0]) for ranks in (1, 2))
    assert alone == together
    assert [len(samples) for samples in alone] == [16, 16, 8] * 2


class Own(Shards):
    shards_itself = True


def own_shares() -> str:
    with pytest.raises(ValueError, match="global_batch_size=16") as caught:
        run(DataLoader(Own(40), batch_size=4))
    return str(caught.value)


def test_data_that_knows_its_rank_is_refused_on_several_ranks() -> None:
    for text in run_on_ranks(own_shares, 2):
        assert "Own gives each its own (its attribute shards_itself is True)" in text
    steps = check(run(DataLoader(Own(40), batch_size=4)))
    assert [len(samples) for samples in steps] == [16, 16, 8] * 2, "alone it is like any other, to its short end"
