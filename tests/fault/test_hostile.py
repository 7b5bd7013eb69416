"""What a stranger may have written: a clean error within two seconds and little memory, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from accelerate.checkpoint import codec, commit, layout, manifest, train_state, weights
from accelerate.core.errors import CheckpointError
from tests.fault.bounded import MB, cost_of, size_of
from tests.support.checkpoint_files import write_safetensors, write_state, write_weights
from tests.unit.checkpoint.support import Counter, Run


def costs_little(folder: Path, action: Callable[[], Any]) -> str:
    """Run `action`, which has to raise cleanly; return the error."""
    cost = cost_of(action, apart=size_of(folder) > 2 * MB)
    assert cost.is_clean, cost
    assert cost.memory <= size_of(folder) + 50 * MB, f"{cost.memory / MB:.0f} MB: {cost.error[:300]}"
    assert cost.seconds <= 2, cost
    assert len(cost.error) < 3000, "the message is as long as the attack"
    assert not set(cost.error) & {chr(code) for code in (*range(9), *range(11, 32), 127)}, repr(cost.error)
    return cost.error


def short(name: str) -> str:
    """Call a test after what is special about it, in a line that a terminal can show."""
    return ascii(name if len(name) < 40 else f"{name[:10]} and {len(name) - 10} more")


# An index of shards ---------------------------------------------------------------------------------------------------


def index(folder: Path, content: Any) -> Callable[[], Any]:
    (folder / layout.SAFE_WEIGHTS_INDEX_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    return lambda: weights.load_weights(folder)


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../secret.safetensors", "sub/../../secret.safetensors", "link.safetensors", "deep/model.safetensors",
     "a\0b", "\x1b[2Jx", "x" * 5000, "", ".", "..", "absent.safetensors", "/dev/zero", "pipe", "C:\\x", "..\\secret"],
    ids=short,
)  # fmt: skip
def test_shards_elsewhere(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write_safetensors({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    os.mkfifo(folder / "pipe")
    text = costs_little(folder, index(folder, {"weight_map": {"x": shard}}))
    assert layout.SAFE_WEIGHTS_INDEX_NAME in text


def made(content: Any) -> Any:
    """Return the content of a file. Large ones are made when they are needed: forks copy what the test process holds."""
    return content() if callable(content) else content


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"weight_map": {f"t{number}": "model.safetensors" for number in range(1_000_000)}},
        lambda: {"weight_map": {f"t{number}": f"s{number}" for number in range(100_000)}},
        {"weight_map": {"x" * 5000: "absent"}},
        {"weight_map": ["x"]},
        {"weight_map": {"x": {"y": "z"}}},
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": {}, "weight_map": {"a": "y"}}',
        '{"weight_map": NaN}',
        '{"x": ' + "[" * 10_000 + "]" * 10_000 + ', "weight_map": {}}',
        '\ufeff{"weight_map": {}}',
        "",
    ],
    ids=["1e6", "1e5 shards", "long", "list", "nested", "twice", "twice outside", "NaN", "deep", "BOM", "empty"],
)
def test_an_index_of_the_wrong_kind(tmp_path: Path, content: Any) -> None:
    assert layout.SAFE_WEIGHTS_INDEX_NAME in costs_little(tmp_path, index(tmp_path, made(content)))


# Safetensors ----------------------------------------------------------------------------------------------------------


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "short": b"\x01\0\0",
    "longer than the file": safetensors_file({}, length=100),
    "100 MB": safetensors_file({}, length=100_000_000),
    "100 MB that are there": lambda: safetensors_file(b" " * 100_000_000),
    "100 MB of names": lambda: safetensors_file(
        b"{"
        + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(1_500_000))
        + b"}"
    ),
    "all ones": safetensors_file({}, length=2**64 - 1),
    "overlap": safetensors_file({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "hole": safetensors_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "beyond": safetensors_file({"a": entry(0, 4)}, bytes(2)),
    "rest": safetensors_file({"a": entry(0, 4)}, bytes(8)),
    "backwards": safetensors_file({"a": entry(4, 0)}, bytes(4)),
    "overflow": safetensors_file({"a": entry(0, 4, [2**63, 2**63])}, bytes(4)),
    "huge": safetensors_file({"a": entry(0, 2**62, [2**60])}, bytes(4)),
    "negative": safetensors_file({"a": entry(0, 4, [-1])}, bytes(4)),
    "huge numbers": safetensors_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}'),
    "twice": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "dtype": safetensors_file({"a": entry(0, 4, dtype="F33")}, bytes(4)),
    "other size": safetensors_file({"a": entry(0, 4, dtype="F64")}, bytes(4)),
    "odd dtype": safetensors_file({"a": entry(0, 3, [4], "F6_E2M3")}, bytes(3)),
    "deep": safetensors_file(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "list": safetensors_file(b"[]"),
    "metadata": safetensors_file({"__metadata__": {"tied": "[" * 10_000}}),
    "tied": safetensors_file({"__metadata__": {"tied": '{"a": 1}'}}),
    "tied list": safetensors_file({"__metadata__": {"tied": "[]"}}),
    "metadata of numbers": safetensors_file({"__metadata__": {"a": 1}}),
    "ANSI": safetensors_file({"\x1b[2J\x1b]0;x\x07": entry(0, 5)}, bytes(5)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(made(HEADERS[name]))
    assert "model.safetensors" in costs_little(tmp_path, lambda: weights.load_weights(tmp_path))


def test_a_header_that_asks_for_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_file({"a": entry(0, 0, [2**40, 0])}))
    assert weights.load_weights(tmp_path)["a"].shape == (2**40, 0)


NAMES = [
    "../../x",
    "/etc/x",
    "a\0b",
    "x" * 5000,
    "\x1b[31mred\x1b[0m",
    "\u202ereversed",
    "",
    ".",
    "__metadata__x",
    "\n",
]


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_names_of_tensors_are_only_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    write_weights({name: torch.ones(3), "other": torch.zeros(3)}, folder / "model.safetensors", 12)
    write_weights({name: torch.ones(3), "other": torch.zeros(3)}, folder / "pytorch_model.bin", 12)
    written = {path.name for path in folder.iterdir()}
    assert written == {
        *(f"model-0000{number}-of-00002.safetensors" for number in (1, 2)), layout.SAFE_WEIGHTS_INDEX_NAME,
        *(f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)), layout.WEIGHTS_INDEX_NAME,
    }  # fmt: skip
    assert weights.load_weights(folder)[name].eq(1).all()
    for path in folder.iterdir():
        path.unlink()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    write_state(folder, "custom_checkpoint_0", {name: torch.ones(2)})
    assert train_state.read_state(folder, "custom_checkpoint_0")[name].eq(1).all()
    assert sorted(os.listdir(folder)) == ["custom_checkpoint_0.json", "custom_checkpoint_0.safetensors"]


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_messages_spell_names_out(tmp_path: Path, name: str) -> None:
    write_safetensors({name: torch.ones(3)}, tmp_path / "model.safetensors")
    run = Run().having(models=[torch.nn.Linear(1, 1)])
    with pytest.raises(CheckpointError) as caught:
        run.load(tmp_path, strict=False)
    assert not set(str(caught.value)) & {"\x1b", "\0", "\u202e", "\r"}
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None, "what torch said is not printed too"


# States ---------------------------------------------------------------------------------------------------------------


def document(state: str, tensors: int = 0) -> bytes:
    return b'{"format":1,"num_tensors":%d,"state":%s}\n' % (tensors, state.encode())


def node(type_: Any, /, **fields: Any) -> str:
    return json.dumps({"$type": type_, **fields})


DOCUMENTS: dict[str, bytes | Callable[[], bytes]] = {
    "deep lists": document("[" * 10_000 + "]" * 10_000),
    "deep objects": document('{"a":' * 10_000 + "1" + "}" * 10_000),
    "deep nodes": document('{"$type":"sequence","kind":"tuple","items":[' * 300 + "]}" * 300),
    "100 MB of brackets": lambda: document("[" * 100_000_000),
    "100 MB of lists": lambda: document("[" + "[]," * 33_000_000 + "[]]"),
    "100 MB of objects": lambda: document("[" + "{}," * 33_000_000 + "{}]"),
    "100 MB of numbers": lambda: document("[" + "0," * 50_000_000 + "0]"),
    "100 MB of digits": lambda: document("9" * 100_000_000),
    "twice": document('{"a":1,"a":2}'),
    "twice at the top": b'{"format":1,"format":1,"num_tensors":0,"state":{}}',
    "NaN": document("NaN"),
    "Infinity": document("[1,Infinity]"),
    "huge float": document("1e999"),
    "huge integer": document("9" * 5000),
    "format": document("{}").replace(b'"format":1', b'"format":99'),
    "format as text": document("{}").replace(b'"format":1', b'"format":"1"'),
    "negative format": document("{}", -1),
    "tensors that are not there": document("{}", 3),
    "a field more": document("{}").replace(b"{", b'{"x":1,', 1),
    "list": b"[]",
    "empty": b"",
    "surrogate": document('"\\ud800"'),
    "bytes": b"\xff\xfe" + document("{}"),
    "type": document(node("os.system", items=["x"])),
    "type as number": document(node(3)),
    "int": document(node("int", hex="zz")),
    "float": document(node("float", bits="00")),
    "float as list": document(node("float", bits=[])),
    "bytes of words": document(node("bytes", hex="xyz")),
    "text": document(node("str", hex="ff")),
    "kind": document(node("sequence", kind="list", items=[])),
    "kind of another": document(node("dict", kind="dict2", items=[])),
    "pairs": document(node("dict", items=[[1, 2, 3]])),
    "unhashable": document(node("dict", items=[[[], 1]])),
    "counter": document(node("sequence", kind="deque", items=[], maxlen=2**70)),
    "deque": document(node("sequence", kind="deque", items=[], maxlen=-1)),
    "factory": document(node("dict", kind="defaultdict", items=[], factory="eval")),
    "dtype": document(node("torch", kind="dtype", value="save")),
    "a module": document(node("torch", kind="dtype", value="_dynamo")),
    "device": document(node("torch", kind="device", value="elsewhere:1")),
    "size as dict": document(node("torch", kind="size", value={"a": 1})),
    "torch": document(node("torch", kind="load", value="x")),
    "scalar": document(node("scalar", dtype="V1000000000", hex="")),
    "scalar of objects": document(node("scalar", dtype="O", hex="00" * 8)),
    "scalar of parts": document(node("scalar", dtype="O,O", hex="00" * 16)),
    "scalar of many": document(node("scalar", dtype="(100000,100000)f8", hex="00" * 8)),
    "no tensor": document(node("tensor", name="x")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / "optimizer.json").write_bytes(made(DOCUMENTS[name]))
    assert "optimizer" in costs_little(tmp_path, lambda: train_state.read_state(tmp_path, "optimizer"))


TENSORS = {
    "shape": node("array", name="x", dtype="<f8", shape=[2**60]),
    "larger shape": node("array", name="x", dtype="<f8", shape=[2**70]),
    "many dims": node("array", name="x", dtype="|u1", shape=[1] * 1000),
    "negative shape": node("array", name="x", dtype="<f8", shape=[-1]),
    "product": node("array", name="x", dtype="<f8", shape=[2**32, 2**32]),
    "void": node("array", name="x", dtype="V1000000000", shape=[1]),
    "text": node("array", name="x", dtype="<U1000000000", shape=[1]),
    "objects": node("array", name="x", dtype="O", shape=[1]),
    "objects by another name": node("array", name="x", dtype="|O8", shape=[1]),
    "a class": node("array", name="x", dtype="object", shape=[1]),
    "parts": node("array", name="x", dtype="i4,O", shape=[1]),
    "parts of parts": node("array", name="x", dtype="(1000000,1000000)f8", shape=[0]),
    "time": node("array", name="x", dtype="<M8[" + "9" * 5000 + "s]", shape=[1]),
    "strides": node("tensor", name="x", stride=[10**9]),
    "no stride": node("tensor", name="x", stride=[0]),
    "negative stride": node("tensor", name="x", stride=[-1]),
    "many strides": node("tensor", name="x", stride=[1] * 10),
    "huge stride": node("tensor", name="x", stride=[2**70]),
    "bytes of": node("tensor", name="x", bytes_of="float8_e8m0fnu", shape=[2**60]),
    "bytes of other": node("tensor", name="x", bytes_of="complex128", shape=[2**40, 2**40]),
    "bytes of bits": node("tensor", name="x", bytes_of="bits1x8", shape=[-5]),
    "bytes of nothing": node("tensor", name="x", bytes_of="load", shape=[1]),
    "gradient of integers": node("tensor", name="i", requires_grad=True),
    "a thousand times": "[" + ",".join([node("tensor", name="x")] * 1000) + "]",
    "a million times": "[" + ",".join([node("array", name="x", dtype="|u1", shape=[4])] * 100_000) + "]",
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_asked_for(tmp_path: Path, name: str) -> None:
    write_safetensors({"x": torch.ones(2**18), "i": torch.ones(3, dtype=torch.int64)}, tmp_path / "s.safetensors")
    (tmp_path / "s.json").write_bytes(document(TENSORS[name], 2))
    assert "s.json" in costs_little(tmp_path, lambda: train_state.read_state(tmp_path, "s"))


def test_names_that_tie_themselves_to_one_tensor_are_no_tensors_of_a_state(tmp_path: Path) -> None:
    tied = {f"t{number}": "x" for number in range(999)}
    write_safetensors({"x": torch.ones(2**18)}, tmp_path / "s.safetensors", tied)
    state = "[" + ",".join(node("tensor", name=name) for name in ["x", *tied]) + "]"
    (tmp_path / "s.json").write_bytes(document(state, 1000))
    assert "1000 tensors are named, and 1 are there" in costs_little(
        tmp_path, lambda: train_state.read_state(tmp_path, "s")
    )


def test_the_tensors_of_a_state_are_lost(tmp_path: Path) -> None:
    write_state(tmp_path, "s", {"x": torch.ones(1)})
    (tmp_path / "s.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"s\.safetensors, which is not there"):
        train_state.read_state(tmp_path, "s")


def test_a_state_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.checkpoint.documents.MAX_VALUES", 1000)
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0 has [\s\S]*as a tensor"):
        write_state(tmp_path, "custom_checkpoint_0", list(range(2000)))
    assert os.listdir(tmp_path) == []


def test_weights_that_could_not_be_read_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.ones(1) for number in range(20)}
    monkeypatch.setattr(weights, "MAX_TENSORS", 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors would name 20 tensors"):
        write_weights(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "MAX_INDEXED", 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json would name"):
        write_weights(state, tmp_path / "model.safetensors", 4)


@pytest.mark.parametrize(
    ("stem", "state"),
    [
        *(("optimizer", text) for text in ("null", "[]", "3", '"x"', '{"state":[],"param_groups":[]}')),
        ("optimizer", '{"state":{},"param_groups":[{"params":3}]}'),
        *(("scheduler", text) for text in ("null", "3", '"x"')),
        *(("random_states_0", text) for text in ("null", "[]", "3", '"x"', '{"random_state":3}')),
    ],
)
@pytest.mark.filterwarnings("ignore:Random states not restored")
def test_states_of_another_kind(tmp_path: Path, stem: str, state: str) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    run = Run().having(
        models=[model], optimizers=[optimizer], schedulers=[torch.optim.lr_scheduler.StepLR(optimizer, 1)]
    )
    run.save(tmp_path)
    (tmp_path / f"{stem}.json").write_bytes(document(state))
    (tmp_path / f"{stem}.safetensors").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=stem if stem != "random_states_0" else "random"):
        run.load(tmp_path, verify="off")


# Journals and manifests -----------------------------------------------------------------------------------------------


def pending(folder: Path, journal: bytes) -> None:
    inner = folder / layout.COMMIT_NAME / folder.name
    inner.mkdir(parents=True)
    (inner / "model.safetensors").write_bytes(b"new")
    (inner.parent / layout.JOURNAL_NAME).write_bytes(journal)


@pytest.mark.parametrize(
    "journal",
    [
        {"folder": "c", "remove": ["../victim"]},
        {"folder": "c", "remove": ["/etc/hostname"]},
        {"folder": "c", "remove": ["link/victim"]},
        {"folder": "c", "remove": ["a\0b"]},
        {"folder": "c", "remove": [""]},
        {"folder": "c", "remove": ["."]},
        {"folder": "..", "remove": []},
        {"folder": "../../elsewhere", "remove": []},
        {"folder": "/tmp", "remove": []},
        {"folder": "", "remove": []},
        {"folder": "c", "remove": [1]},
        {"folder": "c", "remove": "model.safetensors"},
        {"folder": "\x1b[2J", "remove": ["../victim"]},
        [],
        None,
    ],
    ids=str,
)
def test_journals(tmp_path: Path, journal: Any) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "victim").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    pending(folder, msgspec.json.encode(journal))
    before = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "/c/" not in str(path)}
    costs_little(tmp_path, lambda: commit.recover(folder))
    after = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "/c/" not in str(path)}
    assert after == before


@pytest.mark.parametrize("what", ["folder", "source", "journal", "pipe"])
def test_an_interrupted_save_that_is_a_link(tmp_path: Path, what: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "c"
    pending(outside / "c", b'{"folder": "c", "remove": []}')
    folder.mkdir()
    inside = folder / layout.COMMIT_NAME
    if what == "folder":
        inside.symlink_to(outside / "c" / layout.COMMIT_NAME)
    else:
        pending(folder, b'{"folder": "c", "remove": []}')
        replaced = inside / ("c" if what == "source" else layout.JOURNAL_NAME)
        commit._remove(replaced)
        if what == "pipe":
            os.mkfifo(replaced)
        else:
            replaced.symlink_to(outside / "c" / layout.COMMIT_NAME / replaced.name)
    before = sorted(str(path) for path in outside.rglob("*"))
    costs_little(tmp_path, lambda: commit.recover(folder))
    assert sorted(str(path) for path in outside.rglob("*")) == before
    assert not (folder / "model.safetensors").exists()


def manifest_of(folder: Path, **changes: Any) -> bytes:
    found = manifest.read(folder)
    assert found is not None
    return manifest.to_bytes(msgspec.structs.replace(found, **changes))


MANIFESTS: dict[str, Callable[[Path], bytes]] = {
    "1e6 files": lambda folder: manifest_of(folder, files={f"f{n}": manifest.FileEntry(0, "") for n in range(10**6)}),
    "1e5 files": lambda folder: manifest_of(folder, files={f"f{n}": manifest.FileEntry(0, "") for n in range(10**5)}),
    "long name": lambda folder: manifest_of(folder, files={"x" * 5000: manifest.FileEntry(0, "")}),
    "long path": lambda folder: manifest_of(folder, files={"x/" * 5000 + "x": manifest.FileEntry(0, "")}),
    "ANSI": lambda folder: manifest_of(folder, files={"\x1b[2J": manifest.FileEntry(0, "")}),
    "device": lambda folder: manifest_of(folder, files={"/dev/zero": manifest.FileEntry(0, "")}),
    "huge size": lambda folder: manifest_of(folder, files={"random_states_0.json": manifest.FileEntry(2**60, "")}),
    "twice": lambda folder: (folder / layout.MANIFEST_NAME).read_bytes().replace(b'{\n "for', b'{\n "step": 1,\n "for'),
    "deep": lambda _: b'{"format":1,"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "100 MB": lambda _: b"[" * 100_000_000,
    "huge number": lambda _: b'{"format":' + b"9" * 5000 + b"}",
    "list": lambda _: b"[]",
    "pickle": lambda _: b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c"
    run = Run().having(custom_objects=[Counter(1)])
    run.save(folder)
    (folder / layout.MANIFEST_NAME).write_bytes(MANIFESTS[name](folder))
    said = costs_little(folder, lambda: run.load(folder))
    assert name != "1e5 files" or "f4 is missing; and at least 9" in said


def test_codecs_know_no_names_of_modules() -> None:
    with pytest.raises(CheckpointError, match=r"torch\._inductor is no dtype"):
        codec.decode({"$type": "torch", "kind": "dtype", "value": "_inductor"}, {})
