"""safetensors files piece by piece: the header alone, and the same bytes as the library writes."""

from __future__ import annotations

import io
import json
import time
import weakref
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch

from accelerate.checkpoint import source
from accelerate.checkpoint.codec import STORABLE
from accelerate.checkpoint.tensor_file import TensorInfo, info_of, read_header, write_tensors
from accelerate.checkpoint.weights import load_weights
from accelerate.core.errors import CheckpointError
from tests.support.checkpoint_files import write_weights

from .support import same_bits


def every_type() -> dict[str, torch.Tensor]:
    """A tensor of each type that the format knows, and of unusual shapes."""
    torch.manual_seed(0)
    state = {
        f"layer.{dtype}": torch.randint(0, 2, (64,), dtype=torch.uint8).view(dtype).reshape(2, -1)
        for dtype in sorted(STORABLE, key=str)
        if dtype is not torch.bool
    }
    return {
        **state,
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        'quote " \\ é\n': torch.ones(2),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    state = every_type()
    library = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(library, tmp_path / "library.safetensors", metadata={"format": "pt"})
    tensors = {name: info_of(tensor) for name, tensor in reversed(state.items())}
    with (tmp_path / "own.safetensors").open("wb") as stream:
        write_tensors(stream, tensors, state.__getitem__, {"format": "pt"})
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_the_header_says_what_the_library_reads(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in every_type().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"by": "me"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.tensors == {name: info_of(tensor) for name, tensor in state.items()}
    assert header.metadata == {"by": "me"}
    assert header.num_bytes == (tmp_path / "a.safetensors").stat().st_size


def test_shards_and_back_are_the_same_file(tmp_path: Path) -> None:
    state = every_type()
    for name in ("whole", "many", "one"):
        (tmp_path / name).mkdir()
    write_weights(state, tmp_path / "whole" / "model.safetensors")
    source.rewrite(source.open_weights(tmp_path / "whole"), tmp_path / "many" / "model.safetensors", 100)
    source.rewrite(source.open_weights(tmp_path / "many"), tmp_path / "one" / "model.safetensors")
    assert len(list((tmp_path / "many").iterdir())) > 5
    whole, one = (tmp_path / name / "model.safetensors" for name in ("whole", "one"))
    assert one.read_bytes() == whole.read_bytes()
    assert same_bits(load_weights(tmp_path / "many"), {name: state[name] for name in load_weights(tmp_path / "many")})


def test_names_that_share_memory_go_with_the_tensor_they_show(tmp_path: Path) -> None:
    weight = torch.ones(4)
    (tmp_path / "many").mkdir()
    write_weights({"a": torch.zeros(4), "b": weight, "c": weight}, tmp_path / "model.safetensors")
    source.rewrite(source.open_weights(tmp_path), tmp_path / "many" / "model.safetensors", 16)
    loaded = load_weights(tmp_path / "many")
    assert loaded["c"] is loaded["b"]
    assert torch.equal(loaded["b"], weight)


def test_only_one_tensor_is_held_at_a_time() -> None:
    given: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(reference() is not None for reference in given)
        tensor = torch.zeros(10)
        given.append(weakref.ref(tensor))
        return tensor

    write_tensors(io.BytesIO(), dict.fromkeys("abc", TensorInfo("float32", (10,), 40)), read, {})
    assert len(given) == 3


def test_a_tensor_that_is_not_as_announced_is_refused() -> None:
    info = TensorInfo("float32", (3,), 12)
    with pytest.raises(CheckpointError, match="was announced as"):
        write_tensors(io.BytesIO(), {"a": info}, lambda _: torch.zeros(4), {})


def test_a_type_that_the_format_has_no_word_for_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'z' of complex128 has no safetensors form"):
        write_tensors(io.BytesIO(), {"z": TensorInfo("complex128", (1,), 16)}, torch.zeros, {})


def test_a_tensor_cannot_have_the_name_of_the_header_itself() -> None:
    with pytest.raises(CheckpointError, match="No tensor in a safetensors file can be called '__metadata__'"):
        write_tensors(io.BytesIO(), {"__metadata__": TensorInfo("float32", (1,), 4)}, lambda _: torch.ones(1), {})


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (2**63).to_bytes(8, "little") + b"{}",
        (10**8 + 1).to_bytes(8, "little") + b"{}",
        header(b"["),
        header(b"{" * 100_000),
        header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        header({"a": F32}),
        header({"a": F32}, b"1234567"),
        header({"a": F32}, b"123456789"),
        header({"a": {**F32, "shape": [3]}}, b"12345678"),
        header({"a": {**F32, "shape": [-2]}}, b"12345678"),
        header({"a": {**F32, "shape": [2**62, 2**62]}}, b"12345678"),
        header({"a": {**F32, "data_offsets": [8, 16]}}, b"1234567890123456"),
        header({"a": {**F32, "data_offsets": [8, 0]}}, b"12345678"),
        header({"a": F32, "b": F32}, b"12345678"),
        header({"a": {"dtype": "F32"}}, b""),
        header({"__metadata__": {"a": 1}}),
    ],
)
def test_a_header_that_does_not_fit_is_refused_with_the_name_of_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged"):
        read_header(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("shape", [[2**63 - 1] * 100_000 + [0], [1] * 65, [2**63]], ids=["long", "65", "large"])
def test_a_shape_that_no_tensor_has_is_refused_before_it_is_multiplied(tmp_path: Path, shape: list[int]) -> None:
    begin = time.process_time()
    for kind in ("F32", "F4"):
        entry = {"dtype": kind, "shape": shape, "data_offsets": [0, 0]}
        (tmp_path / "bad.safetensors").write_bytes(header({"a" * 10_000: entry}))
        with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged") as caught:
            read_header(tmp_path / "bad.safetensors")
        assert len(str(caught.value)) < 1000
    assert time.process_time() - begin < 2


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=300)
def test_a_changed_header_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    good = bytearray(safetensors.torch.save({"a": torch.ones(2), "b": torch.ones(1, dtype=torch.int8)}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good) - 1))
        good[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        hypothesis.assume(good)
    file.write_bytes(good)
    try:
        read_header(file)
    except CheckpointError as error:
        assert "fuzzed.safetensors is damaged" in str(error)
