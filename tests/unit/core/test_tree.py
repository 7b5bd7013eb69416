from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate.core.tree import honor_type, is_namedtuple, tree_leaves, tree_map, tree_zip_map

Pair = namedtuple("Pair", "first second")

trees = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.builds(OrderedDict, st.dictionaries(st.integers(), inner, max_size=3))
    ),
    max_leaves=12,
)


def shape(data):
    """Return the containers of `data` with their exact types, without its leaves."""
    if isinstance(data, (list, tuple)):
        return type(data), [shape(item) for item in data]
    if isinstance(data, dict):
        return type(data), [(key, shape(value)) for key, value in data.items()]
    return None


@settings(max_examples=60)
@given(trees)
def test_mapping_keeps_containers_and_visits_each_leaf_once(data):
    seen = []
    mapped = tree_map(lambda leaf: (seen.append(leaf), leaf)[1], data)
    assert shape(mapped) == shape(data)
    assert mapped == data
    assert seen == list(tree_leaves(data))


@settings(max_examples=60)
@given(trees)
def test_mapping_changes_nothing_in_place(data):
    before = repr(data)
    tree_map(lambda leaf: "other", data)
    assert repr(data) == before


@settings(max_examples=60)
@given(trees)
def test_zipping_pairs_the_leaves_at_the_same_place(data):
    other = tree_map(lambda leaf: ("o", repr(leaf)).__repr__(), data)
    pairs = []
    tree_zip_map(lambda a, b: pairs.append((a, b)), data, other)
    assert pairs == list(zip(tree_leaves(data), tree_leaves(other), strict=True))


def test_zipping_refuses_containers_of_other_lengths():
    with pytest.raises(ValueError, match="zip"):
        tree_zip_map(lambda a, b: a, [1, 2], [1])


def test_named_tuples_are_told_from_tuples():
    assert is_namedtuple(Pair(1, 2))
    assert not is_namedtuple((1, 2))
    assert not is_namedtuple([1])


def test_the_type_of_a_sequence_is_kept():
    assert honor_type(Pair(0, 0), iter([1, 2])) == Pair(1, 2)
    assert type(honor_type(Pair(0, 0), iter([1, 2]))) is Pair
    assert type(honor_type((0,), [1])) is tuple
    assert type(honor_type([0], (1,))) is list


def test_mappings_of_other_classes_keep_their_class():
    mapped = tree_map(lambda leaf: leaf + 1, UserDict(a=1))
    assert type(mapped) is UserDict
    assert mapped["a"] == 2
