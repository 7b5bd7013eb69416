"""`gather_for_metrics` on real processes: shapes, objects, ranks that have left, and what is refused everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator
from accelerate.core.errors import DistributedOperationException, SettingError
from accelerate.data.prepare import prepare_data_loader
from accelerate.data.shards import Padding
from accelerate.runtime import state
from accelerate.utils import DataLoaderConfiguration, patch_environment
from tests.support.ranks import run_on_ranks


class Results(NamedTuple):
    """What a model may give for a batch."""

    rows: torch.Tensor
    more: dict[str, Any]


class Stand:
    """A loader in a step of our choice."""

    end_of_dataloader = False
    remainder = -1

    def __init__(self, rows: tuple[int, ...], real: tuple[int, ...]) -> None:
        self.padding = Padding(rows, real)


def in_step(accelerator: Accelerator, rows: tuple[int, ...], real: tuple[int, ...]) -> Stand:
    """Put the ranks into a step with this padding."""
    stand = Stand(rows, real)
    accelerator.gradient_state._add_dataloader(stand)
    return stand


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(SettingError) as caught:
        call()
    return str(caught.value)


# Shapes ----------------------------------------------------------------------------------------------------------


def gather_shapes() -> None:
    accelerator = Accelerator()
    rank = accelerator.process_index
    gather = accelerator.gather_for_metrics
    # Outside of a loop, of another width and number of rows on each rank.
    tokens = torch.full((1 + rank, 2 + 3 * rank), rank)
    assert gather(tokens).tolist() == [[0, 0, 0, 0, 0], [1] * 5, [1] * 5]
    assert gather(tokens, pad_index=-100)[0].tolist() == [0, 0, -100, -100, -100]
    found = gather([tokens.bool(), tokens[None, :1].bfloat16(), tokens[:1, 0]], pad_index=1)
    assert [item.dtype for item in found] == [torch.bool, torch.bfloat16, torch.int64]
    assert found[0][0].tolist() == [False, False, True, True, True]
    assert found[1].shape == (2, 1, 5)
    assert found[2].tolist() == [0, 1]
    # In a step with padding: 3 rows on the first rank, 2 on the second, of which one is real.
    stand = in_step(accelerator, (3, 2), (3, 1))
    mine = torch.arange(3 - rank) + 10 * rank
    assert gather(mine).tolist() == [0, 1, 2, 10]
    data = Results(mine[:, None].expand(-1, 1 + rank), {"thrice": mine.repeat_interleave(3), "one": torch.tensor(rank)})
    found = gather(data, pad_index=-1)
    assert type(found) is Results
    assert found.rows.tolist() == [[0, -1], [1, -1], [2, -1], [10, 10]]
    assert found.more["thrice"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 10, 10]
    assert found.more["one"].tolist() == [0, 1]
    assert gather(torch.empty(0, 4)).shape == (0, 4)
    assert gather(torch.empty(0)).shape == (0,)
    assert not gather(mine.float().requires_grad_()).requires_grad
    # No rank's values without rows, if all its rows are padding.
    stand.padding = Padding((3, 2), (3, 0))
    assert gather(torch.tensor(rank)).tolist() == [0]
    assert gather(Results(mine, {"one": torch.tensor(5.0)})).more["one"].tolist() == [5.0]
    # Different numbers of rows, none of them padding: nothing is cut, so any shape will do.
    stand.padding = Padding((3, 2), (3, 2))
    assert gather(mine).tolist() == [0, 1, 2, 10, 11]
    assert gather(torch.arange(4 + rank)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert gather(torch.tensor(rank)).tolist() == [0, 1]


def test_results_of_any_width_are_padded_and_cut():
    run_on_ranks(gather_shapes, 2)


def gather_ragged_rows() -> dict[str, Any]:
    """Gather what a filter left of each batch, in steps that are full and in one with padding."""
    accelerator = Accelerator()
    gather = accelerator.gather_for_metrics
    found: dict[str, Any] = {"filtered": [], "tokens": [], "many": []}
    for step, batch in enumerate(accelerator.prepare(DataLoader(torch.arange(7), batch_size=2))):
        found["filtered"] += gather(batch[batch != 2]).tolist()
        if step == 0:
            found["tokens"] = gather(torch.arange(3 + 2 * accelerator.process_index)).tolist()
            # More sizes than one record holds.
            many = gather([torch.full((1 + accelerator.process_index, 1 + place), place) for place in range(12)])
            found["many"] = [tuple(item.shape) for item in many]
        else:
            found["refused"] = refused(lambda batch=batch: gather(batch[batch != 6]))
    return found


def test_results_of_any_length_are_joined_where_nothing_is_padding():
    for found in run_on_ranks(gather_ragged_rows, 2):
        assert found["filtered"] == [0, 1, 3, 4, 5, 6]
        assert found["tokens"] == [0, 1, 2, 0, 1, 2, 3, 4]
        assert found["many"] == [(3, 1 + place) for place in range(12)]
        assert "rank 1: shape (1,) for 2 rows, of which 1 are real" in found["refused"]


UNLIKE: dict[str, Callable[[int], Any]] = {
    "dimensions": lambda rank: torch.zeros(()) if rank else torch.zeros(2),
    "dtype": lambda rank: torch.zeros(2, dtype=torch.float64 if rank else torch.float32),
    "integers": lambda rank: torch.zeros(2, dtype=torch.int32 if rank else torch.int64),
    "number": lambda rank: [torch.zeros(2)] * (1 + rank),
    "nothing": lambda rank: [] if rank else [torch.zeros(2)],
    "objects": lambda rank: ["a"] if rank else torch.zeros(2),
    "keys": lambda rank: {"b": torch.zeros(2)} if rank else {"a": torch.zeros(2)},
    "order": lambda rank: dict.fromkeys("ba" if rank else "ab", torch.zeros(2)),
    "mapping": lambda rank: {"a": 1} if rank else ["a"],
}


def gather_unlike() -> dict[str, str]:
    accelerator = Accelerator()
    found = {}
    for name, make in UNLIKE.items():
        with pytest.raises(DistributedOperationException) as caught:
            accelerator.gather_for_metrics(make(accelerator.process_index))
        found[name] = str(caught.value)
    assert accelerator.gather_for_metrics(torch.ones(1)).tolist() == [1.0, 1.0]  # the ranks meet again
    return found


def test_ranks_that_bring_what_cannot_be_joined_all_hear_of_it():
    first, second = run_on_ranks(gather_unlike, 2)
    assert first == second
    assert list(first) == list(UNLIKE)
    assert first["dimensions"] == (
        "gather_for_metrics cannot join what the processes brought:\n"
        "  - Process 0: 'torch.float32 with 1 dimensions'\n"
        "  - Process 1: 'torch.float32 with 0 dimensions'\n"
        "Accepted: the same structure, dtypes and numbers of dimensions on all processes; sizes may differ.\n"
        "Look for what treats a short batch differently, such as squeeze() in place of squeeze(-1)."
    )
    assert "Process 1: one object for each sample" in first["nothing"]


def count_exchanges() -> list[int]:
    accelerator = Accelerator()
    talk: Any = state.current().collectives
    calls: list[Any] = []

    def counting(operation: Any) -> Any:
        return lambda *args: (calls.append(operation), operation(*args))[1]

    talk.all_gather, talk.gather_among = counting(talk.all_gather), counting(talk.gather_among)
    counts = []
    for data in (torch.ones(2), [torch.ones(2), torch.tensor(1)], torch.ones(2, 3), [torch.ones(2, 3)] * 3):
        calls.clear()
        accelerator.gather_for_metrics(data)
        counts.append(len(calls))
    return counts


def test_one_small_exchange_comes_before_the_tensors():
    assert run_on_ranks(count_exchanges, 2) == [[1 + 1, 1 + 2, 1 + 1, 1 + 3]] * 2


# What cannot be cut ----------------------------------------------------------------------------------------------


def gather_uncuttable() -> list[str]:
    accelerator = Accelerator()
    rank = accelerator.process_index
    gather = accelerator.gather_for_metrics
    stand = in_step(accelerator, (3, 2), (3, 1))
    mine = torch.arange(3 - rank)
    found = [
        refused(lambda: gather(torch.arange(5))),
        refused(lambda: gather([mine, torch.arange(7 - rank)])),
        refused(lambda: gather(torch.arange(6))),  # twice the rows here, three times there
        refused(lambda: gather(torch.zeros(4, dtype=torch.int64))),
        refused(lambda: gather(torch.zeros(1))),  # fewer than rows: no mean that was spread out
        refused(lambda: gather(torch.zeros(5 + rank))),
        refused(lambda: gather(torch.arange(5.0))),
        refused(lambda: gather(["a"] * 5)),
        refused(lambda: gather(["a"] * 3 if rank else "a")),
        refused(lambda: gather(torch.zeros(5, 2), use_gather_object=True)),
    ]
    # The ranks meet again afterwards.
    assert accelerator.gradient_state.active_dataloader is stand
    assert gather(mine).tolist() == [0, 1, 2, 0]
    return found


def test_what_cannot_be_cut_is_refused_on_all_ranks():
    first, second = run_on_ranks(gather_uncuttable, 2)
    assert first == second
    assert first[0] == (
        "gather_for_metrics cannot tell what of a tensor belongs to the rows that pad this step (rank 0: shape (5,) for 3 "
        "rows, of which 3 are real, rank 1: shape (5,) for 2 rows, of which 1 are real).\n"
        "Accepted: k entries for each row of the batch along dimension 0, with the same k on all ranks; values without "
        "dimensions; or a value repeated over the batch.\n"
        "Size results by the batch itself, not by the configured batch size; pass dataloader= if they come from another "
        "loader than the innermost; or use accelerator.gather for what does not belong to samples."
    )
    assert "shape (7,)" in first[1]
    assert "shape (6,)" in first[1]
    assert "objects" in first[7]
    assert "rank 0: a single object" in first[8]


def spread_means() -> list[float]:
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(Counted(5), batch_size=4))
    losses: list[float] = []
    for batch in loader:
        assert len(batch) == 3
        loss = batch.float().mean() if accelerator.process_index else torch.tensor(float("nan"))
        losses += accelerator.gather_for_metrics(loss.repeat(4)).tolist()
    return losses


def evaluate_like_a_trainer(config: dict[str, Any], size: int) -> tuple[list[float], int]:
    """Gather `loss.repeat(batch_size)` in every step, with the size that the loader was made with."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**config))
    losses: list[float] = []
    for batch in accelerator.prepare(DataLoader(torch.arange(size), batch_size=8)):
        losses += accelerator.gather_for_metrics(batch.float().mean().repeat(8)).tolist()
    return losses, len(accelerator.gather_for_metrics(torch.zeros(3)))


class Counted(IterableDataset):
    """0, 1, 2, ..."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def test_a_mean_spread_over_the_configured_batch_counts_once_for_each_sample():
    for losses in run_on_ranks(spread_means, 2):
        assert [loss == loss for loss in losses] == [False] * 3 + [True] * 2
        assert losses[3:] == [pytest.approx(7 / 3)] * 2  # of 3, 4 and, again, 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("config", [{"even_batches": False}, {"split_batches": True, "even_batches": False}])
@pytest.mark.parametrize("size", [13, 20, 22])
def test_so_the_mean_over_an_epoch_weighs_all_samples_alike(world_size, config, size):
    times = world_size if "split_batches" in config else 1  # there, the script repeats by what all processes share
    losses, outside = run_on_ranks(evaluate_like_a_trainer, world_size, config, size)[0]  # the others may leave earlier
    assert sum(losses) / len(losses) == pytest.approx((size - 1) / 2)
    assert len(losses) == size * times
    assert outside == 3 * world_size  # outside of a loop nothing is cut


def gather_flattened(even: bool, zeros: bool) -> list[int]:
    """Count what is returned of numbers for each row, two by two, beside a mean and one number for each row."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=even))
    found = []
    for size in (2, 3, 4, 5, 6, 8, 10, 12, 14):
        loader = accelerator.prepare(DataLoader(torch.arange(size), batch_size=4))
        counts = [0, 0, 0]
        for batch in loader:
            twice = torch.zeros(2 * len(batch)) if zeros else torch.rand(2 * len(batch))
            gathered = accelerator.gather_for_metrics((batch.float(), twice)), accelerator.gather_for_metrics(twice)
            counts = [count + len(item) for count, item in zip(counts, (*gathered[0], gathered[1]), strict=True)]
        accelerator.wait_for_everyone()
        found.append(counts)
    return found


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("even", [True, False])
def test_numbers_for_each_row_are_kept_whatever_they_are(even, zeros):
    found = run_on_ranks(gather_flattened, 2, even, zeros)[0]  # the other may leave earlier
    assert found == [[size, 2 * size, 2 * size] for size in (2, 3, 4, 5, 6, 8, 10, 12, 14)]


class Parts(IterableDataset):
    """Parts of any length, where each is one sample."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(13).split(3))


def gather_parts(dispatch: bool | None) -> list[int]:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loader = accelerator.prepare(DataLoader(Parts(), batch_size=None))
    return [number for batch in loader for number in accelerator.gather_for_metrics(batch).tolist()]


@pytest.mark.parametrize("dispatch", [None, False])
def test_parts_of_any_length_that_are_padding_as_a_whole_are_left_out(dispatch):
    assert run_on_ranks(gather_parts, 2, dispatch) == [list(range(13))] * 2


# Ranks that have left --------------------------------------------------------------------------------------------


def gather_with_absent_ranks() -> dict[str, Any]:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    found: dict[str, Any] = {"rows": [], "wide": [], "names": [], "one": []}
    for batch in accelerator.prepare(DataLoader(torch.arange(11), batch_size=2)):
        gathered = accelerator.gather_for_metrics((batch, batch[:, None].expand(-1, len(batch)), torch.tensor(1)))
        found["rows"] += gathered[0].tolist()
        found["wide"].append(tuple(gathered[1].shape))
        found["one"].append(len(gathered[2]))
        found["names"] += accelerator.gather_for_metrics([str(int(item)) for item in batch])
    # Ranks that are done wait here, while the others gather.
    found["sum"] = accelerator.reduce(torch.tensor(len(found["rows"])), reduction="sum").item()
    return found


@pytest.mark.parametrize(("ranks", "present"), [(2, 2), (3, 3), (4, 2)])
def test_ranks_that_have_left_the_loop_are_not_waited_for(ranks, present):
    results = run_on_ranks(gather_with_absent_ranks, ranks)
    shared = 11 if ranks == present else 8
    for rank, found in enumerate(results):
        assert found["rows"] == list(range(11 if rank < present else shared))
        assert found["names"] == [str(number) for number in found["rows"]]
        assert found["sum"] == sum(len(other["rows"]) for other in results)
    assert results[0]["one"] == {2: [2, 2, 2], 3: [3, 3], 4: [4, 2]}[ranks]
    assert results[0]["wide"][-1] == {2: (3, 2), 3: (5, 2), 4: (3, 2)}[ranks]


# Objects ---------------------------------------------------------------------------------------------------------


def gather_objects() -> None:
    accelerator = Accelerator()
    rank = accelerator.process_index
    gather = accelerator.gather_for_metrics
    stand = in_step(accelerator, (2, 2), (2, 1))
    names = [f"{rank}{place}" for place in range(2)]
    assert gather(names) == ["00", "01", "10"]
    assert gather(tuple(names)) == ["00", "01", "10"]
    assert gather([name for name in names for _ in range(2)]) == ["00", "00", "01", "01", "10", "10"]
    assert gather([{"boxes": torch.ones(place)} for place in range(2)], use_gather_object=True)[2]["boxes"].shape == (
        0,
    )
    assert [row.tolist() for row in gather(torch.arange(2 + 2 * rank).view(2, -1), use_gather_object=True)] == [
        [0],
        [1],
        [0, 1],
    ]
    assert gather([]) == []
    assert gather(f"rank {rank}") == ["rank 0", "rank 1"]
    stand.padding = Padding((2, 2), (2, 0))
    assert gather(f"rank {rank}") == ["rank 0"]
    assert gather(names) == ["00", "01"]
    stand.padding = Padding((2, 3), (2, 3))
    assert gather(names[: 1 + rank]) == ["00", "10", "11"]


def test_objects_are_cut_by_each_ranks_rows():
    run_on_ranks(gather_objects, 2)


class Pair(NamedTuple):
    """Texts that belong to all samples."""

    first: str
    second: str


def gather_structures() -> list[str]:
    accelerator = Accelerator()
    gather = accelerator.gather_for_metrics
    stand = in_step(accelerator, (2, 2), (2, 1))
    rows, boxes = torch.arange(2) + 2 * accelerator.process_index, torch.ones(4, 1)
    found = []
    for data in ((rows, ["a", "b"]), [rows, ["a", "b"]], (["a", "b"], ["c", "d"]), Pair("a", "b"), {"a": "b"}):
        with pytest.raises(TypeError) as caught:
            gather(data)
        found.append(str(caught.value))
    for data in ([boxes, boxes], {"boxes": [boxes, boxes]}, [{"box": boxes}, {"box": boxes}], [rows.sum(), rows.sum()]):
        found.append(refused(lambda data=data: gather(data)))
    # What is one or the other for sure is cut right.
    assert [item.shape for item in gather([boxes, boxes], use_gather_object=True)] == [(4, 1)] * 3
    assert gather(["ab", "cd"]) == ["ab", "cd", "ab"]
    assert gather([("a", 1), ("b", 2)]) == [("a", 1), ("b", 2), ("a", 1)]
    assert [item.tolist() for item in gather([rows, rows])] == [[0, 1, 2]] * 2
    assert [len(item) for item in gather((boxes, rows.sum()))] == [6, 2]
    stand.padding = Padding((3, 3), (3, 2))
    assert [len(item) for item in gather([torch.ones(6), torch.ones(3)])] == [10, 5]
    return found


def test_what_may_be_a_structure_or_one_for_each_sample_is_refused_on_all_ranks():
    first, second = run_on_ranks(gather_structures, 2)
    assert first == second
    assert first[0].startswith("gather_for_metrics got a tuple of Tensor, list, which would have to travel as objects")
    assert "pass list(data) if it has one object for each sample" in first[2]
    assert "a dict with the keys ['a']" in first[4]
    assert all("Pass use_gather_object=True if there is one part for each sample" in text for text in first[5:])


# Dispatching -----------------------------------------------------------------------------------------------------


class Ragged(IterableDataset):
    """Batches of the given sizes and widths; entries are the number of the sample."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        self.shapes = shapes

    def __iter__(self) -> Iterator[torch.Tensor]:
        start = 0
        for rows, width in self.shapes:
            yield torch.arange(start, start + rows)[:, None].repeat(1, width)
            start += rows


SHAPES = [(2, 1), (3, 4), (1, 2), (4, 3), (5, 5)]


def gather_ragged(drop_last: bool) -> dict[str, Any]:
    accelerator = Accelerator()
    loader = prepare_data_loader(
        DataLoader(Ragged(*SHAPES), batch_size=None), device=accelerator.device, put_on_device=True
    )
    if drop_last:
        loader._drop_last = True
    found: dict[str, Any] = {"shapes": [], "padding": [], "samples": [], "remainder": []}
    for batch in loader:
        found["shapes"].append(tuple(batch.shape))
        found["padding"].append(loader.padding)
        found["samples"] += accelerator.gather_for_metrics(batch, pad_index=-1)[:, 0].tolist()
        found["remainder"].append(loader.remainder)
    assert loader.padding is None
    return found


@pytest.mark.parametrize("drop_last", [False, True])
def test_ragged_batches_are_dispatched_as_they_were_read(drop_last):
    first, second = run_on_ranks(gather_ragged, 2, drop_last)
    # The last one is alone, so it is cut, and topped up with its own rows: the opening is of another width.
    assert first["shapes"] == [(2, 1), (1, 2), (3, 5)][: 3 - drop_last]
    assert second["shapes"] == [(3, 4), (4, 3), (3, 5)][: 3 - drop_last]
    paddings = [Padding((2, 3), (2, 3)), Padding((1, 4), (1, 4)), Padding((3, 3), (3, 2))]
    assert first["padding"] == second["padding"] == paddings[: 3 - drop_last]
    assert first["samples"] == second["samples"] == list(range(10 if drop_last else 15))
    assert first["remainder"] == second["remainder"] == ([-1, 5] if drop_last else [-1, -1, 5])


def by_columns(batch: torch.Tensor, mine: slice, process_index: int, num_processes: int) -> torch.Tensor:
    return batch[:, process_index : process_index + 1]


def gather_columns() -> list[Any]:
    accelerator = Accelerator()
    loader = prepare_data_loader(
        DataLoader(torch.arange(14).view(7, 2), batch_size=4),
        device=accelerator.device,
        put_on_device=True,
        dispatch_batches=True,
        split_batches=True,
        slice_fn_for_dispatch=by_columns,
    )
    found: list[Any] = []
    for step, batch in enumerate(loader):
        if step:
            found.append(refused(lambda batch=batch: accelerator.gather_for_metrics(batch)))
        else:
            found.append(accelerator.gather_for_metrics(batch).flatten().tolist())
    return found


def test_slices_that_are_not_rows_cannot_be_cut():
    for found in run_on_ranks(gather_columns, 2):
        assert found[0] == [0, 2, 4, 6, 1, 3, 5, 7]
        assert "slice_fn_for_dispatch gave pieces that are not rows" in found[1]


# Meshes ----------------------------------------------------------------------------------------------------------


def gather_over_mesh() -> dict[str, Any]:
    accelerator = Accelerator()
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    found: dict[str, Any] = {}
    for dispatch in (False, True):
        loader = prepare_data_loader(
            DataLoader(range(7), batch_size=2),  # pyright: ignore[reportArgumentType]
            device=accelerator.device,
            put_on_device=True,
            dispatch_batches=dispatch,
            torch_device_mesh=mesh,
        )
        rows, names, ones = [], [], []
        for batch in loader:
            rows += accelerator.gather_for_metrics(batch).tolist()
            wide = accelerator.gather_for_metrics(batch[:, None].expand(-1, 1 + accelerator.process_index))
            assert wide[:, 0].tolist() == rows[-len(wide) :]
            names += accelerator.gather_for_metrics([str(int(item)) for item in batch])
            ones.append(len(accelerator.gather_for_metrics(torch.tensor(1.0))))
        found[str(dispatch)] = (rows, names, ones, loader.shard_index)
    return found


def test_ranks_that_share_a_batch_count_once():
    for rank, found in enumerate(run_on_ranks(gather_over_mesh, 4)):
        for rows, names, ones, shard in found.values():
            assert rows == list(range(7))
            assert names == [str(number) for number in range(7)]
            assert (ones, shard) == ([2, 2], rank // 2)


# Several loaders -------------------------------------------------------------------------------------------------


def evaluate_inside_training() -> dict[str, Any]:
    accelerator = Accelerator()
    training, evaluation, other = accelerator.prepare(
        *[DataLoader(torch.arange(size), batch_size=2) for size in (10, 7, 3)]
    )
    found: dict[str, Any] = {"evaluations": [], "trained": []}
    for step, batch in enumerate(training):
        if step == 1:
            for _ in other:
                break  # a loop that is broken off takes part in nothing
        got = [number for some in evaluation for number in accelerator.gather_for_metrics(some + 0).tolist()]
        found["evaluations"].append(got)
        found["trained"] += accelerator.gather_for_metrics(batch + 0).tolist()
    for step, pair in enumerate(zip(training, evaluation, strict=False)):
        if step == 1:
            found["unnamed"] = refused(lambda pair=pair: accelerator.gather_for_metrics(pair[0]))
            found["named"] = accelerator.gather_for_metrics(pair[1] + 0, dataloader=evaluation).tolist()
    return found


def test_evaluation_inside_training_and_beside_it():
    for found in run_on_ranks(evaluate_inside_training, 2):
        assert found["evaluations"] == [list(range(7))] * 3
        assert found["trained"] == list(range(10))
        assert found["named"] == [4, 5, 6]
        assert "Pass dataloader=" in found["unnamed"]


def interleave(size: int, other: int, ahead: bool) -> list[str]:
    """Go round a loader of `other` samples beside one of `size`, and gather of the first, in each step."""
    accelerator = Accelerator()
    loader, beside = accelerator.prepare(*[DataLoader(torch.arange(count), batch_size=2) for count in (size, other)])
    batches = iter(beside) if ahead else None
    found = []
    for batch in loader:
        batches = iter(beside) if batches is None else batches
        try:
            next(batches)
        except StopIteration:
            batches = iter(beside)
            next(batches)
        try:
            found.append(str(accelerator.gather_for_metrics(batch + 0).tolist()))
        except SettingError:
            found.append("refused")
    return found


def zipped(sizes: tuple[int, int]) -> list[str]:
    accelerator = Accelerator()
    loaders = accelerator.prepare(*[DataLoader(torch.arange(size), batch_size=2) for size in sizes])
    found = []
    for first, _ in zip(*loaders, strict=False):
        try:
            found.append(str(accelerator.gather_for_metrics(first + 0).tolist()))
        except SettingError:
            found.append("refused")
    return found


def test_loops_side_by_side_are_told_from_nested_ones_in_their_first_step():
    assert run_on_ranks(zipped, 2, (3, 8)) == [["refused"]] * 2
    assert run_on_ranks(zipped, 2, (8, 3)) == [["refused"]] * 2
    assert run_on_ranks(zipped, 2, (3, 3)) == [["[0, 1, 2]"]] * 2


@pytest.mark.parametrize("ahead", [True, False])
def test_a_loader_that_goes_round_beside_another_one_is_never_taken_for_it(ahead):
    full = [str(list(range(start, start + 4))) for start in range(0, 16, 4)]
    assert run_on_ranks(interleave, 2, 16, 7, ahead) == [[full[0], "refused", full[2], "refused"]] * 2
    # The first is short where the other one begins again.
    assert run_on_ranks(interleave, 2, 11, 8, ahead) == [[*full[:2], "refused"]] * 2


# Debug mode ------------------------------------------------------------------------------------------------------


def gather_in_debug_mode() -> list[str]:
    with patch_environment(ACCELERATE_DEBUG_MODE="true"):
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    rank = accelerator.process_index
    tokens = torch.full((2, 2 + rank), rank)
    assert accelerator.gather_for_metrics(tokens).shape == (6, 4)
    found = []
    with pytest.raises(DistributedOperationException) as caught:
        (accelerator.gather if rank == 1 else accelerator.gather_for_metrics)(torch.ones(1))
    found.append(str(caught.value))
    for batch in accelerator.prepare(DataLoader(torch.arange(10), batch_size=2)):
        last = accelerator.gather_for_metrics(batch[:, None]).flatten().tolist()
        with pytest.raises(DistributedOperationException) as caught:
            accelerator.gather_for_metrics({str(rank): batch[:, None]})
    found += [str(caught.value), str(last)]
    accelerator.wait_for_everyone()
    return found


def test_debug_mode_compares_operations_among_the_ranks_in_the_loop():
    found = run_on_ranks(gather_in_debug_mode, 3)
    assert "Process 0: gather_for_metrics" in found[0][0]
    assert "Process 1: gather of " in found[0][0]
    assert found[0][1].count("Process") == 2  # the third has left the loop
    assert [result[2] for result in found] == ["[6, 7, 8, 9]", "[6, 7, 8, 9]", "[0, 1, 2, 3, 4, 5]"]
