"""gather, reduce, broadcast, pad and their object forms over nested data, on 2 and 3 ranks."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedOperationException,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    pad_across_processes,
    patch_environment,
    reduce,
)

from ..support.ranks import run_on_ranks

Pair = namedtuple("Pair", ("left", "right"))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def start() -> tuple[int, int]:
    state = PartialState(cpu=True)
    return state.process_index, state.num_processes


def nested(rank: int) -> dict[str, Any]:
    """Return one of each container, whose tensors tell the rank."""
    value = torch.tensor([[rank, 10.0 + rank]])
    return {
        "list": [value, (value + 1, value + 2)],
        "pair": Pair(value + 3, {"deep": value + 4}),
        "ordered": OrderedDict(b=value + 5, a=value + 6),
        "strided": torch.arange(6.0).view(2, 3).t() + rank,
        "empty": torch.empty(0, 2),
    }


def leaves(data: Any) -> list[torch.Tensor]:
    return [
        data["list"][0],
        *data["list"][1],
        data["pair"].left,
        data["pair"].right["deep"],
        data["ordered"]["b"],
        data["ordered"]["a"],
        data["strided"],
        data["empty"],
    ]


def check_containers(data: Any) -> None:
    assert type(data["list"]) is list
    assert type(data["list"][1]) is tuple
    assert type(data["pair"]) is Pair
    assert type(data["ordered"]) is OrderedDict
    assert list(data["ordered"]) == ["b", "a"]


def gathers() -> None:
    rank, size = start()
    own = nested(rank)
    got = gather(own)
    check_containers(got)
    everyone = [leaves(nested(other)) for other in range(size)]
    for place, leaf in enumerate(leaves(got)):
        assert torch.equal(leaf, torch.cat([theirs[place] for theirs in everyone]))
    assert all(torch.equal(one, other) for one, other in zip(leaves(own), leaves(nested(rank)), strict=True))
    for dtype in DTYPES:
        flat = gather(torch.tensor([rank, 1]).to(dtype))
        assert flat.dtype is dtype
        assert flat.tolist() == torch.tensor([[other, 1] for other in range(size)]).flatten().to(dtype).tolist()
        assert gather(torch.tensor(rank).to(dtype)).tolist() == torch.arange(size).to(dtype).tolist()
    assert not gather(torch.ones(1, requires_grad=True)).requires_grad
    for wrong in ("text", 3, None, {"a": [torch.ones(1), "text"]}):
        with pytest.raises(TypeError, match="gather_object"):
            gather({"a": wrong})
    assert gather([]) == []


def reduces() -> None:
    rank, size = start()
    own = nested(rank)
    total, mean = reduce(own, "sum"), reduce(own)
    check_containers(total)
    everyone = [leaves(nested(other)) for other in range(size)]
    for place, (summed, averaged) in enumerate(zip(leaves(total), leaves(mean), strict=True)):
        expected = torch.stack([theirs[place] for theirs in everyone]).sum(0)
        assert torch.equal(summed, expected)
        assert torch.allclose(averaged, expected / size)
    assert all(torch.equal(one, other) for one, other in zip(leaves(own), leaves(nested(rank)), strict=True))
    assert torch.equal(reduce(torch.tensor(2.0), "sum", scale=0.5), torch.tensor(float(size)))
    assert torch.equal(reduce(torch.tensor([rank]), "none", scale=2.0), torch.tensor([2.0 * rank]))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        got = reduce(torch.tensor([rank + 1.0], dtype=dtype), "mean")
        assert got.dtype is dtype
        assert got.item() == (size + 1) / 2
    # A mean of whole numbers is seldom whole.
    assert reduce(torch.tensor([rank])).tolist() == [(size - 1) / 2]
    assert reduce(torch.tensor([rank]), "sum").dtype is torch.int64
    with pytest.raises(ValueError, match="reduction='average' is not known"):
        reduce(torch.ones(1), "average")


def broadcasts() -> None:
    rank, size = start()
    for source in range(size):
        got = broadcast(nested(rank), from_process=source)
        check_containers(got)
        assert all(torch.equal(a, b) for a, b in zip(leaves(got), leaves(nested(source)), strict=True))
    for dtype in DTYPES:
        assert broadcast(torch.tensor(rank).to(dtype), from_process=size - 1) == torch.tensor(size - 1).to(dtype)
    # The caller's tensors are overwritten, also those that do not lie in one piece.
    square = torch.full((2, 3), float(rank)).t()
    broadcast({"square": square}, from_process=1)
    assert square.tolist() == [[1.0, 1.0]] * 3
    weight = torch.nn.Parameter(torch.tensor([float(rank)]))
    assert broadcast(weight) is weight
    assert weight.item() == 0
    own = [rank, {"text": "x" * rank}]
    got = broadcast_object_list(own, from_process=size - 1)
    assert got is own
    assert own == [size - 1, {"text": "x" * (size - 1)}]


def pads() -> None:
    rank, size = start()
    row = torch.full((rank + 1, 2), float(rank))
    data = Pair(row, {"mask": row.bool(), "scalar": torch.tensor(rank), "name": "kept", "half": row.bfloat16()})
    got = pad_across_processes(data, pad_index=-1)
    assert type(got) is Pair
    assert got.left.tolist() == row.tolist() + [[-1.0, -1.0]] * (size - rank - 1)
    assert got.right["half"].dtype is torch.bfloat16
    assert got.right["mask"].shape == (size, 2)
    assert got.right["scalar"] == rank
    assert got.right["name"] == "kept"
    first = pad_across_processes(row.t(), dim=1, pad_index=7, pad_first=True)
    assert first.tolist() == [[7.0] * (size - rank - 1) + [float(rank)] * (rank + 1)] * 2
    last = pad_across_processes(row.t(), dim=-1)
    assert last.shape == (2, size)
    assert gather(last).shape == (2 * size, size)
    # A dimension that is not there leaves the tensor alone, on all ranks alike.
    assert torch.equal(pad_across_processes(torch.ones(2), dim=1), torch.ones(2))


def objects() -> None:
    rank, size = start()
    ranks = list(range(size))
    assert gather_object([rank, "x"]) == [item for other in ranks for item in (other, "x")]
    assert gather_object((rank,)) == ranks
    # A list that is empty here and there.
    assert gather_object([rank] if rank else []) == ranks[1:]
    # Whole: what is no list.
    assert gather_object(rank) == ranks
    assert gather_object(f"rank {rank}") == [f"rank {other}" for other in ranks]
    assert gather_object({"rank": rank}) == [{"rank": other} for other in ranks]
    # Rows of tensors and arrays, whose sizes may differ.
    rows = gather_object(torch.full((rank + 1, 2), rank))
    assert [row.tolist() for row in rows] == [[other, other] for other in ranks for _ in range(other + 1)]
    assert gather_object(np.arange(2) + rank) == [number + other for other in ranks for number in (0, 1)]
    assert gather_object(torch.tensor(rank)) == ranks


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("function", [gathers, reduces, broadcasts, pads, objects], ids=lambda one: one.__name__)
def test_on_ranks(function: Callable[[], None], size: int) -> None:
    run_on_ranks(function, size)


def metrics() -> None:
    rank, size = start()
    accelerator = Accelerator()
    data = [{"number": torch.tensor(number), "name": f"sample {number}"} for number in range(7)]
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=2))  # pyright: ignore[reportArgumentType]
    found: dict[str, list[Any]] = defaultdict(list)
    for batch in loader:
        numbers = batch["number"]
        assert batch["name"] == [f"sample {number}" for number in numbers]
        found["nested"] += accelerator.gather_for_metrics(Pair(numbers, {"twice": 2 * numbers})).right["twice"].tolist()
        found["names"] += accelerator.gather_for_metrics(batch["name"])
        # Rows of different length on each rank cannot be joined, but travel as objects and are cut in the same way.
        ragged = torch.arange(rank + 2).repeat(len(numbers), 1) + 10 * numbers[:, None]
        gathered = accelerator.gather_for_metrics(ragged, use_gather_object=True)
        found["ragged"] += [row[0].item() // 10 for row in gathered]
        with pytest.raises(TypeError, match=r"gather_for_metrics got a dict .* 'name'.*\nAccepted: nested tensors"):
            accelerator.gather_for_metrics(batch)
    assert found["nested"] == [2 * number for number in range(7)]
    assert found["names"] == [f"sample {number}" for number in range(7)]
    assert found["ragged"] == list(range(7))
    assert size > 1


@pytest.mark.parametrize("size", [2, 3])
def test_gather_for_metrics_gives_each_sample_once(size: int) -> None:
    run_on_ranks(metrics, size)


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises(DistributedOperationException) as caught:
        call()
    return str(caught.value)


def debug_mode() -> list[str]:
    with patch_environment(ACCELERATE_DEBUG_MODE="true"):
        rank, _ = start()
    accelerator = Accelerator()
    assert accelerator.state.debug
    found = [
        raised(lambda: accelerator.gather(torch.ones(rank + 1, 3))),
        raised(lambda: accelerator.gather({"a": torch.ones(1)} if rank else {"b": torch.ones(1)})),
        raised(lambda: accelerator.reduce(torch.ones(1, dtype=torch.float64 if rank else torch.float32))),
        raised(lambda: broadcast([torch.ones(1)] * (rank + 1))),
        raised(lambda: accelerator.gather(torch.ones(2)) if rank else accelerator.reduce(torch.ones(2))),
    ]
    # What fits goes through, and padding first is the cure.
    assert accelerator.gather(torch.ones(2)).tolist() == [1.0] * 4
    assert accelerator.gather(accelerator.pad_across_processes(torch.ones(rank + 1))).tolist() == [1.0, 0.0, 1.0, 1.0]
    return found


def test_debug_mode_names_what_each_rank_brought() -> None:
    first, second = run_on_ranks(debug_mode, 2)
    assert first[:4] == second[:4]
    assert first[4].startswith("Cannot reduce")
    assert second[4].startswith("Cannot gather")
    assert first[4].splitlines()[1:] == second[4].splitlines()[1:]
    shapes, keys, dtypes, lengths, operations = first
    assert shapes.startswith("Cannot gather: the processes came with different operations or shapes.\n")
    assert "  - Process 0: gather of ((1, 3), 'float32')\n" in shapes
    assert "  - Process 1: gather of ((2, 3), 'float32')\n" in shapes
    assert "Accepted: the same operation, structure, shapes and dtypes on all processes.\n" in shapes
    assert "Pad first with pad_across_processes" in shapes
    assert "Process 0: gather of {'b'" in keys
    assert "Process 1: gather of {'a'" in keys
    assert "'float32'" in dtypes
    assert "'float64'" in dtypes
    assert "Process 1: broadcast of [((1,), 'float32'), ((1,), 'float32')]" in lengths
    assert "Process 0: reduce of ((2,), 'float32')" in operations
    assert "Process 1: gather of ((2,), 'float32')" in operations
