"""Batches as bytes and back, and the rows that short reads are topped up with."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch

from accelerate.data.cutting import Cutter
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


def test_topping_up_takes_rows_of_as_many_batches_as_it_needs():
    cutter = Cutter(count=4, split=False, drop_last=False, slice_fn=None)
    cutter.remember_opening([torch.empty(0, dtype=torch.int64)])  # has nothing to keep
    cutter.remember_opening([torch.tensor([0]), torch.tensor([1]), torch.tensor([2]), torch.tensor([3])])
    cutter.remember_opening([torch.tensor([9])])
    pieces, rows = cutter.cut([torch.tensor([4])])
    assert ([piece.tolist() for piece in pieces], rows) == ([[4], [0], [1], [2]], 1)
    cutter = Cutter(count=4, split=False, drop_last=False, slice_fn=None)
    cutter.remember_opening([torch.tensor([0])])
    pieces, rows = cutter.cut([torch.tensor([0])])
    assert [piece.tolist() for piece in pieces] == [[0], [0], [0], [0]]
