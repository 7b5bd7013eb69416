"""State dictionaries become JSON and tensors, and come back exactly."""

from __future__ import annotations

import collections
import enum
import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate.checkpoint.codec import decode, encode
from accelerate.checkpoint.files import TensorFile
from accelerate.checkpoint.train_state import plan_state, read_state
from accelerate.core.errors import CheckpointError

from .support import same_bits, write


def through_json(state: Any) -> Any:
    tree, tensors = encode(state)
    return decode(msgspec.json.decode(msgspec.json.encode(tree)), tensors)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.binary()
_TEXT = st.text(st.characters())  # lone surrogates too
_KEYS = _TEXT | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.tuples(st.integers(), _TEXT)
_STATES = st.recursive(
    _SCALARS | _TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(_KEYS, inner) | st.tuples(inner, inner) | st.dictionaries(_TEXT, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(_STATES)
def test_any_nesting_comes_back(state: Any) -> None:
    assert same_bits(through_json(state), state)


def test_a_float_keeps_its_bits() -> None:
    values = [0.1, -0.0, 1e308, 5e-324, 1e16, 3.0, math.inf, -math.inf, struct.unpack(">d", b"\x7f\xf8\0\0\0\0\0\5")[0]]
    found = through_json(values)
    assert [struct.pack(">d", value) for value in found] == [struct.pack(">d", value) for value in values]


@pytest.mark.parametrize(
    "state",
    [
        {"$type": "tensor", "name": "x"},
        {1: "a", "1": "b", (2, "c"): None, False: 0},
        {2**70: -(2**70), "deep": [[[{}]]]},
        {"empty": [], "t": (), "d": {}},
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter({1: 1, 3: 2}),
        collections.defaultdict(list, {"a": [1]}),
        torch.Size([1, 2]),
        torch.bfloat16,
        torch.device("cuda", 1),
        b"\0\xff",
    ],
    ids=repr,
)
def test_kinds_of_values(state: Any) -> None:
    assert same_bits(through_json(state), state)


def test_sets_and_deques() -> None:
    state = {"s": {1, "a"}, "f": frozenset([2]), "d": collections.deque([1, 2], maxlen=3)}
    found = through_json(state)
    assert found == state
    assert found["d"].maxlen == 3
    assert type(found["f"]) is frozenset


_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
    torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)], ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Any) -> None:
    content = torch.randint(0, 255, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        content %= 2
    state = {"x": content.view(dtype).reshape(shape)}
    write(tmp_path, plan_state("s", state))
    assert same_bits(read_state(tmp_path, "s"), state)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.zeros((0, 2)),
        np.array(3.5),
        np.array(["ab", "c"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.float32("nan"),
        np.float64(0.1),
        np.bool_(True),
        np.str_("x"),
        np.int64(-1),
    ],
    ids=repr,
)
def test_numpy(value: Any) -> None:
    assert same_bits(through_json({"v": value})["v"], value)


def test_an_array_that_was_read_can_be_changed() -> None:
    found = through_json(np.zeros(2))
    found[0] = 1
    assert found[0] == 1


def test_views_and_parameters(tmp_path: Any) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    state = {
        "row": base[1],
        "column": base[:, 1],
        "again": base,
        "conj": torch.tensor([1 + 2j]).conj(),
        "image": image,
        "p": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
    }
    write(tmp_path, plan_state("s", state))
    found = read_state(tmp_path, "s")
    assert same_bits(found, state)
    assert found["image"].stride() == image.stride()
    assert (found["p"].requires_grad, found["grad"].requires_grad) == (False, True)
    found["row"][0] = 100
    assert found["again"][1, 0] == 4


def test_names_that_look_alike_stay_apart(tmp_path: Any) -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1), 0: torch.ones(2), "0": torch.zeros(2)}}
    state |= {"__metadata__": torch.ones(3), "\ud800": torch.zeros(3), "tensor #3": torch.ones(4)}
    write(tmp_path, plan_state("s", state))
    assert same_bits(read_state(tmp_path, "s"), state)


class Mode(str, enum.Enum):
    TRAIN = "train"


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: 0, "function"),
        (Mode.TRAIN, "Mode"),
        (Pair(1, 2), "Pair"),
        (torch.Generator(), "get_state"),
        (object(), "object"),
        (np.array([object()]), "numpy"),
        (torch.zeros(2, device="meta"), "tensor"),
        (torch.eye(2).to_sparse(), "sparse"),
        (collections.defaultdict(lambda: 0), "default_factory"),
        (int, "class"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_refused_by_its_place(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode({"sched": [0, {"fn": value}]}, "custom_checkpoint_0")
    message = str(caught.value)
    assert "custom_checkpoint_0 -> 'sched' -> 1 -> 'fn'" in message
    assert words in message
    assert len(message.splitlines()) == 2, "a remedy is missing"


def test_a_list_in_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="contains itself"):
        encode({"loop": loop})
    assert encode([[], []])[0] == [[], []]


@pytest.mark.parametrize(
    "tree",
    [
        {"$type": "os.system", "items": []},
        {"$type": "tensor", "name": "absent"},
        {"$type": "sequence", "kind": "list2", "items": []},
        {"$type": "array", "name": "x", "dtype": "O", "shape": [1]},
        {"$type": "array", "name": "x", "dtype": "<f8", "shape": [1000]},
        {"$type": "torch", "kind": "dtype", "value": "save"},
        {"$type": "dict", "items": [[[], 1]]},
        {"$type": "dict", "kind": "defaultdict", "items": [], "factory": "eval"},
        {"$type": "tensor", "name": "x", "stride": [1000000000]},
        {"$type": "int", "hex": "zz"},
        {"$type": "float", "bits": "00"},
    ],
    ids=repr,
)
def test_a_hostile_tree_is_an_error(tree: Any) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        decode({"a": tree}, {"x": torch.zeros(4)})


def test_tensors_are_not_copied_by_encoding() -> None:
    tensor = torch.zeros(4)
    _, tensors = encode({"x": tensor})
    assert tensors["x"].data_ptr() == tensor.data_ptr()


def test_a_deep_file_is_an_error(tmp_path: Any) -> None:
    depth = 100_000
    (tmp_path / "s.json").write_text('{"format":1,"num_tensors":0,"state":' + "[" * depth + "]" * depth + "}")
    TensorFile("s.safetensors", {"x": torch.zeros(1)}).write(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path, "s")
