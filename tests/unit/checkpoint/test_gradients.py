"""Windows of accumulation in a checkpoint, and who goes on with them."""

from __future__ import annotations

import pytest
import torch

from accelerate.checkpoint import layout
from accelerate.checkpoint.gradients import hand_over, plan_windows, read_windows

from .support import write


def window(measure="batches", reference=4, own=0, **gradients):
    held = {name: torch.tensor(value) for name, value in gradients.items()}
    return {
        "measure": measure,
        "reference": reference,
        "own": own,
        "step": 2,
        "gradients": {"model 0": held} if held else {},
    }


def test_nothing_is_written_where_nothing_is_open(tmp_path):
    write(tmp_path, plan_windows(0, None))
    assert list(tmp_path.iterdir()) == []
    assert read_windows(tmp_path, 0, 1, 1) is None
    assert read_windows(tmp_path, 0, 2, 1) is None
    assert read_windows(tmp_path, 0, 1, None) is None


def test_each_rank_reads_its_own(tmp_path):
    for rank in range(2):
        write(tmp_path, plan_windows(rank, [window(weight=[float(rank)])]))
    for rank in range(2):
        (found,) = read_windows(tmp_path, rank, 2, 2)
        assert found["gradients"]["model 0"]["weight"].tolist() == [float(rank)]
        assert "is_moved" not in found
    assert all(layout.is_checkpoint_file(path.name) for path in tmp_path.iterdir())


def test_a_part_of_the_ranks_is_not_enough(tmp_path):
    write(tmp_path, plan_windows(0, [window(weight=[1.0])]))
    for rank, world_size in ((1, 2), (0, 1), (2, 3)):
        with pytest.raises(layout.MissingFile, match="the gradients of rank 1 are not there"):
            read_windows(tmp_path, rank, world_size, 2)


@pytest.mark.parametrize(
    ("saved", "world_size", "expected"),
    [
        # Batches: the mean over ranks stays as it is.
        ([window(weight=[1.0]), window(weight=[3.0])], 1, (4, 0, [2.0])),
        ([window(weight=[1.0]), window(weight=[3.0])], 4, (4, 0, [8.0])),
        # Samples: the reference is a mean over ranks, and will change.
        ([window("samples", 8, weight=[1.0]), window("samples", 8, weight=[3.0])], 4, (8, 0, [4.0])),
        # Items: the sums are brought to one reference.
        ([window("items", 8, 8, weight=[1.0]), window("items", 4, 4, weight=[3.0])], 1, (8, 12, [2.5])),
        ([window("items", None), window("items", 4, 4, weight=[3.0])], 1, (4, 4, [3.0])),
        ([window("items", None), window("items", None)], 1, (None, 0, None)),
    ],
)
def test_the_first_rank_takes_the_sum(saved, world_size, expected):
    (found,) = hand_over([[one] for one in saved], 0, world_size)
    gradients = found["gradients"].get("model 0", {})
    weight = gradients["weight"].tolist() if gradients else None
    assert (found["reference"], found["own"], weight) == expected
    assert found["is_moved"]
    (other,) = hand_over([[one] for one in saved], 1, world_size)
    assert (other["reference"], other["own"], other["gradients"]) == (expected[0], 0, {})
    assert other["step"] == 2


def test_gradients_that_only_some_ranks_have_are_kept():
    (found,) = hand_over([[window(one=[1.0])], [window(two=[3.0])]], 0, 2)
    assert {name: value.tolist() for name, value in found["gradients"]["model 0"].items()} == {
        "one": [1.0],
        "two": [3.0],
    }


def test_sparse_gradients_are_added_by_row():
    def thin(row, value):
        content = {"indices": torch.tensor([[row]]), "values": torch.tensor([[value]]), "size": [3, 1]}
        return [{**window(), "gradients": {"model 0": {"weight": content}}}]

    (found,) = hand_over([thin(1, 1.0), thin(1, 2.0), thin(2, 4.0)], 0, 3)
    total = found["gradients"]["model 0"]["weight"]
    assert (total["indices"].tolist(), total["values"].tolist(), total["size"]) == ([[1, 2]], [[3.0], [4.0]], [3, 1])
