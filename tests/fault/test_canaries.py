"""A folder from a stranger runs no code: a pickle that would leave a trace is put into every file that is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import warnings
import zipfile
from collections import Counter as Counter_
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accelerate.utils
from accelerate.checkpoint import convert, describe, layout, train_state, trust, weights
from accelerate.core.errors import CheckpointError
from tests.fault.bounded import MB, cost_of
from tests.fault.fuzz import sharded
from tests.unit.checkpoint.support import Counter, Run

# Torch says what it makes of strange files before it refuses them.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("Detected pickle protocol", ".*looks like a TorchScript")
]


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.file,))


class Eval(Canary):
    """The same through a builtin that everything can be done with."""

    def __reduce__(self) -> Any:
        return (eval, (f"__import__('os').mkdir({self.file!r})",))


class Inside(Canary):
    """The same as the state of an object that may be read."""

    def __reduce__(self) -> Any:
        return (torch.Size, ([],), {"x": Canary(Path(self.file))})


def _zip(poison: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(poison, stream)
    return stream.getvalue()


def _old(poison: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(poison, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _script(poison: Any) -> bytes:
    """Look like a TorchScript archive, for which torch has another reader."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(poison, protocol=2))
        archive.writestr("archive/constants.pkl", pickle.dumps(poison, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/code/__torch__.py", "")
    return stream.getvalue()


FORMS: dict[str, Callable[[Any], bytes]] = {
    "torch.save": _zip,
    "old torch.save": _old,
    "script": _script,
    **{f"pickle {number}": lambda poison, number=number: pickle.dumps(poison, number) for number in range(6)},
}
KINDS: dict[str, Callable[[Path], Any]] = {
    "alone": Canary,
    "in a dict": lambda file: {"x": Canary(file)},
    "as a key": lambda file: {Eval(file): 1},
    "in a state": Inside,
}


class Loader:
    """What a checkpoint looks at in a stateful loader."""

    use_stateful_dataloader = True

    def position_state(self) -> dict[str, Any]:
        return {"epoch": 0, "place": torch.zeros(3)}

    def load_position_state(self, saved: dict[str, Any]) -> None:
        pass

    def own_state(self) -> dict[str, Any]:
        return {"reading": torch.ones(2)}

    def load_own_state(self, saved: dict[str, Any]) -> None:
        pass


def run() -> Run:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return Run().having(
        models=[model],
        optimizers=[optimizer],
        schedulers=[torch.optim.lr_scheduler.StepLR(optimizer, 1)],
        dataloaders=[Loader()],
        scaler=torch.amp.GradScaler("cpu"),
        custom_objects=[Counter(torch.ones(1))],
    )


def peer_folder(folder: Path) -> None:
    """Write what Accelerate 1.x would have."""
    objects = run().objects
    folder.mkdir()
    states = {
        "pytorch_model.bin": objects["models"][0].state_dict(),
        "optimizer.bin": objects["optimizers"][0].state_dict(),
        "scheduler.bin": objects["schedulers"][0].state_dict(),
        "scaler.pt": objects["scaler"].state_dict(),
        "custom_checkpoint_0.pkl": {"value": 1},
        "dl_state_dict.bin": {"reading": 1},
        "random_states_0.pkl": {
            "step": 4,
            "random_state": random.getstate(),
            "numpy_random_seed": np.random.get_state(),
            "torch_manual_seed": torch.get_rng_state(),
        },
    }
    for name, state in states.items():
        torch.save(state, folder / name)


PEER_FILES = [
    "pytorch_model.bin", "optimizer.bin", "scheduler.bin", "scaler.pt", "custom_checkpoint_0.pkl", "dl_state_dict.bin",
    "random_states_0.pkl",
]  # fmt: skip


def refused(folder: Path, name: str, **options: Any) -> str:
    """Load, which has to fail over this file; return the message."""
    with pytest.raises(CheckpointError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's folders say nothing of loaders
        run().load(folder, **options)
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PEER_FILES)
def test_no_pickle_of_the_peers_runs(tmp_path: Path, name: str) -> None:
    folder, canary = tmp_path / "c", tmp_path / "canary"
    peer_folder(folder)
    for form, write in FORMS.items():
        for kind, poison in KINDS.items():
            (folder / name).write_bytes(write(poison(canary)))
            text = refused(folder, name, strict=False)
            assert not canary.exists(), (form, kind)
            assert "weights_only=False" in text, (form, kind, text)


@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_in_a_shard_runs(tmp_path: Path, form: str) -> None:
    shard = "pytorch_model-00001-of-00001.bin"
    index = {"metadata": {}, "weight_map": {"weight": shard}}
    (tmp_path / layout.WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    (tmp_path / shard).write_bytes(FORMS[form]({"weight": Canary(tmp_path / "canary")}))
    with pytest.raises(CheckpointError, match=shard):
        weights.load_weights(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_no_pickle_under_our_own_names_runs(tmp_path: Path) -> None:
    folder, canary = tmp_path / "c", tmp_path / "canary"
    run().save(folder, windows=[{"gradients": torch.ones(2)}])
    names = sorted(os.listdir(folder))
    assert len(names) == 16
    for name in names:
        content = (folder / name).read_bytes()
        for form, write in FORMS.items():
            (folder / name).write_bytes(write({"x": Canary(canary)}))
            for options in ({}, {"verify": "off"}, {"verify": "off", "strict": False}):
                if name.startswith("sampler.") and options.get("strict") is False:
                    continue  # a place that cannot be read is passed over then
                refused(folder, name.partition(".")[0], **options)
                assert not canary.exists(), (name, form)
        (folder / name).write_bytes(content)


def test_what_other_libraries_pickle_is_not_looked_at(tmp_path: Path) -> None:
    folder, canary = tmp_path / "c", tmp_path / "canary"
    run().save(folder)
    names = [".metadata", "__0_0.distcp", "training_args.bin", "extra.pkl", "data.pt", "model.ckpt"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        for inner in names[:2]:
            (folder / name / inner).write_bytes(pickle.dumps(Canary(canary)))
    run().load(folder)
    assert not canary.exists()


def _attempted(*actions: Callable[[], Any]) -> list[str]:
    errors: list[str] = []
    for action in actions:
        try:
            action()
        except CheckpointError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("form", ["torch.save", "old torch.save", "pickle 4"])
@pytest.mark.parametrize("kind", ["peer", "weights", "sharded", "own"])
def test_no_command_runs_a_pickle_in_any_file_of_a_folder(tmp_path: Path, form: str, kind: str) -> None:
    folder, canary, out = tmp_path / "c", tmp_path / "canary", tmp_path / "out"
    if kind == "peer":
        peer_folder(folder)
    elif kind == "own":
        run().save(folder)
    else:
        folder.mkdir()
        torch.save(run().objects["models"][0].state_dict(), folder / layout.WEIGHTS_NAME)
    shards = folder if kind == "sharded" else folder / "pytorch_model_fsdp_0"
    sharded(shards)
    files = {file for place in {folder, shards} for file in place.iterdir() if file.is_file()}
    files |= {
        place / name for place in {folder, shards} for name in ("x.distcp", "x.bin", "x.pkl", "x.pt", ".metadata")
    }
    if kind != "sharded":
        files.discard(folder / ".metadata")  # it would make the whole folder a sharded one
    for file in sorted(files):
        before = file.read_bytes() if file.exists() else None
        for poison in ({"x": Canary(canary)},):
            file.write_bytes(FORMS[form](poison))
            errors = _attempted(
                lambda: describe.describe(folder),
                lambda: describe.verify(folder),
                lambda: convert.convert(convert.plan(folder), out),
                lambda: convert.merge_fsdp_weights(shards, tmp_path / "merged"),
            )
            assert not canary.exists(), (file, errors)
            if file == shards / ".metadata":
                assert any(".metadata" in error for error in errors), errors
            for made in (out, tmp_path / "merged"):
                shutil.rmtree(made, ignore_errors=True)
        file.unlink() if before is None else file.write_bytes(before)


def test_the_canary_sings_where_it_is_let(tmp_path: Path) -> None:
    for form in FORMS:
        file, canary = tmp_path / "f", tmp_path / f"canary {form}"
        file.write_bytes(FORMS[form]({"x": Canary(canary)}))
        with pytest.raises(pickle.UnpicklingError):
            accelerate.utils.load(file)
        assert not canary.exists(), form
        if form in ("torch.save", "old torch.save"):
            accelerate.utils.load(file, weights_only=False)
            assert canary.exists(), form


@pytest.mark.parametrize("form", FORMS)
def test_the_function_for_one_file_names_file_and_argument(tmp_path: Path, form: str) -> None:
    file = tmp_path / "stranger.bin"
    file.write_bytes(FORMS[form](Canary(tmp_path / "canary")))
    with pytest.raises(trust.RefusedPickle, match=r"stranger\.bin[\s\S]*weights_only=False"):
        accelerate.utils.load(file)
    assert not (tmp_path / "canary").exists()


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.bin"
    torch.save({"x": torch.zeros(10_000_000)}, file)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    packed.replace(file)
    assert file.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"optimizer\.bin is refused: it is a packed archive"):
        train_state.read_state(tmp_path, "optimizer")


class Bytes:
    """Asks for memory that the file does not have."""

    def __reduce__(self) -> Any:
        return (bytearray, (10**9,))


def archive(content: bytes, name: str = "archive/data.pkl") -> bytes:
    """Put a pickle where torch looks for it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as target:
        target.writestr(name, content)
        target.writestr("archive/version", "3\n")
    return stream.getvalue()


def _old_then_archive(poison: Any) -> bytes:
    """Look like an archive to Python, which looks at the end, and like the old format to torch."""
    return _old(poison) + archive(b"")


def _with_a_second_directory(poison: Any) -> bytes:
    """Show one list of entries to Python, which looks before the end, and another to torch, which looks where it says."""
    bad, good = archive(pickle.dumps(poison, protocol=2)), archive(pickle.dumps({}, protocol=2))
    count, size, place = struct.unpack("<HII", bad[-12:-2])
    return bad[:-22] + good[:-12] + struct.pack("<HII", count, size, place) + good[-2:]


ASKING = {
    **{form: FORMS[form] for form in ("torch.save", "old torch.save", "pickle 2")},
    "in large letters": lambda poison: archive(pickle.dumps(poison, protocol=2), "archive/DATA.PKL"),
    "old torch.save with an archive behind it": _old_then_archive,
    "two directories": _with_a_second_directory,
}


@pytest.mark.parametrize("form", ASKING)
def test_a_pickle_that_asks_for_memory(tmp_path: Path, form: str) -> None:
    (tmp_path / "optimizer.bin").write_bytes(ASKING[form]({"x": Bytes()}))
    cost = cost_of(lambda: train_state.read_state(tmp_path, "optimizer"))
    assert cost.is_clean
    assert re.search("optimizer.bin (is refused: it asks for a bytearray|cannot be read: .* does not end)", cost.error)
    assert cost.memory < 50 * MB


@pytest.mark.parametrize("form", ASKING)
def test_a_piece_that_asks_for_memory(form: str) -> None:
    stream = io.BytesIO(ASKING[form](Bytes()))
    cost = cost_of(lambda: trust.load_tensor(stream, "piece 3"))
    assert cost.is_clean
    assert "piece 3" in cost.error
    assert cost.memory < 50 * MB


def _called(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


SMALL_BUT_LARGE = {
    "texts that double": (
        b"c_codecs\nencode\n" * 30 + _called(b"_codecs\nencode", _text("aa"), _text("ascii"))
        + (_text("hex") + b"\x86R") * 30 + b".",
        "an encoding that may make a text longer",
    ),
    "texts that double at second hand": (
        _called(b"torch._tensor\n_rebuild_from_type_v2", b"c_codecs\nencode\n", b"N", b"(" + _text("aa") + _text("hex") + b"t", b"N")
        + b".",
        "an encoding that may make a text longer",
    ),
    "an array of nothing": (
        _called(b"numpy\nndarray", b"J" + struct.pack("<i", 2**30) + b"\x85", _text("O")) + b".", "trusts what it is told"
    ),
    "an array of nothing by another name": (
        _called(b"numpy.core.multiarray\n_reconstruct", b"cnumpy\nndarray\n", b"J" + struct.pack("<i", 2**30) + b"\x85",
                _text("O")) + b".",
        "what is in it",
    ),
    "objects": (_called(b"numpy\ndtype", _text("O8"), b"\x89", b"\x88") + b".", "not made of plain numbers"),
    "numbers that pretend to be objects": (
        _called(b"numpy\ndtype", _text("i8"), b"\x89", b"\x88")
        + b"(K\3" + _text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb.",
        "not made of plain numbers",
    ),
    "a list that is copied": (
        b"](" + b"K\x01" * 100_000 + b"eq\0(" + b"ctorch\nSize\nh\0\x85R" * 10_000 + b"t.", "again and again"
    ),
    "a set of a list": (
        b"](" + b"K\x01" * 100_000 + b"eq\0(" + b"c__builtin__\nset\nh\0\x85R" * 10_000 + b"t.", "again and again"
    ),
    "a key that is a deep tuple": (b"})" + b"\x85" * 300_000 + b"K\x01s.", "more than 8 tuples deep"),
    "a set of a deep tuple": (
        b"c__builtin__\nset\n](" + b")" + b"\x85" * 300_000 + b"e\x85R.", "more than 8 tuples deep"
    ),
    "a key that doubles": (
        b"})" + b"".join(b"(" + b"h\0" * 100 + b"tq\0" if number else b"q\0" for number in range(7)) + b"K\x01s.",
        "again and again",
    ),
    "dictionaries without end": (b"(" + b"}" * 11_000_000 + b"t.", "objects that are read"),
    "a tensor that is not there": (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"J"
        + struct.pack("<i", 2**30) + b"tQ.", "larger than the whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_BUT_LARGE)
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_small_pickle_that_would_be_large(tmp_path: Path, name: str, old: bool) -> None:
    content, reason = SMALL_BUT_LARGE[name]
    head = b"".join(pickle.dumps(item, 2) for item in (torch.serialization.MAGIC_NUMBER, 1001, {}))
    content = b"\x80\x02" + content
    (tmp_path / "optimizer.bin").write_bytes(head + content if old else archive(content))
    cost = cost_of(lambda: train_state.read_state(tmp_path, "optimizer"))
    assert cost.is_clean, cost
    assert re.search(f"optimizer.bin is refused: .*{reason}", cost.error)
    limit = 1500 if "without end" in name else 100
    assert (cost.memory < limit * MB, cost.seconds < 10) == (True, True), cost


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_what_torch_saves_is_not_taken_for_hostile(tmp_path: Path, old: bool) -> None:
    shared = torch.ones(3)
    state = {
        "tensors": [torch.ones(2, 3).t(), shared, shared[1:], torch.eye(3).to_sparse(), torch.nn.Parameter(shared)],
        "types": [torch.tensor(1, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.complex64)],
        "numpy": [np.random.get_state(), np.arange(1000)],
        "python": [random.getstate(), {1, 2}, complex(1, 2), OrderedDict(a=1), Counter_("abca"), {(1, "a"): {}}],
        "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16],
        "many": [{"step": torch.tensor(float(number)), "exp_avg": torch.ones(1)} for number in range(300)],
        5: b"bytes",
        "long": "x" * 100_000,
    }
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not old)
    found = trust.read_pickle(tmp_path / "x.bin")
    assert found.keys() == state.keys()
    assert torch.equal(found["tensors"][3].to_dense(), torch.eye(3))
    assert found["many"] == state["many"]
    with (tmp_path / "x.bin").open("rb") as stream:
        assert trust.load(stream)["python"] == state["python"]


def test_lists_that_double_themselves(tmp_path: Path) -> None:
    doubled = b"\x80\x02]q\0" + b"".join(b"(h%ch%clq%c" % (n, n, n + 1) for n in range(40)) + b"."
    (tmp_path / "optimizer.bin").write_bytes(archive(doubled))
    cost = cost_of(lambda: train_state.read_state(tmp_path, "optimizer"))
    assert cost.is_clean
    assert (cost.memory < 50 * MB, cost.seconds < 2) == (True, True)
