"""Operations over nested data, in one process and against what the peer gives on two."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch

from accelerate.core.errors import SettingError, WrongTypeError
from accelerate.runtime import ops
from tests.support.observed import OBSERVED
from tests.support.ranks import run_on_ranks

Pair = namedtuple("Pair", "a b")


class Movable:
    """Moves as a whole, as a BatchEncoding does; its `to` takes the device only."""

    def __init__(self):
        self.device = None

    def to(self, device):
        self.device = device
        return self


# Walking ------------------------------------------------------------------------------------------------------------


def test_a_function_is_applied_to_tensors_and_containers_stay():
    data = {"a": [torch.ones(1), "text"], "b": Pair(torch.ones(1), None), "c": OrderedDict(d=(torch.ones(1),))}
    found = ops.recursively_apply(lambda tensor, factor, plus=0: (tensor * factor + plus).item(), data, 2, plus=1)
    assert found == {"a": [3.0, "text"], "b": Pair(3.0, None), "c": OrderedDict(d=(3.0,))}
    assert type(found["b"]) is Pair
    assert type(found["c"]) is OrderedDict


def test_other_leaves_can_be_meant_or_refused():
    assert ops.recursively_apply(str.upper, ["a", 1], test_type=lambda leaf: isinstance(leaf, str)) == ["A", 1]
    with pytest.raises(WrongTypeError, match="upper got a leaf of type int: 1") as caught:
        ops.recursively_apply(
            str.upper, ["a", 1], test_type=lambda leaf: isinstance(leaf, str), error_on_other_type=True
        )
    assert "gather_object" in str(caught.value)


# Moving -------------------------------------------------------------------------------------------------------------


def test_tensors_are_moved_wherever_they_are():
    movable = Movable()
    data = {"a": [torch.ones(1), "text", 3], "b": Pair(torch.ones(1), None), "c": movable}
    found = ops.send_to_device(data, "meta", non_blocking=True)
    assert found["a"][0].device.type == found["b"].a.device.type == "meta"
    assert (found["a"][1:], type(found["b"])) == (["text", 3], Pair)
    assert (found["c"], movable.device) == (movable, "meta")
    assert data["a"][0].device.type == "cpu", "the caller's data moved"


def test_skipped_keys_stay():
    data = {"a": torch.ones(1), "b": {"a": torch.ones(1), "c": torch.ones(1)}}
    for keys in ("a", ["a"]):
        found = ops.send_to_device(data, "meta", skip_keys=keys)
        assert found["a"] is data["a"]
        assert found["b"]["a"] is data["b"]["a"]
        assert found["b"]["c"].device.type == "meta"


def test_mappings_of_other_classes_keep_their_class():
    assert type(ops.send_to_device(UserDict(a=torch.ones(1)), "cpu")) is UserDict


# One process --------------------------------------------------------------------------------------------------------


def test_one_process_gets_back_what_it_gave():
    for data in (torch.ones(2), {"a": [torch.ones(2)]}, "text", None):
        assert ops.gather(data) is data
        assert ops.gather_object(data) is data
        assert ops.broadcast(data) is data
        assert ops.reduce(data, "sum") is data
        assert ops.pad_across_processes(data) is data
    objects = [1, "x"]
    assert ops.broadcast_object_list(objects) is objects
    ops.wait_for_everyone()


def test_a_reduction_scales():
    assert ops.reduce({"a": torch.tensor([2.0])}, scale=0.5)["a"].tolist() == [1.0]
    assert ops.reduce(torch.tensor([2.0]), reduction="none", scale=2.0).tolist() == [4.0]


def test_an_unknown_reduction_is_refused():
    with pytest.raises(SettingError, match="reduction='max' is not known") as caught:
        ops.reduce(torch.ones(1), "max")
    assert "'sum', 'mean', 'none'" in str(caught.value)


# Joining and cutting --------------------------------------------------------------------------------------------------


def test_nested_batches_are_joined():
    parts = [{"a": torch.tensor([i]), "b": Pair([torch.tensor([[i]])], "same")} for i in (1, 2)]
    found = ops.concatenate(parts)
    assert found["a"].tolist() == [1, 2]
    assert found["b"].a[0].tolist() == [[1], [2]]
    assert found["b"].b == "same"
    assert ops.concatenate([torch.ones(1, 2), torch.ones(1, 1)], dim=1).shape == (1, 3)


def test_nothing_and_plain_objects_cannot_be_joined():
    with pytest.raises(SettingError, match="got nothing to join"):
        ops.concatenate([])
    with pytest.raises(WrongTypeError, match="items of type str"):
        ops.concatenate(["a", "b"])


def test_rows_are_cut_out():
    data = {"a": torch.arange(4), "b": [torch.arange(8).view(4, 2)], "c": "text"}
    found = ops.slice_tensors(data, slice(1, 3), process_index=0, num_processes=2)
    assert found["a"].tolist() == [1, 2]
    assert found["b"][0].tolist() == [[2, 3], [4, 5]]
    assert found["c"] == "text"
    assert ops.slice_tensors(torch.arange(4), [0, 3]).tolist() == [0, 3]


def test_rows_are_repeated_until_they_divide():
    data = {"a": torch.arange(3), "b": torch.arange(6).view(3, 2)}
    found = ops.pad_input_tensors(data, batch_size=3, num_processes=2)
    assert found["a"].tolist() == [0, 1, 2, 2]
    assert found["b"].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]
    same = torch.arange(4)
    assert ops.pad_input_tensors(same, 4, 2) is same
    assert ops.pad_input_tensors(torch.arange(6).view(2, 3), 3, 2, dim=1).tolist() == [[0, 1, 2, 2], [3, 4, 5, 5]]


# Asking ---------------------------------------------------------------------------------------------------------------


def test_the_size_of_a_batch():
    assert ops.find_batch_size({"a": [torch.ones(3, 2)]}) == 3
    assert ops.find_batch_size(["text", torch.ones(2)]) == 2
    assert ops.find_batch_size([]) is None
    assert ops.find_batch_size({"a": "text"}) is None
    with pytest.raises(WrongTypeError, match="a batch of type str has no size"):
        ops.find_batch_size("text")
    assert ops.ignorant_find_batch_size("text") is None
    assert ops.ignorant_find_batch_size(torch.ones(4)) == 4


def test_the_device_of_data():
    assert ops.find_device({"a": ["text", torch.ones(1)]}) == torch.device("cpu")
    assert ops.find_device(["text"]) is None


def test_numbers_of_tensors():
    data = {"a": torch.tensor([1.5, 2.0], dtype=torch.bfloat16), "b": torch.tensor(3, requires_grad=False), "c": "x"}
    assert ops.listify(data) == {"a": [1.5, 2.0], "b": 3, "c": "x"}
    assert ops.listify(torch.ones(1, requires_grad=True)) == [1.0]


def test_half_precision_becomes_single():
    whole = torch.ones(1, dtype=torch.float64)
    found = ops.convert_to_fp32([torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.bfloat16), whole, "x"])
    assert [item.dtype for item in found[:3]] == [torch.float32, torch.float32, torch.float64]
    assert found[2] is whole
    assert ops.convert_to_fp32(torch.ones(1, dtype=torch.float16)).dtype == torch.float32


# Two ranks, against the peer --------------------------------------------------------------------------------------------


def on_two_ranks() -> dict:
    from accelerate import Accelerator
    from accelerate.core.errors import WrongTypeError

    accelerator = Accelerator()
    rank = accelerator.process_index
    own = torch.tensor([rank + 1.0])

    def error(call):
        try:
            return call()
        except WrongTypeError:
            return "TypeError"

    padded = [torch.tensor([rank + 1.0]) if rank == 0 else torch.tensor([2.0, 2.0])]
    return {
        "gather 1d": accelerator.gather(own).tolist(),
        "gather 0d": accelerator.gather(torch.tensor(float(rank))).tolist(),
        "gather dict/list": repr(accelerator.gather({"a": [own]})),
        "reduce sum": accelerator.reduce(own, "sum").tolist(),
        "reduce mean": accelerator.reduce(own, "mean").tolist(),
        "gather_object": ops.gather_object([rank]),
        "gather_object non-list": ops.gather_object(rank),
        "broadcast from 0": ops.broadcast(own.clone()).tolist(),
        "broadcast from last": ops.broadcast(own.clone(), from_process=1).tolist(),
        "broadcast_object_list": ops.broadcast_object_list([rank, "x"]),
        "gather non tensor": error(lambda: accelerator.gather("a")),
        "gather_for_metrics objects": accelerator.gather_for_metrics(["a", rank]),
        "gather_for_metrics outside loop": accelerator.gather_for_metrics(own).tolist(),
        "ours: padded": accelerator.pad_across_processes({"a": padded, "n": 1, "s": torch.tensor(1)})["a"][0].tolist(),
        "ours: padded first": accelerator.pad_across_processes(padded[0], pad_index=-1, pad_first=True).tolist(),
        "ours: untouched": own.tolist(),
        "ours: scaled": accelerator.reduce(own, "sum", scale=2.0).tolist(),
        "ours: not reduced": accelerator.reduce(own, "none").tolist(),
    }


def test_two_ranks_get_what_the_peer_gives():
    results = run_on_ranks(on_two_ranks, 2)
    ours = {
        "ours: padded": [[1.0, 0.0], [2.0, 2.0]],
        "ours: padded first": [[-1.0, 1.0], [2.0, 2.0]],
        "ours: untouched": [[1.0], [2.0]],
        "ours: scaled": [[6.0], [6.0]],  # the peer ignores scale here
        "ours: not reduced": [[1.0], [2.0]],
    }
    for rank, result in enumerate(results):
        for name, value in result.items():
            expected = ours[name][rank] if name in ours else OBSERVED["operations"]["P2"][name]
            assert value == expected, name
