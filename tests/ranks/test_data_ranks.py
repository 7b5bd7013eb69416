"""Prepared loaders on real processes: what each rank gets, and what the loop knows meanwhile."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from accelerate.data.dispatcher import DataLoaderDispatcher
from accelerate.data.iterables import IterableDatasetShard
from accelerate.data.loader import DataLoaderShard
from accelerate.data.prepare import get_sampler, prepare_data_loader
from accelerate.data.protocol import DispatchError
from accelerate.data.resume import skip_first_batches
from accelerate.data.samplers import BatchSamplerShard, SeedableRandomSampler
from accelerate.data.shards import Padding
from accelerate.data.streams import Snapshot, seed_globals
from accelerate.runtime import state
from accelerate.runtime.accumulation import GradientState
from accelerate.runtime.partial_state import PartialState
from tests.support.data_tables import TABLES, Counting, SizedCounting, expected_cell
from tests.support.ranks import run_on_ranks


def prepare(loader: DataLoader, **options: Any) -> Any:
    """Prepare as `Accelerator` does on a CPU."""
    state = PartialState(cpu=True)
    return prepare_data_loader(
        loader, **{"device": state.device, "put_on_device": True, "rng_types": ["generator"]} | options
    )


def numbers(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def _ask(question: Any) -> Any:
    try:
        return question()
    except TypeError as error:
        return type(error).__name__


def observe(cell: dict[str, Any]) -> dict[str, Any]:
    dataset = {"map": range, "iter": Counting, "iterlen": SizedCounting}[cell["kind"]](cell["n"])
    loader = prepare(
        DataLoader(dataset, batch_size=cell["bs"], drop_last=bool(cell["drop_last"])),
        split_batches=bool(cell["split"]),
        dispatch_batches=cell["dispatch"],
        even_batches=bool(cell["even"]),
    )
    state = GradientState()
    seen: dict[str, Any] = {
        "type": type(loader).__name__,
        "len": _ask(lambda: len(loader)),
        "total_batch_size": loader.total_batch_size,
        "total_dataset_length": _ask(lambda: loader.total_dataset_length),
        "rank_batches": [],
        "end_flags": [],
        "remainder": [],
    }
    for batch in loader:
        seen["rank_batches"].append(batch.tolist())
        seen["end_flags"].append(state.end_of_dataloader)
        seen["remainder"].append(state.remainder)
    seen["after_loop"] = [state.end_of_dataloader, state.remainder]
    return seen


def observe_all(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [observe(cell) for cell in cells]


@pytest.mark.parametrize(("table", "world_size"), [("prepared_2proc", 2), ("prepared_3proc", 3)])
def test_prepared_loaders_give_each_rank_what_the_table_says(table, world_size):
    keys = list(TABLES[table])
    cells = [expected_cell(table, key, P=world_size) for key in keys]
    by_rank = run_on_ranks(observe_all, world_size, [cell for cell, _ in cells])
    for place, key in enumerate(keys):
        expected = dict(cells[place][1])
        expected.pop("gather_for_metrics", None)
        ranks = [by_rank[rank][place] for rank in range(world_size)]
        got = ranks[0] | {"rank_batches": [seen["rank_batches"] for seen in ranks]}
        assert got == expected, key
        for seen in ranks[1:]:
            assert {k: v for k, v in seen.items() if k != "rank_batches"} == {
                k: v for k, v in ranks[0].items() if k != "rank_batches"
            }, key


def _two_epochs(loader: Any) -> list[list[list[int]]]:
    return [numbers(loader), numbers(loader)]


class Permuted(Sampler[int]):
    """Draws its order with numpy's global generator when a pass begins."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(self.size).tolist())


class Bag(Permuted):
    """Draws each index with Python's global generator when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.size))
        while left:
            yield left.pop(random.randrange(len(left)))


def shuffle_with_other_seeds() -> dict[str, Any]:
    """Ranks seed all generators differently, as after `set_seed(device_specific=True)`."""
    state = PartialState(cpu=True)
    found: dict[str, Any] = {}

    def shuffling(**options: Any) -> DataLoader:
        seed_globals(100 + state.process_index)
        return DataLoader(range(12), batch_size=3, **({"shuffle": True} | options))

    found["plain"] = _two_epochs(prepare(shuffling()))
    found["torch"] = _two_epochs(prepare(shuffling(), rng_types=["torch"]))
    found["seedable"] = _two_epochs(prepare(shuffling(), use_seedable_sampler=True))
    found["data_seed"] = _two_epochs(prepare(shuffling(), use_seedable_sampler=True, data_seed=5))
    found["generator"] = _two_epochs(prepare(shuffling(generator=torch.Generator().manual_seed(7))))
    found["dispatch"] = _two_epochs(prepare(shuffling(), dispatch_batches=True))
    weighted = WeightedRandomSampler([1.0] * 12, 12, replacement=False)
    found["weighted"] = _two_epochs(prepare(shuffling(shuffle=None, sampler=weighted)))
    found["numpy"] = _two_epochs(prepare(shuffling(shuffle=None, sampler=Permuted(12))))
    found["bag"] = _two_epochs(prepare(shuffling(shuffle=None, sampler=Bag(12))))
    given_later = prepare(shuffling())
    given_later.set_sampler(RandomSampler(range(12)))
    found["given later"] = _two_epochs(given_later)
    found["own numbers"] = [random.random(), float(np.random.rand()), torch.rand(()).item()]
    return found


def test_differently_seeded_ranks_read_disjoint_shares_in_every_epoch():
    ranks = run_on_ranks(shuffle_with_other_seeds, 2)
    own = [rank.pop("own numbers") for rank in ranks]
    assert not set(own[0]) & set(own[1]), "what is not the order stays each rank's own"
    for way in ranks[0]:
        epochs = [[sum(rank[way][epoch], []) for rank in ranks] for epoch in range(2)]
        for shares in epochs:
            assert sorted(shares[0] + shares[1]) == list(range(12)), way
        assert epochs[0] != epochs[1], way
    seed_5 = [TABLES["shuffle_skip_misc_2proc"]["ref_perm"][f"5+{epoch}"] for epoch in range(2)]
    for epoch, order in enumerate(seed_5):
        assert ranks[0]["data_seed"][epoch] == [order[0:3], order[6:9]]
        assert ranks[1]["data_seed"][epoch] == [order[3:6], order[9:12]]


class Drawing(Dataset):
    """Each sample is drawn."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([random.random(), float(np.random.rand()), torch.rand(()).item()], dtype=torch.float64)


class DrawingShards(IterableDataset):
    """Each sample is drawn, and each rank and worker has samples of its own."""

    shards_itself = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return map(Drawing().__getitem__, range(self.size))


def draw_with_equal_seeds(workers: int) -> list[float]:
    PartialState(cpu=True)
    seed_globals(6)
    loaders = [
        prepare(DataLoader(dataset, batch_size=2, num_workers=workers), dispatch_batches=False)
        for dataset in (Drawing(), Drawing(), DrawingShards(4))
    ]
    return [number for _ in range(2) for loader in loaders for batch in loader for number in batch.view(-1).tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_rank_worker_epoch_or_loader_draws_what_another_drew(workers):
    drawn = sum(run_on_ranks(draw_with_equal_seeds, 2, workers), [])
    # Each loader over 8 samples in 2 epochs, and two epochs of each rank's and worker's own 4.
    assert len(drawn) == 3 * 2 * (2 * 8 + 2 * max(1, workers) * 4)
    assert len(set(drawn)) == len(drawn)


def skip_ragged_shards() -> list[list[float]]:
    rank = PartialState(cpu=True).process_index
    seed_globals(6)
    loader = prepare(DataLoader(DrawingShards(4 + 4 * rank), batch_size=2), dispatch_batches=False)
    return [batch.view(-1).tolist() for batch in skip_first_batches(loader, 1)]


def test_ranks_that_skip_in_data_of_their_own_end_together_and_draw_apart():
    first, second = run_on_ranks(skip_ragged_shards, 2)
    assert len(first) == len(second) == 3
    assert not set(first[0]) & set(sum(second, []))


def go_on_with_synchronized_generators(dispatch: bool) -> tuple[list[float], list[float]]:
    rank = PartialState(cpu=True).process_index

    def loader() -> Any:
        return prepare(DataLoader(range(16), batch_size=2), rng_types=["torch"], dispatch_batches=dispatch)

    def draws(loader: Any) -> Iterator[float]:
        for _ in loader:
            yield torch.rand(1 + rank)[0].item()

    whole = loader()
    drawing = draws(whole)
    next(drawing), next(drawing)
    saved, generators = whole.position_state(), Snapshot()
    rest = list(drawing)
    again = loader()
    again.load_position_state(saved)
    generators.restore()
    return rest, list(draws(again))


@pytest.mark.parametrize("dispatch", [False, True])
def test_generators_that_were_equal_at_the_start_are_each_ranks_own_in_the_middle(dispatch):
    ranks = run_on_ranks(go_on_with_synchronized_generators, 2, dispatch)
    for rest, again in ranks:
        assert again == rest
    assert ranks[0][0] != ranks[1][0]


def go_on_dispatched(kind: Any) -> tuple[list[Any], list[Any]]:
    PartialState(cpu=True)

    def loader() -> Any:
        return prepare(DataLoader(kind(19), batch_size=3), dispatch_batches=True)

    whole, batches, saved = loader(), [], None
    for batch in whole:
        batches.append(batch.tolist())
        if len(batches) == 2:
            # What a checkpoint holds is what rank 0 says.
            saved = state.current_or_single().collectives.broadcast_object(whole.position_state())
    again = loader()
    again.load_position_state(saved)
    begins = again.position.step
    return batches[2:], [begins, *((batch.tolist(), again.position.step) for batch in again)]


@pytest.mark.parametrize("kind", [range, Counting])
def test_dispatched_batches_are_topped_up_with_the_first_samples_wherever_entered(kind):
    ranks = run_on_ranks(go_on_dispatched, 2, kind)
    assert [rest for rest, _ in ranks] == [[[12, 13, 14], [18]], [[15, 16, 17], [0]]]
    for rest, (begins, *again) in ranks:
        assert (begins, [batch for batch, _ in again]) == (2, rest)
        assert [step for _, step in again] == [3, 0], "each rank knows the place"


def place_after_five(dispatch: bool, drop_last: bool) -> dict[str, Any]:
    loader = prepare(DataLoader(range(24), batch_size=3, drop_last=drop_last), dispatch_batches=dispatch)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    return loader.position_state()


def counted_steps(saved: dict[str, Any], dispatch: bool, drop_last: bool) -> tuple[int, int, int]:
    PartialState(cpu=True)
    loader = prepare(DataLoader(range(24), batch_size=3, drop_last=drop_last), dispatch_batches=dispatch)
    loader.load_position_state(saved)
    return loader.position.step, len(numbers(loader)), len(loader)


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_that_are_done_and_those_that_are_left_make_an_epoch(drop_last, dispatch):
    (saved,) = run_on_ranks(place_after_five, 1, dispatch, drop_last)
    for done, left, whole in run_on_ranks(counted_steps, 2, saved, dispatch, drop_last):
        assert (done, left, whole) == ((3, 1, 4) if drop_last else (2, 2, 4))


def seedable_orders() -> dict[str, Any]:
    PartialState(cpu=True)
    found = {}
    for name, seed, epoch, data_seed in (
        ("seedable_seed1", 1, None, None),
        ("seedable_seed2", 2, None, None),
        ("seedable_seed1_epoch1", 1, 1, None),
        ("seedable_seed2_dataseed5", 2, None, 5),
    ):
        torch.manual_seed(seed)
        loader = prepare(
            DataLoader(range(12), batch_size=3, shuffle=True), use_seedable_sampler=True, data_seed=data_seed
        )
        if epoch is not None:
            loader.set_epoch(epoch)
        first = sum(numbers(loader), [])
        after_first = loader.iteration
        found[name] = [first, after_first, sum(numbers(loader), []), loader.iteration]
        assert isinstance(get_sampler(loader), SeedableRandomSampler)
    return found


def test_seedable_sampler_orders_by_seed_and_epoch():
    ranks = run_on_ranks(seedable_orders, 2)
    for name in ranks[0]:
        assert [rank[name] for rank in ranks] == TABLES["shuffle_skip_misc_2proc"][name], name


def skip_and_nest() -> dict[str, Any]:
    PartialState(cpu=True)
    table: dict[str, Any] = {}
    loader = prepare(DataLoader(range(12), batch_size=2))
    skipping = skip_first_batches(loader, 1)
    table["skip_prepared"] = {
        "type": type(skipping).__name__,
        "len": len(skipping),
        "orig_len": len(loader),
        "ep1": numbers(skipping),
        "ep2": numbers(skipping),
        "orig_after": numbers(loader),
    }
    table["skip0"] = {
        "same_object": skip_first_batches(loader, 0) is loader,
        "len": len(skip_first_batches(loader, 0)),
    }
    dispatching = skip_first_batches(prepare(DataLoader(Counting(14), batch_size=2)), 1)
    table["skip_dispatch"] = [type(dispatching).__name__, numbers(dispatching), numbers(dispatching)]
    by_batches = DataLoader(torch.arange(12), batch_size=None, sampler=BatchSampler(range(12), 3, False))
    loader = prepare(by_batches)
    table["sampler_is_batch_sampler"] = {
        "type": type(loader).__name__,
        "ep": numbers(loader),
        "len": len(loader),
        "sampler": type(loader.sampler).__name__,
    }
    table["items"] = numbers(prepare(DataLoader(torch.arange(10).view(5, 2), batch_size=None)))
    table["iterable items"] = numbers(
        prepare(DataLoader(TensorStream(torch.arange(10).view(5, 2)), batch_size=None), dispatch_batches=False)
    )
    return table


class TensorStream(IterableDataset):
    """The rows of a tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_skipping_and_samplers_of_batches():
    ranks = run_on_ranks(skip_and_nest, 2)
    observed = TABLES["shuffle_skip_misc_2proc"]
    for name in ("skip_prepared", "sampler_is_batch_sampler"):
        for field, value in observed[name].items():
            both = [rank[name][field] for rank in ranks]
            assert both == (value if isinstance(value, list) else [value, value]), (name, field)
    assert ranks[0]["skip0"] == observed["skip0"]
    # Steps of the loop are skipped, where single batches once were; topping up starts at the very first sample.
    assert ranks[0]["skip_dispatch"] == ["DataLoaderDispatcher", [[4, 5], [8, 9], [12]], [[4, 5], [8, 9], [12]]]
    assert ranks[1]["skip_dispatch"] == ["DataLoaderDispatcher", [[6, 7], [10, 11], [13]], [[6, 7], [10, 11], [13]]]
    for name in ("items", "iterable items"):
        assert [rank[name] for rank in ranks] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]]


class Failing(IterableDataset):
    """Five samples, then an error."""

    def __iter__(self) -> Any:
        yield from range(5)
        raise OSError("disk is gone")


class FailingAtOnce(IterableDataset):
    """An error in place of a first sample."""

    def __iter__(self) -> Any:
        raise OSError("no disk at all")


def read_failing() -> list[Any]:
    PartialState(cpu=True)
    found: list[Any] = []
    for dataset, words in ((Failing(), "disk is gone"), (FailingAtOnce(), "no disk at all")):
        got: list[Any] = []
        with pytest.raises(DispatchError, match=f"(?s)Rank 0 could not read.*OSError: {words}"):
            for batch in prepare(DataLoader(dataset, batch_size=1)):
                got.append(batch.tolist())
        found.append(got)
    # The ranks still meet afterwards, and state is clean for the next loop.
    found.append(numbers(prepare(DataLoader(Counting(4), batch_size=1))))
    return found


def test_error_while_reading_reaches_every_rank_at_the_same_step():
    ranks = run_on_ranks(read_failing, 2, timeout=30)
    assert ranks[0] == [[[0], [2]], [], [[0], [2]]]
    assert ranks[1] == [[[1], [3]], [], [[1], [3]]]


class Records(IterableDataset):
    """Dictionaries of everything that a batch may hold."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        for i in range(self.size):
            yield {
                "half": torch.full((3,), float(i), dtype=torch.bfloat16),
                "wide": (torch.tensor(i), torch.tensor([i > 2])),
                "name": f"n{i}",
                "double": torch.tensor(float(i), dtype=torch.float64),
            }


def collate_records(records: list[dict[str, Any]]) -> dict[str, Any]:
    batch = torch.utils.data.default_collate(records)
    return batch | {"raw": [{"id": record["name"]} for record in records], "scale": torch.tensor(2.5), "kind": "train"}


def read_records(split: bool) -> list[Any]:
    PartialState(cpu=True)
    loader = prepare(
        DataLoader(Records(7), batch_size=4 if split else 2, collate_fn=collate_records), split_batches=split
    )
    found = []
    for batch in loader:
        assert batch["half"].dtype is torch.bfloat16
        assert batch["half"].shape[1:] == (3,)
        assert batch["wide"][1].dtype is torch.bool
        assert batch["double"].dtype is torch.float64
        assert (batch["scale"].item(), batch["kind"]) == (2.5, "train")
        ids = batch["wide"][0].tolist()
        assert batch["half"][:, 0].tolist() == batch["double"].tolist() == ids
        assert batch["wide"][1].flatten().tolist() == [i > 2 for i in ids]
        assert list(batch["name"]) == [record["id"] for record in batch["raw"]] == [f"n{i}" for i in ids]
        batch["half"] += 1  # a rank owns what it got
        found.append(ids)
    return found


@pytest.mark.parametrize("split", [False, True])
def test_dispatched_batches_keep_structure_types_and_texts(split):
    ranks = run_on_ranks(read_records, 2, split)
    assert ranks == [[[0, 1], [4, 5]], [[2, 3], [6, 0]]]


def slice_by_columns(batch: Any, rows: slice, process_index: int, num_processes: int) -> Any:
    width = batch.shape[1] // num_processes
    return batch[:, process_index * width : (process_index + 1) * width + process_index]


def read_with_own_slices() -> list[Any]:
    PartialState(cpu=True)
    loader = prepare(
        DataLoader(torch.arange(20).view(4, 5), batch_size=4),
        dispatch_batches=True,
        split_batches=True,
        slice_fn_for_dispatch=slice_by_columns,
    )
    return numbers(loader)


def test_slice_fn_may_give_ranks_different_shapes():
    ranks = run_on_ranks(read_with_own_slices, 2)
    rows = torch.arange(20).view(4, 5)
    assert ranks == [[rows[:, :2].tolist()], [rows[:, 2:].tolist()]]


class Varying(IterableDataset):
    """Batches of sizes that nobody announced."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __iter__(self) -> Any:
        start = 0
        for size in self.sizes:
            yield torch.arange(start, start + size)
            start += size


class Mismatched(IterableDataset):
    """A batch whose tensors do not have the same number of rows."""

    def __iter__(self) -> Any:
        yield {"x": torch.zeros(4), "mask": torch.zeros(1, 4)}


def read_odd() -> dict[str, Any]:
    PartialState(cpu=True)
    found: dict[str, Any] = {"varying": numbers(prepare(DataLoader(Varying(2, 3, 1, 1, 4, 4, 1), batch_size=None)))}
    with pytest.raises(DispatchError, match="slice_fn_for_dispatch"):
        list(prepare(DataLoader(Mismatched(), batch_size=None)))
    with pytest.raises(DispatchError, match="no tensor with rows"):
        list(prepare(DataLoader(Counting(4), batch_size=2, collate_fn=str)))
    broken_off = prepare(DataLoader(Counting(8), batch_size=1))
    for batch in broken_off:
        break
    found["again"] = numbers(broken_off)
    found["active"] = GradientState().in_dataloader
    return found


def test_uneven_reads_lose_no_sample_and_bad_batches_are_refused_everywhere():
    ranks = run_on_ranks(read_odd, 2, timeout=30)
    steps = list(zip(ranks[0]["varying"], ranks[1]["varying"], strict=True))
    assert all(len(first) == len(second) for first, second in steps)
    assert {i for first, second in steps for i in first + second} == set(range(16))
    assert ranks[0]["varying"][0] == [0, 1, 2]  # 2 + 3 rows make 3 for each, the last one repeated from the start
    assert ranks[1]["varying"][0] == [3, 4, 0]
    assert [rank["again"] for rank in ranks] == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert not ranks[0]["active"]


def read_over_mesh() -> list[Any]:
    state = PartialState(cpu=True)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    found = []
    for dispatch in (False, True):
        loader = prepare(DataLoader(range(8), batch_size=2), dispatch_batches=dispatch, torch_device_mesh=mesh)
        found.append((len(loader), loader.total_batch_size, numbers(loader)))
    assert isinstance(loader, DataLoaderDispatcher)
    assert loader.submesh_tp.size() == 2
    assert loader.submesh_dp is None
    return [state.process_index, *found]


def test_ranks_of_one_tensor_parallel_group_read_the_same_batches():
    for rank, *found in run_on_ranks(read_over_mesh, 4):
        expected = [[0, 1], [4, 5]] if rank < 2 else [[2, 3], [6, 7]]
        assert found == [(2, 4, expected)] * 2


def resume_stateful() -> dict[str, Any]:
    state = PartialState(cpu=True)
    found: dict[str, Any] = {}
    for name, dispatch in (("shard", False), ("dispatch", True)):

        def make(dispatch: bool = dispatch) -> Any:
            return prepare(DataLoader(range(16), batch_size=2), dispatch_batches=dispatch, use_stateful_dataloader=True)

        loader = make()
        saved = None
        for step, _ in enumerate(loader):
            if step == 1:
                saved = loader.state_dict()
                break
        again = make()
        again.load_state_dict(saved)
        found[name] = [numbers(again), numbers(again)]
    return found | {"rank": state.process_index}


def test_stateful_loaders_continue_after_the_batches_the_loop_has_seen():
    pytest.importorskip("torchdata")
    for found in run_on_ranks(resume_stateful, 2):
        shift = 2 * found["rank"]
        whole = [[start + shift, start + shift + 1] for start in (0, 4, 8, 12)]
        assert found["shard"] == found["dispatch"] == [whole[2:], whole]


def inspect_prepared() -> list[Any]:
    state = PartialState(cpu=True)
    dataset = list(range(10))
    loader = prepare(DataLoader(dataset, batch_size=3, num_workers=0))
    assert isinstance(loader, DataLoaderShard)
    assert isinstance(loader.batch_sampler, BatchSamplerShard)
    assert loader.dataset is dataset
    assert loader.batch_size is None
    assert (loader.batch_sampler.batch_size, loader.batch_sampler.drop_last) == (3, False)
    assert prepare(loader) is loader
    # Trainer gives a sampler that shards by itself another place.
    loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
    whole = numbers(loader)
    sharded = prepare(DataLoader(Counting(5), batch_size=2), dispatch_batches=False)
    assert isinstance(sharded.dataset, IterableDatasetShard)
    return [state.process_index, whole]


def test_prepared_loader_has_the_attributes_clients_use():
    for _, whole in run_on_ranks(inspect_prepared, 2):
        assert whole == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]


def collate_in_defaultdict(samples: list[int]) -> Any:
    batch = defaultdict(list)
    batch["x"] = torch.ones(len(samples), 1000)
    batch["labels"] = torch.tensor(samples)
    batch["empty"] = batch["never filled"]
    return batch


def edit_labels_before_backward() -> list[Any]:
    PartialState(cpu=True)
    loader = prepare(DataLoader(Counting(8), batch_size=2, collate_fn=collate_in_defaultdict))
    weight = torch.ones(1000, requires_grad=True)
    found = []
    for batch in loader:
        loss = (batch["x"] * weight).sum()
        batch["labels"][:] = -100
        loss.backward()
        found.append((type(batch), batch["anything"], batch["labels"].untyped_storage().nbytes()))
    return found


def test_each_tensor_a_rank_gets_is_its_own():
    ranks = run_on_ranks(edit_labels_before_backward, 2, timeout=30)
    assert ranks == [[(defaultdict, [], 16)] * 2] * 2


class Widening(IterableDataset):
    """Batches padded to their own width, as dynamic padding makes them."""

    def __init__(self, *widths: int) -> None:
        self.widths = widths

    def __iter__(self) -> Any:
        return iter([torch.ones(2, width) for width in self.widths])


def read_widening() -> list[Any]:
    PartialState(cpu=True)
    found: list[Any] = [tuple(batch.shape) for batch in prepare(DataLoader(Widening(1, 2, 3, 4), batch_size=None))]
    loader = prepare(DataLoader(WideningLast(), batch_size=None))
    for batch in loader:
        found += [tuple(batch.shape), loader.padding]
    return found


class WideningLast(Widening):
    """The last step has to be topped up, and the pass began with rows of another width."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def __iter__(self) -> Any:
        yield from super().__iter__()
        yield torch.ones(3, 3)


def test_batches_of_different_widths_are_joined_only_where_they_must_be():
    ranks = run_on_ranks(read_widening, 2, timeout=30)
    last = [(2, 1), None, (2, 3), Padding((2, 2), (2, 1))]
    assert ranks == [[(2, 1), (2, 3), *last], [(2, 2), (2, 4), *last]]


def collate_unpicklable(samples: list[int]) -> Any:
    return {"x": torch.tensor(samples), "call": (lambda: 1) if 6 in samples else "none"}


def collate_unpackable(samples: list[int]) -> Any:
    return {"x": torch.tensor(samples), "y": torch.empty(len(samples), device="meta" if 6 in samples else "cpu")}


def fail_after_reading() -> list[Any]:
    PartialState(cpu=True)
    found: list[Any] = []
    for collate, words in ((collate_unpicklable, "pickle"), (collate_unpackable, "meta")):
        got: list[Any] = []
        with pytest.raises(DispatchError, match=f"(?s)Rank 0 could not read or send.*{words}"):
            for batch in prepare(DataLoader(range(12), batch_size=2, collate_fn=collate), dispatch_batches=True):
                got.append(batch["x"].tolist())
        found.append(got)
    found.append(numbers(prepare(DataLoader(Counting(4), batch_size=1))))
    return found


def test_a_batch_that_cannot_be_sent_is_refused_on_every_rank():
    ranks = run_on_ranks(fail_after_reading, 2, timeout=30)
    assert ranks == [[[[0, 1]], [[0, 1]], [[0], [2]]], [[[2, 3]], [[2, 3]], [[1], [3]]]]


def draw_after_the_first_batch() -> list[Any]:
    state = PartialState(cpu=True)
    found = []
    for shuffle in (False, True):
        torch.manual_seed(state.process_index)
        loader = prepare(
            DataLoader(range(8), batch_size=2, shuffle=shuffle), dispatch_batches=True, rng_types=["torch", "generator"]
        )
        next(iter(loader))
        found.append(torch.rand(1).item())
    return found


def test_dispatching_makes_the_named_generators_equal_too():
    ranks = run_on_ranks(draw_after_the_first_batch, 2, timeout=30)
    assert ranks[0] == ranks[1]


def leave_at(steps: tuple[int, int], sizes: tuple[int, ...]) -> Any:
    state = PartialState(cpu=True)
    loader = prepare(DataLoader(Varying(*sizes), batch_size=None))
    try:
        for step, _ in enumerate(loader, start=1):
            if step == steps[state.process_index]:
                break
        return numbers(loader)
    except RuntimeError as error:  # of the protocol; or of gloo, where the other rank has gone
        return str(error)


@pytest.mark.parametrize("sizes", [(1,) * 10, (1, 1, 2, 2, 3, 3, 4, 4)], ids=["same layout", "other layouts"])
def test_leaving_a_dispatched_loop_at_different_steps_is_noticed(sizes):
    first, second = run_on_ranks(leave_at, 2, (2, 2), sizes, timeout=30)
    assert sorted(sum(first + second, [])) == list(range(sum(sizes)))
    ahead = run_on_ranks(leave_at, 2, (1, 2), sizes, timeout=30)[1]
    assert "after 1 steps, or is still in it, and rank 0 took 1 steps" in ahead
    behind = run_on_ranks(leave_at, 2, (2, 1), sizes, timeout=30)[1]
    assert "after 1 steps, or is still in it, and rank 0 took more steps" in behind


def skip_then_prepare() -> list[Any]:
    PartialState(cpu=True)
    loader = prepare(skip_first_batches(DataLoader(range(10), batch_size=2), 1))
    state = GradientState()
    return [(state.remainder, batch.tolist()) for batch in loader]


def test_what_was_skipped_before_sharing_out_is_not_part_of_the_remainder():
    ranks = run_on_ranks(skip_then_prepare, 2)
    assert ranks == [[(0, [2, 3]), (0, [6, 7])], [(0, [4, 5]), (0, [8, 9])]]
