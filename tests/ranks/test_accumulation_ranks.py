"""Accumulation is exact on any number of ranks: gradients at each optimizer step are those of one big batch.

Each reference is worked out by hand on one process, from the same samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch._dynamo  # optimizers load it: here, and not in each of the processes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator
from accelerate.checkpoint import layout, manifest
from accelerate.checkpoint.train_state import plan_state, read_state
from accelerate.core.errors import CheckpointError
from accelerate.data.global_batch import GlobalBatch
from accelerate.data.shards import Padding
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, GradientAccumulationPlugin

from ..support.ranks import run_on_ranks

RANKS = (1, 2, 4)
STEPS = 4
BATCHES = 7  # for each rank: a window of 4, and one of 3
RATE = 0.1

Gradients = list[torch.Tensor]


def fresh(**options: Any) -> Accelerator:
    """Return an Accelerator as the first of this process; the process group stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def size_of(rank: int, number: int) -> int:
    """Items in a batch: uneven, and none at all in some."""
    return (7 * rank + 3 * number + rank * number) % 6


def items(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(size_of(rank, number), 3, generator=generator)


def mean(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return a mean over the items, under a mask as losses of text have one; without items all its gradients are nan."""
    mask = torch.tensor([1.0] * len(rows) + [0.0])
    return (model(torch.cat([rows, torch.ones(1, 3)])).square().squeeze(-1) * mask).sum() / mask.sum()


def gradients(model: nn.Module) -> Gradients:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_hand(windows: list[list[list[torch.Tensor]]]) -> list[Gradients]:
    """Train on one process; each window is a mean of means: of batches, over the items in their parts."""
    model, found = network(), []
    for window in windows:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for batch in window:
            if any(len(part) for part in batch):
                (mean(model, torch.cat(batch)) / len(window)).backward()
        found.append(gradients(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad  # pyright: ignore[reportOperatorIssue]
    return found


def big_batches(world_size: int, lengths: tuple[int, ...] = (4, 3)) -> list[Gradients]:
    """Return the gradients with all items of each window, of all ranks, in one batch."""
    numbers = iter(range(BATCHES))
    windows = [[next(numbers) for _ in range(length)] for length in lengths]
    return by_hand([[[items(rank, n) for n in window for rank in range(world_size)]] for window in windows])


def worst(found: list[Gradients], expected: list[Gradients]) -> float:
    """Return the largest difference of any element."""
    assert len(found) == len(expected)
    return max(
        (one - other).abs().max().item()
        for step, by_hand in zip(found, expected, strict=True)
        for one, other in zip(step, by_hand, strict=True)
    )


def setup(model: nn.Module | None = None, **options: Any) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    accelerator = fresh(**options)
    model = model or network()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))


# Items ----------------------------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """One sample is a whole batch of items, dealt out to ranks in turn."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def __len__(self) -> int:
        return BATCHES * self.world_size

    def __getitem__(self, index: int) -> torch.Tensor:
        return items(index % self.world_size, index // self.world_size)


class Streamed(IterableDataset[torch.Tensor]):
    """The same, without a length."""

    def __init__(self, world_size: int) -> None:
        self.dataset = Batches(world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.dataset[index] for index in range(len(self.dataset)))


def first(samples: list[torch.Tensor]) -> torch.Tensor:
    return samples[0]


def windows_of_items(
    *, parts: int = 1, streamed: bool = False, as_tensor: bool = False, plugin: Any = None, **options: Any
) -> tuple[list[Gradients], list[int]]:
    """Train with `num_items`; return the gradients at each step, and the reductions of a number in each batch."""
    if plugin is None:
        options["gradient_accumulation_steps"] = STEPS
    accelerator, model, optimizer = setup(gradient_accumulation_plugin=plugin, **options)
    data = (Streamed if streamed else Batches)(accelerator.num_processes)
    loader = accelerator.prepare(DataLoader(data, batch_size=1, collate_fn=first))
    reductions = count_reductions(accelerator)
    found, counts = [], []
    for rows in loader:
        before = len(reductions)
        with accelerator.accumulate(model):
            for part in rows.tensor_split(parts):
                count = torch.tensor(len(part)) if as_tensor else len(part)
                accelerator.backward(mean(model, part), num_items=count)
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
        counts.append(len(reductions) - before)
    return found, counts


def count_reductions(accelerator: Accelerator) -> list[int]:
    collectives, seen = accelerator.state._runtime.collectives, list[int]()
    reduce = type(collectives).all_reduce

    def counting(tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        seen.append(tensor.numel())
        return reduce(collectives, tensor, mean)

    collectives.all_reduce = counting
    return seen


def items_in_all_ways() -> dict[str, tuple[list[Gradients], list[int]]]:
    return {
        "plain": windows_of_items(),
        "as tensors": windows_of_items(as_tensor=True),
        "two forwards": windows_of_items(parts=2),
        "synchronised each": windows_of_items(plugin=GradientAccumulationPlugin(num_steps=STEPS, sync_each_batch=True)),
        "bucket views": windows_of_items(kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]),
        "unused parameters": windows_of_items(
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        ),
        "streamed": windows_of_items(streamed=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False)),
    }


@pytest.mark.parametrize("world_size", RANKS)
def test_items_of_all_ranks_count_alike(world_size: int) -> None:
    expected = big_batches(world_size)
    assert any(size_of(rank, number) == 0 for rank in range(world_size) for number in range(BATCHES))
    for result in run_on_ranks(items_in_all_ways, world_size, timeout=120):
        for way, (found, _) in result.items():
            assert worst(found, expected) < 1e-6, way


def test_one_number_is_reduced_for_each_optimizer_step() -> None:
    for result in run_on_ranks(items_in_all_ways, 2, timeout=120):
        assert result["plain"][1] == [0, 0, 0, 1, 0, 0, 1]
        assert result["two forwards"][1] == [0, 0, 0, 2, 0, 0, 2]
        assert result["synchronised each"][1] == [1] * BATCHES


def items_without_regions() -> list[Gradients]:
    accelerator, model, optimizer = setup()
    found = []
    for number in range(BATCHES):
        rows = items(accelerator.process_index, number)
        accelerator.backward(mean(model, rows), num_items=len(rows))
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


def items_under_no_sync() -> list[Gradients]:
    """The flag is set by hand, and the region is `no_sync`."""
    accelerator, model, optimizer = setup()
    found = []
    for number in range(BATCHES):
        rows, last = items(accelerator.process_index, number), number in (3, 6)
        accelerator.gradient_state._set_sync_gradients(last)
        if last:
            accelerator.backward(mean(model, rows), num_items=len(rows))
            found.append(gradients(model))
        else:
            with accelerator.no_sync(model):
                accelerator.backward(mean(model, rows), num_items=len(rows))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("world_size", RANKS)
def test_items_count_alike_without_regions(world_size: int) -> None:
    for found in run_on_ranks(items_without_regions, world_size):
        assert worst(found, big_batches(world_size, (1,) * BATCHES)) < 1e-6
    for found in run_on_ranks(items_under_no_sync, world_size):
        assert worst(found, big_batches(world_size)) < 1e-6


# Batches --------------------------------------------------------------------------------------------------------------


def short_windows(streamed: bool) -> list[Gradients]:
    config = DataLoaderConfiguration(dispatch_batches=False)
    accelerator, model, optimizer = setup(gradient_accumulation_steps=STEPS, dataloader_config=config)
    rows = torch.randn(BATCHES * accelerator.num_processes * 2, 3, generator=torch.Generator().manual_seed(1))
    loader = accelerator.prepare(DataLoader(Rows(rows) if streamed else rows, batch_size=2))  # pyright: ignore[reportArgumentType]
    found = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, batch))
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


class Rows(IterableDataset[torch.Tensor]):
    """Rows without a length."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.rows)


def by_the_flag(begin: int, end: int, folder: Path) -> Gradients:
    """Take batches `begin` to `end` of a window of 4 without a region, as `one_window` does with one."""
    accelerator, model, _ = setup(gradient_accumulation_steps=STEPS)
    if begin:
        accelerator.load_state(folder)
    for number in range(begin, end):
        accelerator.sync_gradients = number == STEPS - 1
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            accelerator.backward(mean(model, noise(accelerator.process_index, number)))
    if not begin:
        accelerator.save_state(folder)
    return gradients(model)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_other_ranks_finish_a_window_without_regions(before: int, after: int, tmp_path: Path) -> None:
    run_on_ranks(by_the_flag, before, 0, 2, tmp_path / "state")
    halves = [
        [noise(rank, number) for number in numbers for rank in range(ranks)]
        for ranks, numbers in ((before, (0, 1)), (after, (2, 3)))
    ]
    each = [by_hand([[[rows] for rows in half]])[0] for half in halves]
    expected = [(one + other) / 2 for one, other in zip(*each, strict=True)]
    for found in run_on_ranks(by_the_flag, after, 2, STEPS, tmp_path / "state"):
        assert worst([found], [expected]) < 1e-6


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("streamed", [False, True], ids=["known", "streamed"])
def test_a_short_last_window_is_a_mean_over_its_batches(world_size: int, streamed: bool) -> None:
    batches = torch.randn(BATCHES * world_size * 2, 3, generator=torch.Generator().manual_seed(1)).split(2)
    full, short = batches[: 4 * world_size], batches[4 * world_size :]
    expected = by_hand([[[batch] for batch in window] for window in (full, short)])
    for found in run_on_ranks(short_windows, world_size, streamed):
        assert worst(found, expected) < 1e-6


# Global batches -------------------------------------------------------------------------------------------------------

GLOBAL = 16


class Shared:
    """Stands for a loader with a global batch size of 16: the same samples in each window, whatever the ranks."""

    def __init__(self, accelerator: Accelerator, count: int, begin: int = 0) -> None:
        self.state, self.shard_index = accelerator.gradient_state, accelerator.process_index
        ranks = accelerator.num_processes
        self.global_batch = GlobalBatch(GLOBAL, 2, GLOBAL // (2 * ranks), ranks)
        self.stride, self.begin_at = 2 * ranks, begin
        self.rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
        self.end_of_dataloader, self.padding = False, None
        self.left = 0

    def batches_ahead(self) -> int:
        return self.left

    def __iter__(self) -> Iterator[torch.Tensor]:
        steps = self.rows[self.begin_at :].split(self.stride)
        self.state._add_dataloader(self)
        for number, step in enumerate(steps, start=1):
            self.left = len(steps) - number
            self.end_of_dataloader = not self.left
            parts = step.tensor_split(self.global_batch.count)
            real = tuple(len(part) for part in parts)
            self.padding = None if set(real) == {2} else Padding(tuple(max(1, size) for size in real), real)
            own = parts[self.shard_index]
            yield own if len(own) else self.rows[:1]  # one that gets nothing works on a sample of others
        self.state._remove_dataloader(self)


def global_batches(count: int) -> list[Gradients]:
    accelerator, model, optimizer = setup()
    found = []
    for rows in Shared(accelerator, count):
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, rows))
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


def global_batches_of_items(count: int) -> list[Gradients]:
    """Samples are items: those of padding do not count, although they are given."""
    accelerator, model, _ = setup()
    for rows in Shared(accelerator, count):
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, rows), num_items=len(rows))
    return [gradients(model)]


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("count", [16, 27, 33, 31, 1, 3, 38])
def test_samples_of_a_global_batch_count_alike(world_size: int, count: int) -> None:
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
    expected = by_hand([[[window]] for window in rows.split(GLOBAL)])
    for found in run_on_ranks(global_batches, world_size, count):
        assert worst(found, expected) < 1e-6
    if count < GLOBAL:
        for found in run_on_ranks(global_batches_of_items, world_size, count):
            assert worst(found, expected) < 1e-6


def prepared_global_batches(count: int) -> list[Gradients]:
    """The same with a loader that `prepare` made, for two passes."""
    accelerator, model, optimizer = setup(dataloader_config=DataLoaderConfiguration(global_batch_size=GLOBAL))
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
    loader = accelerator.prepare(DataLoader(rows, batch_size=2))  # pyright: ignore[reportArgumentType]
    found = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, batch))
                if accelerator.sync_gradients:
                    found.append(gradients(model))
                optimizer.step()
                optimizer.zero_grad()
    return found


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("count", [27, 33, 31])
def test_prepared_loaders_keep_the_global_batch(world_size: int, count: int) -> None:
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
    expected = by_hand([[[window]] for window in rows.split(GLOBAL)] * 2)
    for found in run_on_ranks(prepared_global_batches, world_size, count):
        assert worst(found, expected) < 1e-6


def begun_global_batch(folder: Path, batches: int) -> None:
    accelerator, model, _ = setup()
    for number, rows in enumerate(Shared(accelerator, GLOBAL)):
        if number == batches:
            break
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, rows))
    accelerator.save_state(folder)


def finished_global_batch(folder: Path, begin: int, count: int) -> tuple[Gradients, list[str]]:
    accelerator, model, _ = setup()
    accelerator.load_state(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for rows in Shared(accelerator, count, begin):
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, rows))
            if accelerator.sync_gradients:
                break
    return gradients(model), [str(item.message) for item in told]


@pytest.mark.parametrize(
    ("before", "batches", "after", "begin", "end"),
    [(1, 2, 2, 4, 16), (1, 4, 4, 8, 16), (4, 1, 1, 8, 16), (1, 1, 2, 2, 18)],
)
def test_other_ranks_finish_a_global_batch(
    before: int, batches: int, after: int, begin: int, end: int, tmp_path: Path
) -> None:
    run_on_ranks(begun_global_batch, before, tmp_path / "state", batches)
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))[:end]
    expected = by_hand([[[rows]]])
    for rank, (found, told) in enumerate(run_on_ranks(finished_global_batch, after, tmp_path / "state", begin, 40)):
        assert worst([found], expected) < 1e-6
        if end == GLOBAL or rank:
            assert told == []
        else:
            assert "saved 2 samples into a global batch of 16" in told[0]
            assert "the first optimizer step takes 18 samples" in told[0]


def without_regions(count: int) -> list[Gradients] | str:
    """The plain loop over a loader with a global batch size."""
    accelerator, model, optimizer = setup()
    found = []
    for rows in Shared(accelerator, count):
        try:
            accelerator.backward(mean(model, rows))
        except ValueError as error:
            return str(error)
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("count", [16, 19, 30])
def test_a_plain_loop_keeps_a_global_batch_or_says_that_it_does_not(count: int) -> None:
    """Eight ranks take the 16 samples at once, two of them in four batches each."""
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
    for text in run_on_ranks(without_regions, 2, count):
        assert "4 batches of 2 on each of 2 processes. The optimizer would step after 1." in text
    for found in run_on_ranks(without_regions, 8, count):
        assert worst(found, by_hand([[[part]] for part in rows.split(GLOBAL)])) < 1e-6


# Several models -------------------------------------------------------------------------------------------------------


def noise(rank: int, number: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1000 * rank + number))


def real(rank: int, number: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(500 + 1000 * rank + number)) + 1


def generator_and_critic() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    return nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def critic_loss(critic: nn.Module, fake: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    scores = critic(torch.cat([fake, true]))
    return scores[: len(fake)].mean() - scores[len(fake) :].mean() + scores.square().mean()


GAN_BATCHES = 7


def adversaries() -> list[torch.Tensor]:
    """Train a generator in each batch and a critic in every third, and return the weights after each batch."""
    accelerator = fresh()
    rank = accelerator.process_index
    maker, critic = generator_and_critic()
    making, judging = (torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9) for model in (maker, critic))
    maker, critic, making, judging = accelerator.prepare(maker, critic, making, judging)
    judge = accelerator.unwrap_model(critic)
    found = []
    for number in range(GAN_BATCHES):
        with accelerator.accumulate(maker):
            judge.requires_grad_(False)
            accelerator.backward(-judge(maker(noise(rank, number))).mean())
            judge.requires_grad_(True)
            making.step()
            making.zero_grad()
        with accelerator.accumulate(critic, num_steps=3):
            with torch.no_grad():
                fake = maker(noise(rank, number))
            accelerator.backward(critic_loss(critic, fake, real(rank, number)))
            judging.step()
            judging.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in (*maker.parameters(), *critic.parameters())]))
    return found


def adversaries_by_hand(world_size: int) -> list[torch.Tensor]:
    maker, critic = generator_and_critic()
    making, judging = (torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9) for model in (maker, critic))
    found = []
    for number in range(GAN_BATCHES):
        making.zero_grad()
        held = [p.grad for p in critic.parameters()]
        for parameter in critic.parameters():
            parameter.grad = None
        (-critic(maker(torch.cat([noise(rank, number) for rank in range(world_size)]))).mean()).backward()
        for parameter, before in zip(critic.parameters(), held, strict=True):
            parameter.grad = before
        making.step()
        for rank in range(world_size):
            with torch.no_grad():
                fake = maker(noise(rank, number))
            (critic_loss(critic, fake, real(rank, number)) / (3 * world_size)).backward()
        if number % 3 == 2:
            judging.step()
            judging.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in (*maker.parameters(), *critic.parameters())]))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_models_step_in_windows_of_their_own(world_size: int) -> None:
    expected = adversaries_by_hand(world_size)
    for found in run_on_ranks(adversaries, world_size):
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


# Saving in the middle of a window -----------------------------------------------------------------------------------


def part_of_a_run(begin: int, end: int, folder: Path | None, with_items: bool, count: int = STEPS) -> Gradients:
    """Train from batch `begin` to `end`, from a checkpoint and into one where there is need; return the weights."""
    accelerator = fresh(gradient_accumulation_steps=count)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if begin:
        accelerator.load_state(folder)
    for number in range(begin, end):
        rows = items(accelerator.process_index, number) if with_items else noise(accelerator.process_index, number)
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, rows), **({"num_items": len(rows)} if with_items else {}))
            optimizer.step()
            optimizer.zero_grad()
    if folder is not None and not begin:
        accelerator.save_state(folder)
    assert accelerator.step == end
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("with_items", [False, True], ids=["batches", "items"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_stopped_inside_a_window_goes_on_as_if_it_had_not(
    world_size: int, with_items: bool, tmp_path: Path
) -> None:
    whole = run_on_ranks(part_of_a_run, world_size, 0, 8, None, with_items)
    for stop in (1, 2, 3, 4, 5):
        folder = tmp_path / str(stop)
        run_on_ranks(part_of_a_run, world_size, 0, stop, folder, with_items)
        assert (folder / "accumulation_rank0.json").exists() is (stop != 4)
        for rest, uninterrupted in zip(
            run_on_ranks(part_of_a_run, world_size, stop, 8, folder, with_items), whole, strict=True
        ):
            assert all(torch.equal(one, other) for one, other in zip(rest, uninterrupted, strict=True)), stop


def one_window(begin: int, end: int, folder: Path, with_items: bool) -> Gradients:
    """Take batches `begin` to `end` of a window of 4; save after the first part, return the gradients after the last."""
    accelerator, model, _ = setup(gradient_accumulation_steps=STEPS)
    if begin:
        accelerator.load_state(folder)
    for number in range(begin, end):
        rows = items(accelerator.process_index, number) if with_items else noise(accelerator.process_index, number)
        with accelerator.accumulate(model):
            accelerator.backward(mean(model, rows), **({"num_items": len(rows)} if with_items else {}))
    if not begin:
        accelerator.save_state(folder)
    return gradients(model)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("with_items", [False, True], ids=["batches", "items"])
def test_other_ranks_finish_a_window(before: int, after: int, with_items: bool, tmp_path: Path) -> None:
    begun, parts = 2, items if with_items else noise
    run_on_ranks(one_window, before, 0, begun, tmp_path / "state", with_items)
    seen = [parts(rank, number) for number in range(begun) for rank in range(before)]
    left = [parts(rank, number) for number in range(begun, STEPS) for rank in range(after)]
    if with_items:
        expected = by_hand([[[*seen, *left]]])[0]
    else:  # two batches of each rank then, two of each rank now: each of the four counts a quarter
        two, others = (by_hand([[[rows] for rows in half]])[0] for half in (seen, left))
        expected = [(one + other) / 2 for one, other in zip(two, others, strict=True)]
    for found in run_on_ranks(one_window, after, begun, STEPS, tmp_path / "state", with_items):
        assert worst([found], [expected]) < 1e-6


def saved_counters(folder: Path) -> None:
    accelerator = fresh(gradient_accumulation_steps=3)
    models = accelerator.prepare(network(), network(1))
    for number in range(5):
        with accelerator.accumulate(models[0]):
            accelerator.backward(mean(models[0], noise(0, number)))
        with accelerator.accumulate(models[1], num_steps=4):
            accelerator.backward(mean(models[1], noise(0, number)))
    accelerator.save_state(folder)


def loaded_counters(folder: Path) -> list[tuple[int, bool]]:
    accelerator = fresh(gradient_accumulation_steps=3)
    models = accelerator.prepare(network(), network(1))
    accelerator.load_state(folder)
    found = [(accelerator.step, accelerator.sync_gradients)]
    for _ in range(3):
        for model, options in zip(models, ({}, {"num_steps": 4}), strict=True):
            with accelerator.accumulate(model, **options):
                found.append((accelerator.step, accelerator.sync_gradients))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_counters_survive(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(saved_counters, world_size, tmp_path / "state")
    for found in run_on_ranks(loaded_counters, world_size, tmp_path / "state"):
        assert found == [
            (5, True),
            *((6, True), (6, False)),
            *((7, False), (7, False)),
            *((8, False), (8, True)),
        ]


def rolled_back(folder: Path) -> list[bool]:
    """Go back, in the same process, from the middle of a window to a checkpoint between two."""
    accelerator, model, _ = setup(gradient_accumulation_steps=2)
    accelerator.save_state(folder)
    with accelerator.accumulate(model):
        accelerator.backward(mean(model, noise(0, 0)))
    accelerator.load_state(folder)
    with accelerator.accumulate(model):
        return [accelerator.sync_gradients, all(parameter.grad is None for parameter in model.parameters())]


def test_going_back_drops_the_gradients_of_the_open_window(tmp_path: Path) -> None:
    assert run_on_ranks(rolled_back, 1, tmp_path / "state") == [[False, True]]


def without_gradients(folder: Path) -> str:
    accelerator, *_ = setup(gradient_accumulation_steps=STEPS)
    with pytest.raises(RuntimeError) as caught:
        accelerator.load_state(folder)
    return str(caught.value)


def evaluated_without_gradients(folder: Path) -> float:
    accelerator = fresh()
    model = accelerator.prepare(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optimizer that is left behind
        accelerator.load_state(folder)
    return float(sum(parameter.detach().double().sum() for parameter in model.parameters()))


def test_gradients_of_a_rank_that_are_missing_are_an_error(tmp_path: Path) -> None:
    run_on_ranks(one_window, 2, 0, 2, tmp_path / "state", False)
    folder = tmp_path / "state"
    found = manifest.read(folder)
    assert found is not None
    files = dict(found.files)
    for name in ("accumulation_rank1.json", "accumulation_rank1.safetensors"):
        (folder / name).unlink()
        del files[name]
    (folder / layout.MANIFEST_NAME).write_bytes(manifest.to_bytes(msgspec.structs.replace(found, files=files)))
    assert run_on_ranks(evaluated_without_gradients, 1, folder), "an evaluation has no use for them"
    (text,) = run_on_ranks(without_gradients, 1, tmp_path / "state")
    assert "was saved in the middle of a window of accumulation, and the gradients of rank 1 are not there" in text


# Learning rates -----------------------------------------------------------------------------------------------------


def rates(count: int, steps: int, units: str | None, make: Callable[[Any], Any]) -> dict[int, float]:
    """Return the rate after each optimizer step by the samples seen so far."""
    accelerator = fresh(gradient_accumulation_steps=steps, scheduler_units=units)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rows = torch.arange(count * 3.0).reshape(count, 3)
    loader = DataLoader(rows, batch_size=2)  # pyright: ignore[reportArgumentType]
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, make(optimizer), loader)
    found, seen = {}, 0
    for epoch in range(3):
        for number, batch in enumerate(loader, start=1):
            seen = min(epoch * count + number * 2 * accelerator.num_processes, (epoch + 1) * count)
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                found[seen] = scheduler.get_last_lr()[0]
    return found


def falling(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def rates_in_all_ways() -> dict[Any, dict[int, float]]:
    ways = [(count, steps, units) for count in (48, 44, 26) for steps in (1, 3) for units in (None, "samples")]
    return {way: rates(*way, falling) for way in ways}


def test_the_rate_is_the_same_function_of_the_samples_seen() -> None:
    alone, *others = (run_on_ranks(rates_in_all_ways, world_size, timeout=120)[0] for world_size in RANKS)
    for world_size, ways in zip(RANKS[1:], others, strict=True):
        for (count, steps, units), found in ways.items():
            reference = alone[count, steps, units]
            same = {seen: rate for seen, rate in reference.items() if seen in found}
            assert set(same) == set(found), "every step of several processes is one of a single process too"
            if units == "samples" or count % (2 * world_size * steps) == 0:
                assert found == same, (world_size, count, steps, units)
    # By whole global steps, the last batches that do not fill all ranks count as if they did.
    assert others[1][26, 1, None] != {s: r for s, r in alone[26, 1, None].items() if s in others[1][26, 1, None]}


def resized_gradients(folder: Path) -> str:
    """Let rank 1 find gradients of another shape than its parameters; return what a rank is told."""
    accelerator, *_ = setup(gradient_accumulation_steps=STEPS)
    if accelerator.process_index == 1:
        stem = layout.windows_stem(1)
        (window,) = read_state(folder, stem)
        ((owner, gradients),) = window["gradients"].items()
        name = next(iter(gradients))
        window["gradients"] = {owner: {**gradients, name: torch.zeros(3, 5, 7)}}
        for file in plan_state(stem, [window]):
            file.write(folder)
    accelerator.wait_for_everyone()
    with pytest.raises(CheckpointError) as caught:
        accelerator.load_state(folder, verify="off")
    return str(caught.value)


def test_gradients_that_do_not_fit_on_one_rank_are_an_error_on_all(tmp_path: Path) -> None:
    run_on_ranks(one_window, 2, 0, 2, tmp_path / "state", False)
    told = run_on_ranks(resized_gradients, 2, tmp_path / "state")
    assert "(3, 5, 7)" in told[1]
    assert "rank 1" in told[0] and "(3, 5, 7)" in told[0]
