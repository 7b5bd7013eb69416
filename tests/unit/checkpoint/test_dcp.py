"""Sharded checkpoints of torch are read as data, whatever is in them."""

from __future__ import annotations

import io
import os
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from accelerate.checkpoint import dcp, layout, trust
from accelerate.checkpoint.trust import Record, read_records
from accelerate.core.errors import CheckpointError
from tests.fault.bounded import MB, cost_of

from .support import same_bits

StorageInfo = torch_dcp.filesystem._StorageInfo


def save(state: dict[str, Any], folder: Path) -> Path:
    """Let torch write `state`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        torch_dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = dcp.read_folder(folder)
    return {name: dcp.read_tensor(found, name) for name in found.weights}


WEIGHTS = {
    "0.weight": torch.arange(6.0).reshape(2, 3),
    "0.bias": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "none": torch.empty(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "part": torch.arange(10.0)[2:5],
}


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    found = read(save({"model": WEIGHTS}, tmp_path / "c"))
    assert same_bits({name: found[name] for name in WEIGHTS}, WEIGHTS)


def test_weights_that_lie_under_no_key_keep_their_names(tmp_path: Path) -> None:
    assert read(save(dict(WEIGHTS), tmp_path / "c")).keys() == WEIGHTS.keys()
    assert read(save({"model.0": torch.ones(1)}, tmp_path / "flat")).keys() == {"model.0"}


def test_what_is_no_weight_is_told_and_not_read(tmp_path: Path) -> None:
    folder = save({"model": {"w": torch.ones(2), "extra": {"a": 1}}, "optim": {"m": torch.ones(3)}}, tmp_path / "c")
    found = dcp.read_folder(folder)
    assert found.weights.keys() == {"w"}
    assert set(found.others) == {"model.extra.a", "optim.m"}
    assert {entry.key for entry in found.tensors} == {"model.w", "optim.m"}


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(layout.MissingFile, match="is no sharded checkpoint"):
        dcp.read_folder(tmp_path)


# Damage ---------------------------------------------------------------------------------------------------------------


def described(tmp_path: Path, **changes: Any) -> Path:
    """Write a description of one tensor of four numbers in two pieces, changed, and the pieces."""
    options = {
        "chunks": [((0,), (2,)), ((2,), (2,))], "size": (4,), "dtype": torch.float32, "file": "__0_0.distcp",
        "content": torch.ones(2), "longer": 0, "transform": None, "shared": False,
    }  # fmt: skip
    options |= changes
    stream = io.BytesIO()
    torch.save(options["content"], stream)
    blob = stream.getvalue()
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in options["chunks"]]
    tensor = TensorStorageMetadata(TensorProperties(options["dtype"]), torch.Size(options["size"]), chunks)
    places = {
        MetadataIndex("w", chunk.offsets, number): StorageInfo(
            options["file"],
            number * len(blob) * (not options["shared"]),
            len(blob) + options["longer"],
            options["transform"],
        )
        for number, chunk in enumerate(chunks)
    }
    content = Metadata({"w": tensor, "b": BytesStorageMetadata()}, {"w": ("w",)}, places)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    (folder / "__0_0.distcp").write_bytes(blob * len(chunks))
    return folder


def test_a_description_as_this_test_writes_it_is_read(tmp_path: Path) -> None:
    assert read(described(tmp_path)) == {"w": pytest.approx(torch.ones(4))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": [((0,), (2,))]}, "do not make up its shape"),
        ({"chunks": [((0,), (2,)), ((1,), (2,))]}, "overlap"),
        ({"chunks": [((0,), (2,)), ((3,), (2,))]}, "lies outside it"),
        ({"chunks": [((0, 0), (2, 1)), ((2, 0), (2, 1))]}, "another number of dimensions"),
        ({"chunks": [((0,), (2,)), ((2,), (2**60,))], "size": (2**60 + 2,)}, "bytes cannot hold"),
        ({"file": "../outside"}, "outside its folder"),
        ({"file": "/etc/passwd"}, "outside its folder"),
        ({"file": "link"}, "outside its folder"),
        ({"file": "gone"}, "missing or too short"),
        ({"longer": 1}, "two pieces share bytes"),
        ({"longer": 1, "chunks": [((0,), (4,))], "content": torch.ones(4)}, "missing or too short"),
        ({"shared": True}, "two pieces share bytes"),
        ({"content": torch.ones(3)}, "in place of"),
        ({"content": torch.ones(2, dtype=torch.int32)}, "in place of"),
        ({"content": torch.ones(1).expand(2)}, None),
        ({"content": {"not": "a tensor"}}, "is a dict, no tensor"),
        ({"transform": ["zstd"]}, "compressed"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    (tmp_path / "outside").write_bytes(b"")
    folder = described(tmp_path, **changes)
    (folder / "link").symlink_to(tmp_path / "outside")
    if message is None:
        assert read(folder)
        return
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_pieces_in_two_dimensions_are_put_together_and_overlaps_are_seen(tmp_path: Path) -> None:
    quarters = [((row, column), (2, 2)) for row in (0, 2) for column in (0, 2)]
    folder = described(tmp_path, chunks=quarters, size=(4, 4), content=torch.ones(2, 2))
    assert torch.equal(read(folder)["w"], torch.ones(4, 4))
    (tmp_path / "b").mkdir()
    crossed = [((0, 0), (4, 2)), ((0, 2), (2, 2)), ((1, 2), (2, 2))]
    with pytest.raises(CheckpointError, match="overlap"):
        dcp.read_folder(described(tmp_path / "b", chunks=crossed, size=(4, 4)))


def test_a_shape_that_no_tensor_has_is_refused_before_it_is_multiplied(tmp_path: Path) -> None:
    large = (2**63 - 1,) * 50_000
    folder = described(tmp_path, chunks=[(large, large)], size=large)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="shape in it that no tensor can have"):
        dcp.read_folder(folder)
    assert time.process_time() - begin < 2


# Pickles --------------------------------------------------------------------------------------------------------------


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


def test_code_in_the_description_never_runs(tmp_path: Path) -> None:
    folder = described(tmp_path)
    good = pickle.loads((folder / ".metadata").read_bytes())
    canary = tmp_path / "ran"
    good.planner_data = Canary(canary)
    for content in (good, Canary(canary), {"x": Canary(canary)}):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"is refused: it names posix\.mkdir"):
            read(folder)
    assert not canary.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert canary.exists(), "the canary would not have sung"


def test_code_in_a_piece_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    folder = described(tmp_path, content=Canary(canary))
    with pytest.raises(CheckpointError, match="is refused"):
        read(folder)
    assert not canary.exists()


def test_values_that_are_no_tensors_are_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    folder = save({"model": {"w": torch.ones(2), "extra": Canary(canary)}}, tmp_path / "c")
    assert read(folder).keys() == {"w"}
    assert not canary.exists()


@pytest.mark.parametrize("name", ["numpy.ndarray", "builtins.getattr", "torch.load", "torch.nn.Linear", "a.b.c"])
def test_only_the_classes_of_the_description_are_known(tmp_path: Path, name: str) -> None:
    module, _, short = name.rpartition(".")
    (tmp_path / "p").write_bytes(b"c" + f"{module}\n{short}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=f"it names {name}"):
        read_records(tmp_path / "p", {("collections", "OrderedDict")})


def test_an_allowed_class_becomes_a_record_and_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(pickle.dumps(ChunkStorageMetadata(torch.Size([1]), torch.Size([2]))))
    classes = {("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata")}
    found = read_records(tmp_path / "p", classes)
    assert isinstance(found, Record)
    assert (found.kind, found.state) == ("ChunkStorageMetadata", {"offsets": (1,), "sizes": (2,)})


CLASS = b"cm\nC\n"
DEEP = b")" + b"\x85" * 2_000_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"}" + DEEP + b"K\x01s.", "a tuple is a key", id="the hash of a deep tuple ends the process"),
        pytest.param(CLASS + b"}b.", "no record", id="a class is changed"),
        pytest.param(b"ctorch\nSize\n}b.", "no record", id="a function is changed"),
        pytest.param(CLASS + b"\x29\x81}s.", "", id="a record is no dictionary"),
        pytest.param(b"\x8e" + (2**62).to_bytes(8, "little") + b"x.", "plain data", id="bytes"),
        pytest.param(b"\x95" + (2**62).to_bytes(8, "little") + b"N", "EOF", id="a frame larger than all memory"),
        pytest.param(b"\x58" + (2**32 - 1).to_bytes(4, "little") + b"N.", "", id="a text larger than the file"),
        pytest.param(b"P1\n.", "plain data", id="a persistent object"),
        pytest.param(b"\x82\x01.", "plain data", id="an extension"),
        pytest.param(b"cpathlib\nPath\n(]tR.", "", id="a path of a list"),
        pytest.param(b"h\x05.", "Memo value not found", id="something that was never said"),
        pytest.param(b"", "EOF", id="nothing"),
        pytest.param(b"]" + b"0" * 3, "plain data", id="an instruction that is left out"),
    ],
)
def test_a_hostile_pickle_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "p").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"(refused|damaged).*{reason}"):
        read_records(tmp_path / "p", {("m", "C")})
    assert time.perf_counter() - start < 30


def test_lists_of_lists_of_lists_cost_no_more_than_they_say(tmp_path: Path) -> None:
    # Each holds the one before it twice: printed, they would have more letters than there are atoms.
    nested = b"]\x94" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e\x94" for n in range(200))
    (tmp_path / "p").write_bytes(nested + b".")
    assert isinstance(read_records(tmp_path / "p", set()), list)
    (tmp_path / "p").write_bytes(b"cpathlib\nPath\n(" + nested + b"tR.")
    with pytest.raises(CheckpointError):
        read_records(tmp_path / "p", set())


def test_what_is_used_again_and_again_costs_no_more_than_the_file(tmp_path: Path) -> None:
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000
    (tmp_path / "p").write_bytes(b"cpathlib\nPath\n(" + text + b"q\0" + b"h\0" * 5_000 + b"tR.")
    cost = cost_of(lambda: read_records(tmp_path / "p", set()))
    assert cost.is_clean
    assert "again and again" in cost.error
    assert cost.memory < 50 * MB


def test_the_name_of_a_tensor_is_a_text_and_nothing_that_is_large_when_printed(tmp_path: Path) -> None:
    def record(name: str, state: bytes) -> bytes:
        return b"ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n)\x81" + state + b"b"

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    name = b"]"
    for number in range(40):  # each holds the one before it twice
        name = b"](" + name + b"q%ch%ce" % (number, number)
    place = b"}" + text("fqn") + name + b"s"
    stored = b"}" + record("MetadataIndex", place) + record("_StorageInfo", b"}") + b"s"
    content = record("Metadata", b"}(" + text("storage_data") + stored + text("state_dict_metadata") + b"}u")
    (tmp_path / ".metadata").write_bytes(content.replace(b"metadata\n_StorageInfo", b"filesystem\n_StorageInfo") + b".")
    cost = cost_of(lambda: dcp.read_folder(tmp_path))
    assert cost.is_clean
    assert "the name of a tensor is no text" in cost.error
    assert cost.memory < 50 * MB


def test_a_pickle_of_more_objects_than_are_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_MAX_STEPS", 1000)
    (tmp_path / "p").write_bytes(b"(" + b"}" * 999 + b"t.")
    assert read_records(tmp_path / "p", set()) == ({},) * 999
    for content in (b"(" + b"}" * 1000 + b"t.", b")" + b"\x85" * 1001 + b".", b"N" + b"\x94" * 1001 + b"."):
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(CheckpointError, match="more than the 1000 objects"):
            read_records(tmp_path / "p", set())


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=300)
def test_a_changed_description_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.is_dir():
        described(tmp_path_factory.getbasetemp()).rename(folder)
        (folder / "good").write_bytes((folder / ".metadata").read_bytes())
    content = bytearray((folder / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / ".metadata").write_bytes(content)
    try:
        assert dcp.read_folder(folder).missing is not None
    except CheckpointError as error:
        assert "fuzzed" in str(error)
