"""Checkpoints and weights in another form hold the same."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp

from accelerate.checkpoint import commit, durable, layout, manifest, train_state
from accelerate.checkpoint.convert import convert, merge_fsdp_weights, plan
from accelerate.checkpoint.tensor_file import read_header
from accelerate.checkpoint.weights import load_weights
from accelerate.core.errors import CheckpointError, SettingError
from tests.support.checkpoint_files import write_weights

from .support import Counter, Run, Tied, same_bits

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3), "b": torch.arange(5, dtype=torch.int8)}


def converted(folder: Path, output: Path, max_shard_bytes: int | None = None) -> Path:
    convert(plan(folder), output, max_shard_bytes)
    return output


def names(folder: Path) -> list[str]:
    return list(durable.files_below(folder))


def sharded(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


class Boom:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.file,))


# Weights --------------------------------------------------------------------------------------------------------------


def test_one_file_becomes_shards_and_shards_become_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_weights(STATE, tmp_path / "one" / "model.safetensors")
    many = converted(tmp_path / "one", tmp_path / "many", 60)
    again = converted(many, tmp_path / "again")
    assert names(many) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert same_bits({name: load_weights(many)[name] for name in STATE}, STATE)
    assert names(again) == ["model.safetensors"]
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("limit", [None, 48], ids=["one file", "shards"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickles_become_safetensors(tmp_path: Path, limit: int | None, zipped: bool) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    tied = {**STATE, "tied": STATE["b"]}
    if limit is None:
        torch.save(tied, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        write_weights(tied, folder / "pytorch_model.bin", limit)
    new = converted(folder, tmp_path / "new")
    assert names(new) == ["model.safetensors"]
    loaded = load_weights(new)
    assert same_bits({name: loaded[name] for name in tied}, tied)
    assert loaded["tied"] is loaded["b"]


def test_a_small_file_cannot_fill_the_disk(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save({"a": torch.ones(1).expand(2**50)}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"and only 4 in their file; 'a' has the shape \[1125899906842624\]"):
        converted(tmp_path / "old", tmp_path / "new")
    parts = {f"{number}": torch.ones(1).expand(2**22 - number) for number in range(500)}
    views = (lambda base: {f"{number}": base[number:] for number in range(500)})(torch.ones(2**16))
    for state in (parts, views):
        torch.save(state, tmp_path / "old" / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="bytes, and only"):
            plan(tmp_path / "old") and converted(tmp_path / "old", tmp_path / "new")
    torch.save({"a": torch.ones(1).expand(3)}, tmp_path / "old" / "pytorch_model.bin")
    assert torch.equal(load_weights(converted(tmp_path / "old", tmp_path / "new"))["a"], torch.ones(3))


def test_several_models_in_one_folder_are_all_converted(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    write_weights(STATE, folder / "pytorch_model.bin")
    write_weights({"x": torch.ones(2)}, folder / "model_1.safetensors")
    new = converted(folder, tmp_path / "new", 48)
    assert same_bits({name: load_weights(new)[name] for name in STATE}, STATE)
    assert load_weights(new, 1).keys() == {"x"}


def test_a_sharded_folder_becomes_plain_weights(tmp_path: Path) -> None:
    new = converted(sharded(tmp_path / "pytorch_model_fsdp_0", {"model": STATE}), tmp_path / "new", 48)
    assert same_bits({name: load_weights(new)[name] for name in STATE}, STATE)
    beside = converted(tmp_path, tmp_path / "again")
    assert names(beside) == ["model.safetensors"]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    models = [Tied(), torch.nn.Linear(3, 2)]
    optimizer = torch.optim.AdamW([parameter for model in models for parameter in model.parameters()])
    models[1](models[0].a(torch.ones(2, 3))).sum().backward()
    optimizer.step()
    return {"models": models, "optimizers": [optimizer], "custom_objects": [Counter(7)]}


def untrained() -> dict[str, Any]:
    torch.manual_seed(1)
    models = [Tied(), torch.nn.Linear(3, 2)]
    optimizer = torch.optim.AdamW([parameter for model in models for parameter in model.parameters()])
    return {"models": models, "optimizers": [optimizer], "custom_objects": [Counter()]}


def states(objects: dict[str, Any]) -> dict[str, Any]:
    return {kind: [item.state_dict() for item in items] for kind, items in objects.items()}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickles"])
def test_a_converted_checkpoint_loads_as_the_one_it_was_made_of(tmp_path: Path, safe: bool) -> None:
    objects = trained()
    old = Run().having(**objects).save(tmp_path / "old", step=5, safe_serialization=safe)
    new = converted(old, tmp_path / "new", 30)
    assert "model-00001-of-00002.safetensors" in names(new)
    found = manifest.read(new)
    assert found is not None
    manifest.check(new, found, "full")
    assert (found.step, found.world_size) == (5, 1)
    run = Run().having(**untrained())
    assert run.load(new).step == 5
    loaded = {kind: run.objects[kind] for kind in objects}
    assert same_bits(states(loaded), states(objects))


def test_a_checkpoint_there_and_back_is_the_same(tmp_path: Path) -> None:
    old = Run().having(models=[torch.nn.Linear(3, 2)], custom_objects=[Counter(7)]).save(tmp_path / "old")
    again = converted(converted(old, tmp_path / "new", 10), tmp_path / "again")
    kept = [name for name in names(old) if name != layout.MANIFEST_NAME]
    assert kept == [name for name in names(again) if name != layout.MANIFEST_NAME]
    assert all((old / name).read_bytes() == (again / name).read_bytes() for name in kept)


def test_a_damaged_checkpoint_is_not_made_into_one_that_looks_whole(tmp_path: Path) -> None:
    old = Run().having(models=[Tied()]).save(tmp_path / "old")
    content = bytearray((old / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (old / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content than was written"):
        plan(old)


def test_a_save_that_was_cut_off_at_its_end_is_finished_first(tmp_path: Path) -> None:
    old = Run().having(custom_objects=[Counter(1)]).save(tmp_path / "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "_move_into_place", lambda *_: None)
        Run().having(custom_objects=[Counter(2)]).save(old)
    assert (old / layout.COMMIT_NAME).is_dir()
    new = converted(old, tmp_path / "new")
    assert train_state.read_state(new, "custom_checkpoint_0") == {"value": 2}


def test_a_folder_that_lost_its_manifest_is_refused(tmp_path: Path) -> None:
    old = Run().having(models=[Tied()]).save(tmp_path / "old")
    (old / layout.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="has no accelerate_manifest"):
        plan(old)


def test_files_of_hooks_come_along(tmp_path: Path) -> None:
    def hook(_models: Any, _weights: Any, folder: str) -> None:
        (Path(folder) / "adapter").mkdir()
        (Path(folder) / "adapter" / "note.txt").write_text("mine")

    old = Run().having(models=[Tied()]).save(tmp_path / "old", pre_hooks=[hook])
    assert (converted(old, tmp_path / "new") / "adapter" / "note.txt").read_text() == "mine"


# Accelerate 1.x -------------------------------------------------------------------------------------------------------


def old_checkpoint(folder: Path, **files: Any) -> Path:
    """Write the files that Accelerate 1.x writes for one process."""
    import random

    import numpy as np

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    random_states = {
        "step": 11,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    content: dict[str, Any] = {
        "pytorch_model.bin": model.state_dict(),
        "optimizer.bin": optimizer.state_dict(),
        "scheduler.bin": {"last_epoch": 3, "lr_lambdas": [None]},
        "scaler.pt": {"scale": 4.0, "_growth_tracker": 0},
        "sampler.bin": {"generator": torch.zeros(2)},
        "dl_state_dict.bin": {"_num_yielded": 2},
        "custom_checkpoint_0.pkl": {"value": 5, "t": torch.ones(2)},
        "random_states_0.pkl": random_states,
        "random_states_1.pkl": random_states,
        **files,
    }
    folder.mkdir(parents=True)
    for name, value in content.items():
        torch.save(value, folder / name)
    (folder / "config.txt").write_text("mine")
    return folder


def test_a_checkpoint_of_version_1_becomes_one_of_ours(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "checkpoints" / "checkpoint_4")
    planned = plan(old)
    convert(planned, tmp_path / "new")
    new = tmp_path / "new"
    assert planned.kind == "a checkpoint of Accelerate 1.x"
    assert planned.left == ("sampler.bin: 1.x does not say in it where its loader was",)
    assert not [name for name in names(new) if name.endswith((".bin", ".pkl", ".pt"))]
    found = manifest.read(new)
    assert found is not None
    manifest.check(new, found, "full")
    assert (found.world_size, found.step, found.iteration) == (2, 11, 4)
    stems = ["optimizer", "scheduler", "scaler", "dl_state_dict_rank0", "dl_state_dict_rank1", "custom_checkpoint_0"]
    for stem in [*stems, "random_states_0", "random_states_1"]:
        assert same_bits(train_state.read_state(new, stem), train_state.read_state(old, stem)), stem
    assert same_bits(dict(load_weights(new)), {name: load_weights(old)[name] for name in load_weights(new)})
    assert (new / "config.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "optimizer.bin", "scheduler.bin", "scaler.pt", "dl_state_dict.bin", "custom_checkpoint_0.pkl",
     "random_states_0.pkl", "random_states_1.pkl"],
)  # fmt: skip
def test_code_in_a_file_of_version_1_never_runs(tmp_path: Path, name: str) -> None:
    old = old_checkpoint(tmp_path / "old", **{name: {"x": Boom(tmp_path / "ran")}})
    with pytest.raises(CheckpointError, match=f"{name} is refused"):
        converted(old, tmp_path / "new")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_checkpoint_of_version_1_with_sharded_states_is_refused_with_a_way_out(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "old")
    (old / "optimizer_0").mkdir()
    with pytest.raises(CheckpointError, match=r"optimizer_0 holds states .*\naccelerate merge-weights|merge-weights"):
        plan(old)


def test_a_checkpoint_of_version_1_without_the_states_of_a_rank_is_refused(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "old")
    (old / "random_states_0.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"ranks \[1\] only"):
        plan(old)


# The output -----------------------------------------------------------------------------------------------------------


def test_an_output_that_holds_something_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    for name in ("one", "full", "empty"):
        (tmp_path / name).mkdir()
    write_weights(STATE, tmp_path / "one" / "model.safetensors")
    (tmp_path / "full" / "mine").write_text("mine")
    for place in ("full", "full/mine", "one"):
        with pytest.raises(SettingError, match="There is something at"):
            converted(tmp_path / "one", tmp_path / place)
    assert names(converted(tmp_path / "one", tmp_path / "empty")) == ["model.safetensors"]
    assert names(tmp_path / "full") == ["mine"]


def test_an_output_inside_the_folder_is_possible(tmp_path: Path) -> None:
    old = Run().having(models=[Tied()]).save(tmp_path / "old")
    new = converted(old, old / "new")
    assert names(new) == [name for name in names(old) if "/" not in name]


def test_nothing_to_convert_is_told(tmp_path: Path) -> None:
    with pytest.raises(layout.MissingFile, match="There is no folder"):
        plan(tmp_path / "none")
    with pytest.raises(layout.MissingFile, match="holds neither a checkpoint nor weights"):
        plan(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model.bin", "pytorch_model_fsdp_0", ".metadata"])
def test_links_out_of_the_folder_are_not_read(tmp_path: Path, name: str) -> None:
    old = old_checkpoint(tmp_path / "old")
    outside = sharded(tmp_path / "outside", {"model": STATE})
    if name.startswith("."):
        old = sharded(tmp_path / "fsdp", {"model": STATE})
        outside /= name
    elif (old / name).exists():
        outside = (old / name).rename(tmp_path / name)
    (old / name).unlink(missing_ok=True)
    (old / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"a link that leaves its folder|outside its folder"):
        plan(old)


def test_a_link_inside_the_folder_is_read_and_not_told_as_left_behind(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "old")
    (old / "pytorch_model.bin").rename(old / "weights.dat")
    (old / "pytorch_model.bin").symlink_to("weights.dat")
    (old / "extra").symlink_to(tmp_path)
    planned = plan(old)
    assert planned.left == (
        "extra: no plain file", "sampler.bin: 1.x does not say in it where its loader was",
    )  # fmt: skip
    convert(planned, tmp_path / "new")
    assert load_weights(tmp_path / "new").keys() == {"weight", "bias"}


def test_a_pipe_in_place_of_a_state_is_not_waited_for(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path / "old")
    (old / "optimizer.bin").unlink()
    os.mkfifo(old / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"optimizer\.bin cannot be read: it is no plain file"):
        converted(old, tmp_path / "new")


def test_what_is_left_behind_is_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "fsdp", {"model": STATE, "optimizer": {"m": torch.ones(3)}, "step": 3})
    (folder / "notes.txt").write_text("mine")
    assert set(plan(folder).left) == {"optimizer.m: no weight", "step: no weight", "notes.txt: no part of it"}

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_weights(STATE, mixed / "model.safetensors", 60)
    torch.save(STATE, mixed / "pytorch_model.bin")
    (mixed / "model-00007-of-00009.safetensors").write_bytes(b"of an older state")
    sharded(mixed / "pytorch_model_fsdp_0", {"model": STATE})
    for name in ("config.json", "training_args.bin"):
        (mixed / name).write_text("{}")
    first = "model-00001-of-00002.safetensors"
    assert plan(mixed).left == (
        f"model-00007-of-00009.safetensors: the weights are read from {first}",
        f"pytorch_model.bin: the weights are read from {first}",
        f"pytorch_model_fsdp_0: the weights are read from {first}",
        "config.json: no part of it",
        "training_args.bin: no part of it",
    )
    convert(plan(mixed), tmp_path / "new")
    assert plan(tmp_path / "new").left == ()

    own = Run().having(models=[Tied()]).save(tmp_path / "own")
    (own / "notes.txt").write_text("mine")
    assert plan(own).left == ("notes.txt: no part of it",)


def test_what_a_file_says_of_itself_is_kept(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    metadata = {"format": "pt", "license": "mine"}
    safetensors.torch.save_file(
        {"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "old" / "model.safetensors", metadata
    )
    many = converted(tmp_path / "old", tmp_path / "many", 12)
    assert all(read_header(file).metadata == metadata for file in many.glob("*.safetensors"))
    one = converted(many, tmp_path / "one")
    assert read_header(one / "model.safetensors") == read_header(tmp_path / "old" / "model.safetensors")


# merge_fsdp_weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_merged_weights_are_those_that_were_sharded(tmp_path: Path, safe: bool) -> None:
    folder = sharded(tmp_path / "fsdp", {"model": STATE})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of an older state")
    (tmp_path / "out" / "mine").write_text("mine")
    merge_fsdp_weights(str(folder), str(tmp_path / "out"), safe_serialization=safe)
    assert names(tmp_path / "out") == sorted(["mine", "model.safetensors" if safe else "pytorch_model.bin"])
    assert same_bits({name: load_weights(tmp_path / "out")[name] for name in STATE}, STATE)
    assert folder.is_dir()


def test_the_folder_is_removed_when_the_output_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    folder = sharded(tmp_path / "fsdp", {"model": STATE})
    flushed: list[Path] = []
    flush, remove = durable.flush_folder, shutil.rmtree

    def noted_flush(place: Path) -> None:
        flush(place)
        flushed.append(place)

    def noted_remove(place: Any, *args: Any, **kwargs: Any) -> None:
        if Path(place) == folder:
            assert (tmp_path / "out" / "model.safetensors").is_file()
            assert flushed[-1] == tmp_path
        remove(place, *args, **kwargs)

    monkeypatch.setattr(durable, "flush_folder", noted_flush)
    monkeypatch.setattr(shutil, "rmtree", noted_remove)
    merge_fsdp_weights(folder, tmp_path / "out", remove_checkpoint_dir=True)
    assert not folder.exists()


def test_a_folder_that_cannot_be_merged_is_not_removed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "fsdp", {"model": STATE})
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing or too short"):
        merge_fsdp_weights(folder, tmp_path / "out", remove_checkpoint_dir=True)
    assert data.is_file()
    assert not (tmp_path / "out").exists()


def test_code_in_a_sharded_folder_never_runs(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "fsdp", {"model": STATE})
    (folder / ".metadata").write_bytes(pickle.dumps(Boom(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="is refused"):
        merge_fsdp_weights(folder, tmp_path / "out", remove_checkpoint_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fsdp"]


def test_a_folder_that_is_not_sharded_is_a_wrong_value_and_the_right_one_is_named(tmp_path: Path) -> None:
    sharded(tmp_path / "c" / "pytorch_model_fsdp_0", {"model": STATE})
    with pytest.raises(ValueError, match=r"is no sharded checkpoint[^$]*Pass .*c/pytorch_model_fsdp_0"):
        merge_fsdp_weights(tmp_path / "c", tmp_path / "out")


@pytest.mark.parametrize("place", [".", "out"])
def test_an_output_that_would_be_removed_with_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    folder = sharded(tmp_path / "fsdp", {"model": STATE})
    with pytest.raises(ValueError, match="is to be removed"):
        merge_fsdp_weights(folder, folder / place, remove_checkpoint_dir=True)
    assert (folder / ".metadata").is_file()
