"""What is said about a folder is true, and looking changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate.checkpoint import commit, durable, layout, manifest
from accelerate.checkpoint.convert import merge_fsdp_weights
from accelerate.checkpoint.describe import describe, describe_project, verify
from accelerate.core.errors import CheckpointError
from tests.fault.bounded import cost_of
from tests.support.checkpoint_files import write_weights

from .support import Counter, Run, Tied
from .test_convert import Boom, old_checkpoint, sharded


def saved(folder: Path, value: int = 1, step: int = 3) -> Path:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    objects = {"models": [model, Tied()], "optimizers": [optimizer], "custom_objects": [Counter(value)]}
    return Run().having(**objects).save(folder, step=step)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in files(folder)}


def files(folder: Path) -> list[str]:
    return list(durable.files_below(folder))


def test_a_complete_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    before = snapshot(folder)
    found = describe(folder)
    assert (found.form, found.health, found.problems, found.notes) == ("a checkpoint", "complete", (), ())
    assert found.saved == manifest.read(folder)
    rows = {file.name: (file.kind, file.num_tensors, file.num_parameters, file.dtypes) for file in found.files}
    assert rows.keys() == set(files(folder))
    assert rows["model.safetensors"] == ("weights of model 0", 2, 8, ("float32",))
    assert rows["model_1.safetensors"] == ("weights of model 1", 2, 13, ("float32",))
    assert rows["optimizer.safetensors"] == ("optimizer 0 (tensors)", 6, 18, ("float32",))
    assert rows["optimizer.json"] == ("optimizer 0", None, None, ())
    assert rows["random_states_0.json"][0] == "random states of rank 0"
    assert rows["custom_checkpoint_0.json"][0] == "registered object 0"
    assert all(file.num_bytes == (folder / file.name).stat().st_size for file in found.files)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00002-of-00003.safetensors", "weights of model 0, shard 2 of 3"),
        ("pytorch_model_1-00002-of-00003.bin", "weights of model 1, shard 2 of 3"),
        ("model_2.safetensors.index.json", "weights of model 2: which shard holds what"),
        ("optimizer_1.bin", "optimizer 1"),
        ("sampler_1.json", "position of loader 1"),
        ("dl_state_dict_2_rank3.json", "what rank 3 has read of loader 2"),
        ("random_states_12.pkl", "random states of rank 12"),
        ("accumulation_rank1.safetensors", "open windows of accumulation of rank 1 (tensors)"),
        ("scaler.pt", "gradient scaler"),
        ("pytorch_model_fsdp_1/__0_0.distcp", "weights of model 1, in pieces"),
        ("notes.txt", "no part of a checkpoint, as far as its name says"),
    ],
)
def test_files_in_words(name: str, words: str) -> None:
    assert layout.in_words(name) == words


def test_no_tensor_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    expected = describe(folder)
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = b"\xff" * (len(content) - start)
        file.write_bytes(content)
    assert describe(folder).health == "complete"
    assert [file.num_tensors for file in describe(folder).files] == [file.num_tensors for file in expected.files]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "optimizer.json").unlink(), "optimizer.json is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20), "model.safetensors has 20 bytes in place of"),
        (lambda folder: (folder / layout.MANIFEST_NAME).unlink(), "accelerate_manifest.json is missing: the save was"),
        (lambda folder: (folder / layout.MANIFEST_NAME).write_text("{"), "accelerate_manifest.json is damaged"),
        (lambda folder: (folder / layout.COMMIT_NAME / "x").mkdir(parents=True), "without a readable journal"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(tmp_path: Path, damage: Any, problem: str) -> None:
    folder = saved(tmp_path / "c")
    damage(folder)
    found = describe(folder)
    assert found.health == "incomplete"
    assert problem in "\n".join(found.problems)


def test_a_save_that_was_cut_off_at_its_end_is_seen_as_it_will_be(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1, step=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "_move_into_place", lambda *_: None)
        saved(folder, 2, step=2)
    inside = folder / layout.COMMIT_NAME / "c"
    for moved in [None, *files(inside)]:
        if moved is not None:
            os.replace(inside / moved, folder / moved)
        before = snapshot(folder)
        found = describe(folder)
        assert (found.health, found.problems) == ("pending", ())
        assert found.saved is not None
        assert found.saved.step == 2
        assert verify(folder).problems == ()
        assert snapshot(folder) == before
    assert commit.recover(folder)
    assert describe(folder).health == "complete"


def test_leftovers_of_killed_saves_are_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (folder / layout.SAVING_NAME / "c").mkdir(parents=True)
    (folder / layout.SAVING_NAME / "c" / "model.safetensors").write_text("half")
    found = describe(folder)
    assert found.health == "complete"
    assert "is of a save that is running, or was killed" in found.notes[0]
    (tmp_path / f"{layout.SAVING_NAME}-abc").mkdir()
    with pytest.raises(CheckpointError, match=r"There is no folder.*saving-abc beside it is of a save"):
        describe(tmp_path / "d")


def test_files_of_nobody_are_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (folder / "random_states_3.json").write_text("{}")
    (folder / "readme.txt").write_text("mine")
    assert describe(folder).notes == ("random_states_3.json is no part of this save",)
    assert verify(folder).problems == ("random_states_3.json is no part of this save",)


def test_a_checkpoint_of_version_1_is_told_as_such_and_its_pickles_do_not_run(tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "c", **{"custom_checkpoint_1.pkl": {"x": Boom(tmp_path / "ran")}})
    found = describe(folder)
    rows = {file.name: (file.num_tensors, file.num_parameters) for file in found.files}
    assert found.form == "a checkpoint of Accelerate 1.x"
    assert rows["pytorch_model.bin"] == (2, 8)
    assert rows["optimizer.bin"] == (6, 18)
    assert found.health == "incomplete"
    assert "custom_checkpoint_1.pkl is refused" in found.problems[0]
    assert not (tmp_path / "ran").exists()
    (folder / "custom_checkpoint_1.pkl").unlink()
    assert describe(folder).health == "unknown"


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "optimizer.bin", ".metadata", "model_1.safetensors"]
)
def test_only_plain_files_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    folder = old_checkpoint(tmp_path / "c")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else "absent")
    cost = cost_of(lambda: print(describe(folder).problems))
    assert cost.error == ""
    assert f"{name}: it is no plain file" in describe(folder).problems


def test_lists_that_hold_each_other_over_and_over_are_looked_into_once(tmp_path: Path) -> None:
    value: list[Any] = [torch.ones(3)]
    for _ in range(60):
        value = [value, value]
    value.append({"x": (torch.ones(1),)})
    folder = old_checkpoint(tmp_path / "c", **{"custom_checkpoint_0.pkl": value})
    rows = {file.name: file.num_tensors for file in describe(folder).files}
    assert rows["custom_checkpoint_0.pkl"] == 2


def test_a_link_out_of_the_folder_is_a_problem_as_it_is_for_load_state(tmp_path: Path) -> None:
    run = Run().having(models=[Tied()])
    folder = run.save(tmp_path / "c")
    (folder / "model.safetensors").rename(tmp_path / "outside")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside")
    assert verify(folder).problems == ("model.safetensors leads out of the folder",)
    assert describe(folder).health == "incomplete"
    assert "model.safetensors leads out of the folder" in describe(folder).problems
    (folder / layout.MANIFEST_NAME).unlink()
    assert "a link that leaves its folder" in "\n".join(describe(folder).problems)
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        run.load(folder)


def test_weights_alone(tmp_path: Path) -> None:
    write_weights({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "model.safetensors", 12)
    assert (describe(tmp_path).form, describe(tmp_path).health) == ("weights", "complete")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    found = describe(tmp_path)
    assert found.health == "incomplete"
    assert "names the shard 'model-00002-of-00002.safetensors', which is not there" in found.problems[0]
    (tmp_path / "model.safetensors.index.json").unlink()
    assert describe(tmp_path).problems == ("the shards of model 0 have no index",)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "pytorch_model_fsdp_0", {"model": {"a": torch.ones(3, 2)}})
    for place in (folder, tmp_path):
        found = describe(place)
        assert (found.form, found.health) == ("a sharded checkpoint of torch.distributed", "complete")
        assert [file.num_parameters for file in found.files if file.name.endswith(".metadata")] == [6]
    os.truncate(folder / "__0_0.distcp", 10)
    assert "__0_0.distcp is missing or too short" in describe(folder).problems[0]
    with pytest.raises(CheckpointError):
        merge_fsdp_weights(folder, tmp_path / "out")


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(layout.MissingFile, match="holds neither a checkpoint nor weights"):
        describe(tmp_path)
    assert describe_project(tmp_path) is None


def test_a_project_marks_the_checkpoint_that_would_be_loaded(tmp_path: Path) -> None:
    run = Run(tmp_path, automatic_checkpoint_naming=True).having(custom_objects=[Counter(1)])
    for _ in range(11):
        run.save()
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "checkpoint_10" / "custom_checkpoint_0.json").unlink()
    shutil.rmtree(checkpoints / "checkpoint_9")
    (checkpoints / "checkpoint_9").mkdir()
    (checkpoints / "other").mkdir()
    (checkpoints / "checkpoint_12").mkdir()
    write_weights({"a": torch.ones(3)}, checkpoints / "checkpoint_12" / "model.safetensors")
    for place in (tmp_path, checkpoints):
        found = describe_project(place)
        assert found is not None
        assert [Path(item.folder).name for item in found.checkpoints][:4] == [
            "checkpoint_12", "checkpoint_10", "checkpoint_9", "checkpoint_8",
        ]  # fmt: skip
        assert len(found.checkpoints) == 12
        assert found.newest == "checkpoint_8"
    with pytest.warns(UserWarning, match="because newer ones cannot be"):
        assert run.load().folder.name == found.newest


# verify ---------------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_is_verified(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    heard: list[int] = []
    verdict = verify(folder, heard.append)
    assert verdict.problems == ()
    found = manifest.read(folder)
    assert found is not None
    assert verdict.num_files == len(found.files)
    assert verdict.num_bytes == sum(heard) == sum(entry.num_bytes for entry in found.files.values())


def test_a_bit_in_any_file_is_found_and_its_file_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    names = [name for name in files(folder) if name != layout.MANIFEST_NAME]
    assert len(names) > 6
    for name in names:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert verify(folder).problems == (f"{name} has other content than was written",)
        (folder / name).write_bytes(good)
    assert verify(folder).problems == ()


def test_missing_and_shortened_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (folder / "optimizer.json").unlink()
    os.truncate(folder / "model.safetensors", 9)
    assert [problem.partition(",")[0] for problem in verify(folder).problems] == [
        "model.safetensors has other content than was written",
        "optimizer.json is missing",
    ]


def test_a_file_of_another_save_is_told_with_that_save(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "c1", 1, step=1), saved(tmp_path / "c2", 2, step=2)
    shutil.copy(one / "custom_checkpoint_0.json", two / "custom_checkpoint_0.json")
    found = manifest.read(one)
    assert found is not None
    assert verify(two).problems == (
        f"custom_checkpoint_0.json is the file of another save: c1, step 1, save {found.save_id}",
    )


def test_a_folder_without_a_manifest_is_not_verified(tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "c")
    assert verify(folder).problems == ("accelerate_manifest.json is missing: there is nothing to compare with",)
