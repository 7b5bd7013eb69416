"""Gathering among some ranks, while the others wait elsewhere."""

from __future__ import annotations

import pytest
import torch

from accelerate.collectives import CheckedCollectives, SingleProcess
from accelerate.core.errors import DistributedOperationException
from tests.support.ranks import run_on_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.uint8]


@pytest.mark.parametrize("talk", [SingleProcess(), CheckedCollectives(SingleProcess())], ids=["plain", "checked"])
def test_one_process_gathers_from_itself(talk):
    tensor = torch.ones(2)
    assert talk.gather_among(tensor, [0]) is tensor
    assert talk.gather_object_among("x", [0]) == ["x"]
    assert talk.gather_numbers_among([1, 2], [0]) == [[1, 2]]
    talk.check("gather", tensor, ranks=[0])


def gather_without_one(debug: str, absent: int) -> list:
    import os

    from accelerate import PartialState
    from accelerate.runtime import state

    os.environ["ACCELERATE_DEBUG_MODE"] = debug
    PartialState()
    talk = state.current().collectives
    ranks = [rank for rank in range(talk.world_size) if rank != absent]
    found = []
    if talk.rank != absent:
        for dtype in DTYPES:
            got = talk.gather_among(torch.full((2, 3), talk.rank).to(dtype), ranks)
            assert got.dtype is dtype
            found.append(torch.equal(got, torch.tensor(ranks).to(dtype).repeat_interleave(2)[:, None].expand(-1, 3)))
        turned = (torch.arange(6.0).view(2, 3) + talk.rank).T
        large = torch.full((300_000,), float(talk.rank))
        found += [
            talk.gather_among(large, ranks)[::300_000].tolist() == ranks,
            talk.gather_among(turned, ranks)[:, 0].tolist() == [rank + item for rank in ranks for item in range(3)],
            talk.gather_among(torch.tensor(talk.rank), ranks).tolist() == ranks,
            talk.gather_among(torch.empty(0, 2), ranks).shape == (0, 2),
            talk.gather_among(torch.ones(1, requires_grad=True), ranks).requires_grad is False,
            talk.gather_object_among({"rank": talk.rank}, ranks) == [{"rank": rank} for rank in ranks],
            talk.gather_object_among(talk.rank, [talk.rank]) == [talk.rank],
            talk.gather_among(torch.ones(1), [talk.rank]).tolist() == [1.0],
        ]
        talk.check("gather", torch.ones(2), ranks=ranks)
        if debug == "1":
            with pytest.raises(DistributedOperationException, match=f"Process {ranks[-1]}: gather") as caught:
                talk.check("gather", torch.ones(1, dtype=DTYPES[talk.rank % 2]), ranks=ranks)
            assert f"Process {absent}:" not in str(caught.value)
    # Meanwhile the absent rank waits here.
    found.append(talk.all_gather(torch.tensor(talk.rank)).tolist() == list(range(talk.world_size)))
    return found


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("debug", ["0", "1"])
def test_some_ranks_gather_while_another_waits_in_a_collective(debug, absent):
    for rank, found in enumerate(run_on_ranks(gather_without_one, 3, debug, absent)):
        assert found == [True] * (1 if rank == absent else len(DTYPES) + 9)


def gather_among_all(debug: str) -> list:
    from accelerate import PartialState
    from accelerate.runtime import state

    PartialState()
    talk = state.current().collectives
    small, large = torch.full((2,), talk.rank), torch.full((300_000,), float(talk.rank))
    # Small tensors are sent directly, large ones in a collective.
    assert large.nbytes > 2**20
    return [
        talk.gather_among(small, [0, 1]).tolist(),
        talk.gather_among(large, [0, 1])[::300_000].tolist(),
        talk.gather_object_among([talk.rank], [0, 1]),
    ]


def test_all_ranks_together():
    assert run_on_ranks(gather_among_all, 2, "0") == [[[0, 0, 1, 1], [0.0, 1.0], [[0], [1]]]] * 2
