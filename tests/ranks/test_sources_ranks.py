"""Loaders whose ranks run out at different times end together, give each sample once, and never hang."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data.agreement import Agreement, AgreementError, TopUp
from accelerate.data.sources import SourceKind, plan_source
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object

from ..support.ranks import run_on_ranks

Seen = list[tuple[list[int], tuple[int, ...] | None, tuple[int, ...] | None, bool]]


def collate(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples)


def batches_of(samples: list[int], size: int) -> Iterator[Any]:
    top_up = TopUp(collate, size)
    for start in range(0, len(samples), size):
        yield top_up(samples[start : start + size])


def seen_by(agreement: Agreement, batches: Iterator[Any]) -> Seen:
    found = []
    for batch, padding, last in agreement.walk(batches):
        rows, real = (None, None) if padding is None else (padding.rows, padding.real)
        found.append((batch.tolist(), rows, real, last))
        batch.fill_(-1)  # what a loop does to its batches must not come back
    return found


def real_samples(per_rank: list[Seen]) -> list[int]:
    """Return the samples that the paddings call real, after checking that all ranks tell the same."""
    assert len({len(seen) for seen in per_rank}) == 1, "all ranks take the same number of steps"
    found = []
    for step in zip(*per_rank, strict=True):
        assert len({(rows, real, last) for _, rows, real, last in step}) == 1
        _, rows, real, _ = step[0]
        for rank, (batch, *_) in enumerate(step):
            if rows is not None:
                assert len(batch) == rows[rank]
            found += batch if real is None else batch[: real[rank]]
    assert [step[3] for step in per_rank[0]] == [False] * (len(per_rank[0]) - 1) + [True] * bool(per_rank[0])
    return found


LENGTHS = [0, 1, 2, 3, 5]


def grid(drop_last: bool) -> list[Seen]:
    rank, ranks = PartialState().process_index, PartialState().num_processes
    found = []
    for size, lengths in itertools.product((1, 2), itertools.product(LENGTHS, repeat=ranks)):
        start = 100 * rank
        samples = list(range(start, start + lengths[rank]))
        if drop_last:
            samples = samples[: len(samples) // size * size]
        found.append(seen_by(Agreement(drop_last=drop_last), batches_of(samples, size)))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ragged_ranks_end_together_and_give_each_sample_once(ranks: int) -> None:
    cases = itertools.product((1, 2), itertools.product(LENGTHS, repeat=ranks))
    for (size, lengths), *per_rank in zip(cases, *run_on_ranks(grid, ranks, False), strict=True):
        expected = [100 * rank + place for rank, length in enumerate(lengths) for place in range(length)]
        assert sorted(real_samples(per_rank)) == expected, (size, lengths)
        assert len(per_rank[0]) == -(-max(lengths) // size)
        assert all(-1 not in batch for seen in per_rank for batch, *_ in seen)
        assert {len(batch) for seen in per_rank for batch, *_ in seen} <= {size}


@pytest.mark.parametrize("ranks", [2, 3])
def test_drop_last_stops_all_ranks_with_the_first(ranks: int) -> None:
    cases = itertools.product((1, 2), itertools.product(LENGTHS, repeat=ranks))
    for (size, lengths), *per_rank in zip(cases, *run_on_ranks(grid, ranks, True), strict=True):
        steps = min(lengths) // size
        assert all(rows is None for seen in per_rank for _, rows, _, _ in seen), "nothing is padding"
        expected = [100 * rank + place for rank in range(ranks) for place in range(steps * size)]
        assert sorted(real_samples(per_rank)) == expected, (size, lengths)


# Datasets in shards ----------------------------------------------------------------------------------------------------


class Shards(IterableDataset[int]):
    """Ragged shards, by the protocol: shards and workers share them out, `num_shards` says how many there are."""

    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.shards[index::num_shards])

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        mine = self.shards if info is None else self.shards[info.id :: info.num_workers]
        return itertools.chain.from_iterable(mine)


class Own(Shards):
    """The same, already this rank's: any number of shards over any number of ranks."""

    shards_itself = True


def ragged(count: int) -> list[list[int]]:
    samples = itertools.count()
    return [list(itertools.islice(samples, 1 + 3 * place % 5)) for place in range(count)]


def read_shards(num_shards: int, workers: int, size: int, itself: bool) -> tuple[str, Seen]:
    state = PartialState()
    rank, ranks = state.process_index, state.num_processes
    whole = Shards(ragged(num_shards))
    dataset = Own(whole.shards[rank::ranks]) if itself else whole
    source = plan_source(dataset, rank, ranks)
    assert source.ragged
    loader = DataLoader(source.dataset, batch_size=size, num_workers=workers, collate_fn=TopUp(collate, size))
    return source.kind.value, seen_by(Agreement(), iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_ragged_shards_over_ranks_and_workers(workers: int) -> None:
    # 6 shards divide by 3 ranks; 7 do not, and each rank got its own of them elsewhere.
    for num_shards, itself in ((6, False), (7, True)):
        per_rank = run_on_ranks(read_shards, 3, num_shards, workers, 4, itself)
        assert {kind for kind, _ in per_rank} == {(SourceKind.ALREADY if itself else SourceKind.SPLIT).value}
        samples = sorted(real_samples([seen for _, seen in per_rank]))
        assert samples == list(range(sum(map(len, ragged(num_shards)))))


def padded_together(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


def ragged_samples() -> list[tuple[list[int], tuple[int, ...], Any]]:
    rank = PartialState().process_index
    # 5 samples of different lengths on 2 ranks: 3 and 2, in batches of 2.
    samples = [torch.ones(place + 1) for place in range(rank, 5, 2)]
    loader = DataLoader(samples, batch_size=2, collate_fn=TopUp(padded_together, 2))  # pyright: ignore[reportArgumentType]
    return [
        (batch.sum(1).int().tolist(), tuple(batch.shape), padding and padding.real)
        for batch, padding, _ in Agreement().walk(loader)
    ]


def test_five_ragged_samples_on_two_ranks() -> None:
    first, second = run_on_ranks(ragged_samples, 2)
    # Nothing is concatenated: each batch keeps its own width, and the last ones are topped up to the same rows.
    assert first == [([1, 3], (2, 3), None), ([5, 5], (2, 5), (1, 0))]
    assert second == [([2, 4], (2, 4), None), ([2, 4], (2, 4), (1, 0))]


def uncounted() -> Seen:
    rank = PartialState().process_index
    batches = [torch.arange(3), torch.arange(2)] if rank else [torch.arange(1)]
    return seen_by(Agreement(), iter(batches))


def test_batches_that_the_dataset_made_keep_their_sizes() -> None:
    first, second = run_on_ranks(uncounted, 2)
    assert first == [([0], (1, 3), (1, 3), False), ([0], (1, 2), (0, 2), True)]
    assert second == [([0, 1, 2], (1, 3), (1, 3), False), ([0, 1], (1, 2), (0, 2), True)]


def shared_by_ranks() -> Seen:
    # Ranks 0 and 1 read the same data shard, as ranks of one tensor-parallel group do.
    shard = (0, 0, 1)[PartialState().process_index]
    return seen_by(Agreement(shard_of=(0, 0, 1)), batches_of([shard, shard + 10][: 2 - shard], 1))


def test_padding_counts_data_shards_and_not_ranks() -> None:
    first, second, third = run_on_ranks(shared_by_ranks, 3)
    assert first == second == [([0], None, None, False), ([10], (1, 1), (1, 0), True)]
    assert third == [([1], None, None, False), ([1], (1, 1), (1, 0), True)]


# Prepared ------------------------------------------------------------------------------------------------------------


class Shuffled(Shards):
    """Shuffled by a generator of its own, which it keeps where Hugging Face's streams do."""

    def __init__(self, shards: list[list[int]], generator: np.random.Generator) -> None:
        super().__init__(shards)
        self.generator = generator
        self._ex_iterable = SimpleNamespace(generator=generator)

    def shard(self, num_shards: int, index: int) -> Shuffled:
        order = copy.deepcopy(self.generator).permutation(len(self.shards))
        return Shuffled([self.shards[place] for place in order[index::num_shards]], self.generator)

    def __iter__(self) -> Iterator[int]:
        samples = list(itertools.chain.from_iterable(self.shards))
        return (samples[place] for place in copy.deepcopy(self.generator).permutation(len(samples)).tolist())


def shuffled(seed: int | None, dispatch: bool | None) -> tuple[str, list[int]]:
    dataset = Shuffled([[10 * shard + place for place in range(4)] for shard in range(6)], np.random.default_rng(seed))
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loader: Any = accelerator.prepare(DataLoader(dataset, batch_size=2))
    found = [sample for batch in loader for sample in batch.tolist()]
    return type(loader).__name__, gather_object(found)


def refused_shuffle() -> str:
    with pytest.raises(ValueError, match="shuffled by other seeds") as caught:
        shuffled(None, False)
    return str(caught.value)


def test_shards_are_read_apart_only_where_all_ranks_shuffle_alike() -> None:
    for seed, kind in ((3, "DataLoaderShard"), (None, "DataLoaderDispatcher")):
        for name, samples in run_on_ranks(shuffled, 2, seed, None):
            assert name == kind
            assert sorted(samples) == [10 * shard + place for shard in range(6) for place in range(4)]
    for text in run_on_ranks(refused_shuffle, 2):
        assert text.startswith("Shuffled (of the loader) is shuffled by other seeds on each process")


def split_at_the_source(size: int, itself: bool) -> list[int]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    samples = [list(range(8)), list(range(8, 16))]
    dataset = Own([samples[accelerator.process_index]]) if itself else Shards(samples)
    loader: Any = accelerator.prepare(DataLoader(dataset, batch_size=size))
    return [len(batch) for batch in loader]


def refused_splits(itself: bool) -> list[str]:
    found = []
    for size in (5, 1):
        with pytest.raises(ValueError, match=f"batch_size={size} .* does not divide by 2") as caught:
            split_at_the_source(size, itself)
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize("itself", [False, True])
def test_batches_that_cannot_be_split_are_refused_at_the_source_too(itself: bool) -> None:
    assert run_on_ranks(split_at_the_source, 2, 4, itself) == [[2, 2, 2, 2]] * 2
    assert all(len(texts) == 2 for texts in run_on_ranks(refused_splits, 2, itself))


# Failures --------------------------------------------------------------------------------------------------------------


def failing(at: int) -> tuple[list[int], str, str]:
    rank = PartialState().process_index

    def source() -> Iterator[torch.Tensor]:
        for place in range(5):
            if rank == 1 and place == at:
                raise OSError("shard 7 is torn")
            yield torch.tensor([place])

    seen: list[int] = []
    started = time.monotonic()
    agreement = Agreement()
    with pytest.raises(AgreementError) as caught:
        for batch, _, _ in agreement.walk(source()):
            seen.append(batch.item())
    assert time.monotonic() - started < 10
    # The next pass is a fresh one.
    assert len(list(agreement.walk([batch] if rank else []))) == 1 if at else True
    return seen, str(caught.value), repr(caught.value.__cause__)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_on_one_rank_is_raised_on_all_at_the_same_step(at: int) -> None:
    results = run_on_ranks(failing, 3, at, timeout=30)
    assert [seen for seen, _, _ in results] == [list(range(at))] * 3
    for _, text, _ in results:
        assert text.startswith("Rank 1 could not read the next batch; all ranks stop at this step.")
        assert "[rank 1] Traceback" in text
        assert "OSError: shard 7 is torn" in text
    assert [cause for _, _, cause in results] == ["None", "OSError('shard 7 is torn')", "None"]


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("has a lock")


def cannot_lend() -> str:
    rank = PartialState().process_index
    with pytest.raises(AgreementError) as caught:
        list(Agreement().walk([] if rank == 0 else [Unsendable()]))
    return str(caught.value)


def test_a_rank_without_data_whose_copy_cannot_be_sent_is_named_on_all_ranks() -> None:
    for text in run_on_ranks(cannot_lend, 2, timeout=30):
        assert text.startswith("Rank 0 got no batch at all")
        assert "has a lock" in text
        assert "drop_last=True" in text


# Leaving early ---------------------------------------------------------------------------------------------------------


def all_leave() -> list[int]:
    agreement, steps = Agreement(), []
    for epoch in range(3):
        for place, _ in enumerate(agreement.walk([torch.tensor([place]) for place in range(4)])):
            if place == epoch:
                break
        steps.append(place)
    assert agreement.left
    agreement.settle()
    assert not agreement.left
    agreement.settle()  # nothing is open: no exchange, so ranks need not come together
    return steps


def test_all_ranks_may_leave_at_the_same_step() -> None:
    assert run_on_ranks(all_leave, 2, timeout=30) == [[0, 1, 2]] * 2


def left_in_the_last_step() -> bool:
    agreement = Agreement()
    for _, _, last in agreement.walk([torch.tensor([place]) for place in range(3)]):
        if last and PartialState().process_index == 0:
            break  # everybody knows that nothing follows
    return agreement.left


def test_leaving_in_the_last_step_leaves_nothing_open() -> None:
    assert run_on_ranks(left_in_the_last_step, 2, timeout=30) == [False, False]


def one_leaves(then: str) -> tuple[int, str]:
    rank = PartialState().process_index
    agreement, steps = Agreement(), 0
    batches = [torch.tensor([place]) for place in range(6)]
    with pytest.raises(AgreementError) as caught:
        for place, _ in enumerate(agreement.walk(batches)):
            if rank == 1 and place == 1:
                break
            steps += 1
        if then == "another pass":
            list(agreement.walk(batches))
        else:
            agreement.settle()
    return steps, str(caught.value)


@pytest.mark.parametrize("then", ["another pass", "another collective"])
def test_a_rank_that_leaves_alone_is_named_on_all_ranks(then: str) -> None:
    results = run_on_ranks(one_leaves, 3, then, timeout=30)
    assert [steps for steps, _ in results] == [2, 1, 2]
    for _, text in results:
        assert text.startswith("Rank 1 left the loop over a loader at another step than the others:")
        assert "rank 0 is in pass 1 after 2 steps, rank 1 left in pass 1 after 2 steps" in text


def one_ends() -> str:
    rank = PartialState().process_index
    try:
        for place, _ in enumerate(Agreement().walk([torch.tensor([place]) for place in range(6)])):
            if rank == 1 and place == 1:
                return "ended"  # and with it the process
    except RuntimeError as error:
        return type(error).__name__
    return "went on"


def test_a_rank_whose_process_ends_does_not_keep_the_others_waiting() -> None:
    started = time.monotonic()
    assert run_on_ranks(one_ends, 2, timeout=30) == ["RuntimeError", "ended"]
    assert time.monotonic() - started < 20
