"""Which rank does what."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.collectives import SingleProcess
from accelerate.core.errors import SettingError, WrongTypeError
from accelerate.runtime.control import goes_first, only_if, share_of, split_inputs
from tests.support.observed import OBSERVED, on

INPUTS = {
    **{f"list n={n} pad={pad}": (list(range(n)), pad) for n in (0, 1, 2, 3, 5, 7) for pad in (False, True)},
    "tensor n=3": (torch.arange(3), False),
    "tensor n=3 pad": (torch.arange(3), True),
    "tuple n=3": ((1, 2, 3), False),
    "tuple n=3 pad": ((1, 2, 3), True),
    "dict n=3": ({"a": [1, 2, 3], "b": ["x", "y", "z"]}, False),
    "dict n=3 pad": ({"a": [1, 2, 3]}, True),
    "dict unequal": ({"a": [1, 2], "b": [1]}, False),
    "str 'abc'": ("abc", False),
    "dict of tensor n=3 pad": ({"a": torch.arange(3)}, True),
}


def plain(share):
    """Return a share in the form in which the table was written down."""
    if isinstance(share, dict) and isinstance(next(iter(share.values())), torch.Tensor):
        return next(iter(share.values())).tolist()
    return share.tolist() if isinstance(share, torch.Tensor) else list(share) if isinstance(share, tuple) else share


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("row", OBSERVED["split_between_processes"]["P1"])
def test_shares_are_those_of_the_peer(row, processes):
    inputs, padding = INPUTS[row]
    before = copy.deepcopy(inputs)
    for rank, expected in enumerate(OBSERVED["split_between_processes"][f"P{processes}"][row]):
        if isinstance(expected, str) and expected.endswith("Error"):
            with pytest.raises({"IndexError": IndexError, "TypeError": TypeError, "ValueError": ValueError}[expected]):
                split_inputs(inputs, processes, rank, padding)
        else:
            assert plain(split_inputs(inputs, processes, rank, padding)) == expected
    assert repr(inputs) == repr(before), "the caller's data changed"


def test_the_table_is_used_whole():
    assert set(INPUTS) == set(OBSERVED["split_between_processes"]["P1"])


def test_a_share_has_the_kind_of_the_whole():
    assert isinstance(split_inputs((1, 2, 3), 2, 0, False), tuple)
    assert isinstance(split_inputs(torch.arange(3), 2, 0, False), torch.Tensor)
    assert split_inputs(5, 2, 0, False) == 5
    assert split_inputs({"a": {"b": [1, 2]}}, 2, 1, False) == {"a": {"b": [2]}}


def test_rows_of_a_matrix_are_padded_by_its_last_row():
    data = torch.arange(6).view(3, 2)
    assert split_inputs(data, 2, 1, True).tolist() == [[4, 5], [4, 5]]


def test_the_messages_say_what_to_do():
    with pytest.raises(SettingError, match=r"values of different lengths: \{'a': 2, 'b': 1\}"):
        split_inputs({"a": [1, 2], "b": [1]}, 2, 0, False)
    with pytest.raises(WrongTypeError, match="Pass list"):
        split_inputs((1, 2, 3), 2, 0, True)
    with pytest.raises(IndexError, match="there is no last element to repeat"):
        split_inputs([], 2, 0, True)


def test_a_dataset_is_split_by_selecting_rows(monkeypatch):
    module = types.ModuleType("datasets.arrow_dataset")

    class Dataset:
        def __len__(self):
            return 5

        def select(self, rows):
            return list(rows)

    Dataset.__module__ = "datasets.arrow_dataset"
    monkeypatch.setitem(sys.modules, "datasets.arrow_dataset", module)
    assert split_inputs(Dataset(), 2, 0, False) == [0, 1, 2]
    assert split_inputs(Dataset(), 2, 1, False) == [3, 4]
    assert split_inputs(Dataset(), 2, 1, True) == [3, 4, 4]
    assert split_inputs(Dataset(), 4, 3, True) == [4, 4]


@given(st.integers(0, 200), st.integers(1, 20))
def test_shares_cover_everything_once_and_differ_by_one_at_most(length, count):
    shares = [share_of(length, count, index) for index in range(count)]
    assert [place for start, end in shares for place in range(start, end)] == list(range(length))
    sizes = [end - start for start, end in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(), min_size=1, max_size=30), st.integers(2, 9))
def test_padded_shares_are_equally_long_and_repeat_the_last_element(items, count):
    shares = [split_inputs(items, count, index, True) for index in range(count)]
    assert {len(share) for share in shares} == {-(-len(items) // count)}
    for index, share in enumerate(shares):
        real = split_inputs(items, count, index, False)
        assert share[: len(real)] == real
        assert set(share[len(real) :]) <= {items[-1]}


def test_a_function_runs_where_the_condition_holds_when_it_is_called():
    here = False

    def double(x):
        """Doc."""
        return 2 * x

    wrapped = only_if(lambda: here, double)
    assert wrapped(2) is None
    here = True
    assert wrapped(2) == 4
    assert (wrapped.__name__, wrapped.__doc__) == ("double", "Doc.")


class Counting(SingleProcess):
    def __init__(self, log):
        self.log = log

    def barrier(self):
        self.log.append("barrier")


@pytest.mark.parametrize(("first", "order"), [(True, ["body", "barrier"]), (False, ["barrier", "body"])])
def test_the_others_wait_for_the_first(first, order):
    log = []
    with goes_first(Counting(log), first):
        log.append("body")
    assert log == order


def test_the_others_are_let_go_when_the_first_one_fails():
    log = []
    with pytest.raises(KeyError), goes_first(Counting(log), True):
        raise KeyError
    assert log == ["barrier"]


def test_observations_are_read_by_number_of_processes():
    assert on(2, {"P1": 1, "P2": 2}) == 2
    assert on(2, [1]) == [1]
