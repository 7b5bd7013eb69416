"""The contract of collectives, for one process; and debug mode over ranks that disagree."""

from __future__ import annotations

import pytest
import torch

from accelerate.collectives import CheckedCollectives, Collectives, SingleProcess
from accelerate.core.errors import DistributedOperationException
from tests.support.ranks import run_on_ranks


@pytest.fixture(params=[SingleProcess, lambda: CheckedCollectives(SingleProcess())], ids=["plain", "checked"])
def alone(request) -> Collectives:
    return request.param()


def test_one_process_gets_back_what_it_gave(alone):
    tensor = torch.tensor([1.0, 2.0])
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.all_gather(tensor) is tensor
    assert alone.broadcast(tensor) is tensor
    assert alone.all_reduce(tensor, mean=True) is tensor
    assert alone.all_gather_object("x") == ["x"]
    assert alone.broadcast_object("x") == "x"
    alone.barrier()
    alone.check("gather", {"a": [tensor, "x"]})


def test_scattering_to_oneself_fills_the_output(alone):
    output = torch.zeros(2)
    assert alone.scatter(output, [torch.tensor([1.0, 2.0])]) is output
    assert output.tolist() == [1.0, 2.0]
    assert alone.scatter(output, None) is output


class Disagreeing(SingleProcess):
    """Two ranks, of which the other brought something else."""

    world_size = 2

    def __init__(self, other):
        self.other = other

    def all_gather_object(self, obj):
        return [obj, self.other]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("gather", "((3,), 'float32')"), "Process 1: gather of ((3,), 'float32')"),
        (("gather", "((2,), 'int64')"), "Process 1: gather of ((2,), 'int64')"),
        (("reduce", "((2,), 'float32')"), "Process 1: reduce of"),
        (("gather", "[((2,), 'float32')]"), "Process 1: gather of [("),
    ],
)
def test_debug_mode_names_what_each_rank_brought(other, words):
    with pytest.raises(DistributedOperationException) as caught:
        CheckedCollectives(Disagreeing(other)).check("gather", torch.zeros(2))
    text = str(caught.value)
    assert "Cannot gather" in text
    assert "Process 0: gather of ((2,), 'float32')" in text
    assert words in text
    assert "pad_across_processes" in text


def test_debug_mode_accepts_what_fits():
    CheckedCollectives(Disagreeing(("gather", "((2,), 'float32')"))).check("gather", torch.zeros(2))
    CheckedCollectives(Disagreeing(("gather", "{'a': 'str'}"))).check("gather", {"a": "any"})


def everything(debug: str) -> dict:
    """Call each operation on a real group of two."""
    import os

    from accelerate import PartialState
    from accelerate.runtime import state

    os.environ["ACCELERATE_DEBUG_MODE"] = debug
    PartialState()
    talk = state.current().collectives
    rank = talk.rank
    output = torch.zeros(2)
    talk.scatter(output, [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])] if rank == 0 else None)
    results = {
        "kind": type(talk).__name__,
        "place": (talk.rank, talk.world_size),
        "gathered": talk.all_gather(torch.tensor([[rank, 10.0 + rank]])).tolist(),
        "gathered scalar": talk.all_gather(torch.tensor(rank)).tolist(),
        "gathered slice": talk.all_gather(torch.arange(4.0).view(2, 2).T[rank : rank + 1]).tolist(),
        "broadcast": talk.broadcast(torch.tensor([float(rank)]), src=1).tolist(),
        "sum": talk.all_reduce(torch.tensor([rank + 1])).tolist(),
        "mean": talk.all_reduce(torch.tensor([rank + 1.0]), mean=True).tolist(),
        "mean of whole numbers": talk.all_reduce(torch.tensor([rank]), mean=True).tolist(),
        "scattered": output.tolist(),
        "objects": talk.all_gather_object({"rank": rank}),
        "object": talk.broadcast_object([rank], src=1),
    }
    with_grad = torch.ones(1, requires_grad=True) * 2
    results["gradient stays here"] = talk.all_gather(with_grad).requires_grad
    talk.barrier()
    return results


@pytest.mark.parametrize("debug", ["0", "1"])
def test_each_operation_on_two_ranks(debug):
    results = run_on_ranks(everything, 2, debug)
    for rank, result in enumerate(results):
        assert result == {
            "kind": "CheckedCollectives" if debug == "1" else "TorchCollectives",
            "place": (rank, 2),
            "gathered": [[0.0, 10.0], [1.0, 11.0]],
            "gathered scalar": [0, 1],
            "gathered slice": [[0.0, 2.0], [1.0, 3.0]],
            "broadcast": [1.0],
            "sum": [3],
            "mean": [1.5],
            "mean of whole numbers": [0.5],
            "scattered": [0.0, 1.0] if rank == 0 else [2.0, 3.0],
            "objects": [{"rank": 0}, {"rank": 1}],
            "object": [1],
            "gradient stays here": False,
        }
