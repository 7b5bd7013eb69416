"""Model weights in files: shards, tied names, damage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from accelerate.checkpoint import full, layout, weights
from accelerate.checkpoint.files import TensorFile
from accelerate.collectives.single import SingleProcess
from accelerate.core.errors import CheckpointError, SettingError, WrongTypeError

from .support import Tied, same_bits, write

ONE = SingleProcess()


def three_layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))


def in_order(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(state.items()))


def save(state: dict[str, Any], folder: Path, safe: bool = True) -> None:
    write(folder, full.plan_model(state, 0, safe))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file(tmp_path: Path) -> None:
    model = three_layers()
    weights.save_model(model.state_dict(), tmp_path / "m", ONE)
    assert names(tmp_path / "m") == ["model.safetensors"]
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same_bits(in_order(weights.load_weights(tmp_path / "m")), in_order(model.state_dict()))


@pytest.mark.parametrize("safe", [True, False])
def test_shards_and_index(tmp_path: Path, safe: bool) -> None:
    model = three_layers()
    weights.save_model(model.state_dict(), tmp_path / "m", ONE, max_shard_size=180, safe_serialization=safe)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    shards = [f"{stem}-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    index = f"{stem}.{suffix}.index.json"
    assert names(tmp_path / "m") == sorted([*shards, index])
    content = json.loads((tmp_path / "m" / index).read_text())
    assert content["metadata"] == {"total_size": 504}
    assert content["weight_map"] == {f"{i}.{name}": shards[i] for i in range(3) for name in ("bias", "weight")}
    assert same_bits(in_order(weights.load_weights(tmp_path / "m")), in_order(model.state_dict()))


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    plan = weights.plan_shards({"a": 5, "b": 100, "c": 5, "d": 5}, 10)
    assert plan == [["a"], ["b"], ["c", "d"]]
    assert weights.plan_shards({}, 10) == [[]]


def test_stale_weights_go_and_other_files_stay(tmp_path: Path) -> None:
    model = three_layers()
    (tmp_path / "config.json").write_text("{}")
    weights.save_model(model.state_dict(), tmp_path, ONE, max_shard_size=180)
    weights.save_model(model.state_dict(), tmp_path, ONE)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    weights.save_model(model.state_dict(), tmp_path, ONE, safe_serialization=False)
    assert names(tmp_path) == ["config.json", "pytorch_model.bin"]


def test_a_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="10 bananas"):
        weights.save_model({}, tmp_path, ONE, max_shard_size="10 bananas")


def test_tied_names_are_written_once(tmp_path: Path) -> None:
    model = Tied()
    save(model.state_dict(), tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.weight", "buf"]
        assert json.loads(file.metadata()["tied"]) == {"b.weight": "a.weight"}
    for tie in (True, False):
        other = Tied(tie)
        full.load_model(other, tmp_path, 0)
        assert same_bits(dict(other.state_dict()), dict(model.state_dict()))


def test_tied_names_that_another_writer_dropped(tmp_path: Path) -> None:
    model = Tied()
    safetensors.torch.save_file({"b.weight": torch.ones(3, 3), "buf": torch.zeros(4)}, tmp_path / "model.safetensors")
    full.load_model(model, tmp_path, 0)
    assert model.a.weight.eq(1).all()
    with pytest.raises(RuntimeError, match=r"Missing key.*a\.weight"):
        full.load_model(Tied(tie=False), tmp_path, 0)


def test_keys_are_strict_unless_told(tmp_path: Path) -> None:
    save({"a.weight": torch.ones(3, 3), "more": torch.ones(1)}, tmp_path)
    with pytest.raises(RuntimeError, match="more"):
        full.load_model(Tied(), tmp_path, 0)
    model = Tied()
    full.load_model(model, tmp_path, 0, strict=False)
    assert model.b.weight.eq(1).all()


def test_views_of_one_memory_are_all_written(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state = {"all": base, "head": base[:2], "tail": base[2:], "turned": base.view(2, 3).t(), "again": base[:2]}
    save(state, tmp_path)
    assert same_bits(in_order(weights.load_weights(tmp_path)), in_order(state))


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1, device="meta"), torch.eye(2).to_sparse(), None, torch.zeros(1, dtype=torch.complex128)],
    ids=str,
)
def test_what_safetensors_cannot_hold_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"'x\.y'"):
        save({"x.y": value}, tmp_path)


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    save({"x": torch.ones(1)}, tmp_path)
    save({"x": torch.zeros(1)}, tmp_path, safe=False)
    assert weights.load_weights(tmp_path)["x"] == 1
    (tmp_path / "model.safetensors").unlink()
    assert weights.load_weights(tmp_path)["x"] == 0


def test_no_weights_is_also_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_1\.safetensors") as caught:
        weights.load_weights(tmp_path, 1)
    assert isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/../../x", "link.safetensors", "absent"])
def test_an_index_stays_in_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    TensorFile("secret.safetensors", {"x": torch.ones(1)}).write(tmp_path)
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / layout.SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": {"x": shard}}))
    expected = "not there" if shard == "absent" else "outside its folder"
    with pytest.raises(CheckpointError, match=expected):
        weights.load_weights(folder)


@pytest.mark.parametrize("text", ["", "{", '{"weight_map": 3}', '{"weight_map": {"x": 1}}'])
def test_a_damaged_index_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / layout.SAFE_WEIGHTS_INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        weights.load_weights(tmp_path)


def test_an_index_that_promises_more_than_its_shards(tmp_path: Path) -> None:
    TensorFile("s.safetensors", {"x": torch.ones(1)}).write(tmp_path)
    text = json.dumps({"weight_map": {"x": "s.safetensors", "y": "s.safetensors"}})
    (tmp_path / layout.SAFE_WEIGHTS_INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="y"):
        weights.load_weights(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    save({"x": torch.ones(100)}, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        weights.load_weights(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_save_and_load_one_object(tmp_path: Path, safe: bool) -> None:
    state = {"x": torch.ones(2)}
    file = tmp_path / "f"
    weights.save(state, file, safe_serialization=safe)
    weights.save(state, str(file), safe_serialization=safe)
    assert names(tmp_path) == ["f"]
    found = weights.read_safetensors(file) if safe else weights.load(file)
    assert same_bits(found, state)
    stream = io.BytesIO()
    weights.save(state, stream, safe_serialization=safe)
    assert stream.tell() > 0


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    weights.save({"x": 1}, file)
    with pytest.raises(AttributeError, match="pickle"):
        weights.save({"x": lambda: 0}, file)
    assert weights.load(file) == {"x": 1}
    assert names(tmp_path) == ["f"]
    with pytest.raises(WrongTypeError):
        weights.save([1], file, safe_serialization=True)
