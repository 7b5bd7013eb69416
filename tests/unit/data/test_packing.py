"""Batches as bytes and back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch

from accelerate.data.packing import Layout, pack, unpack


def sent(batch):
    layout, tensors = Layout.describe(batch)
    return unpack(pack((0, -1), tensors, layout.num_bytes, torch.device("cpu")), layout)


def test_views_that_are_computed_when_read_arrive_as_numbers():
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    got = sent({"conj": numbers.conj(), "neg": numbers.conj().imag})
    assert got["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert got["neg"].tolist() == [-2.0, 4.0]


def test_mappings_keep_their_type_and_what_fills_them():
    got = sent({"by name": defaultdict(list, x=torch.ones(1)), "ordered": OrderedDict(y=torch.zeros(2))})
    assert type(got["by name"]) is defaultdict
    assert got["by name"]["absent"] == []
    assert type(got["ordered"]) is OrderedDict


def test_several_tensors_share_neither_memory_nor_version():
    got = sent((torch.ones(100), torch.zeros(1)))
    got[1].add_(1)
    assert got[0]._version == 0
    assert got[1].untyped_storage().nbytes() == 4


def test_a_column_of_a_tensor_can_be_sent():
    whole = torch.arange(6).view(3, 2)
    got = sent({"column": whole[:, 1:], "every other": torch.arange(6.0)[::2], "one": whole[1:2, :1].T})
    assert got["column"].tolist() == [[1], [3], [5]]
    assert got["every other"].tolist() == [0.0, 2.0, 4.0]
    assert got["one"].tolist() == [[2]]
