"""What lies beside a checkpoint, comes into it meanwhile, or belongs to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate.checkpoint import full, layout
from accelerate.checkpoint.weights import save_model
from accelerate.collectives.single import SingleProcess
from accelerate.core.errors import CheckpointError

from .support import Counter, Run, Training


def test_a_run_that_went_back_to_an_older_checkpoint_saves_behind_all_that_are_there(tmp_path: Path) -> None:
    run = Run(tmp_path, automatic_checkpoint_naming=True).having(custom_objects=[Counter(1)])
    for _ in range(3):
        run.save()
    damaged = tmp_path / "checkpoints" / "checkpoint_2" / "custom_checkpoint_0.json"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    again = Run(tmp_path, automatic_checkpoint_naming=True).having(custom_objects=[Counter()])
    with pytest.warns(UserWarning, match="newer ones cannot be"):
        assert again.load().folder.name == "checkpoint_1"
    assert again.save().name == "checkpoint_3"
    again.load(tmp_path / "checkpoints" / "checkpoint_0")
    assert again.save().name == "checkpoint_4"


def test_a_checkpoint_that_is_saved_anew_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = Training("adamw", "step", 1), Training("adamw", "step", 2)
    writer.steps(1)
    writer.run().save(tmp_path / "c")
    real = full.load_model

    def load_model(*args: Any) -> None:
        writer.run().save(tmp_path / "c")
        real(*args)

    monkeypatch.setattr(full, "load_model", load_model)
    with pytest.raises(CheckpointError, match="was saved anew while it was loaded"):
        reader.run().load(tmp_path / "c")


def _leave_link(folder: Path) -> None:
    (folder / "base.bin").symlink_to("/etc/hostname")


def _leave_drive(folder: Path) -> None:
    (folder / "a:1.bin").touch()


@pytest.mark.parametrize(
    ("leave", "told"), [(_leave_link, "a link that leads out .*base.bin"), (_leave_drive, "other systems .*a:1.bin")]
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, leave: Callable[[Path], None], told: str) -> None:
    def hook(models: Any, weights: Any, folder: str) -> None:
        leave(Path(folder))

    with pytest.raises(CheckpointError, match=told):
        Run().save(tmp_path / "c", pre_hooks=[hook])
    assert not (tmp_path / "c").exists()


def test_files_of_others_with_names_of_a_checkpoint_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text("mine")
    (tmp_path / "model.safetensors").write_text("is replaced")
    run = Run().having(models=[torch.nn.Linear(2, 2)])
    with pytest.raises(CheckpointError, match="that no checkpoint there lists: scheduler"):
        run.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "is replaced"
    (tmp_path / "scheduler.json").unlink()
    run.save(tmp_path)
    run.load(tmp_path)


def test_weights_are_not_saved_into_a_checkpoint_of_another_moment(tmp_path: Path) -> None:
    training = Training("adamw", "step", 1)
    training.steps(1)
    training.run().save(tmp_path)
    one = SingleProcess()
    save_model(training.model.state_dict(), tmp_path, one)  # these are the same
    training.steps(1)
    with pytest.raises(CheckpointError, match="would not be what it was saved with"):
        save_model(training.model.state_dict(), tmp_path, one)
    training.run().load(tmp_path)


def test_files_that_only_sound_like_a_checkpoint_are_left_alone(tmp_path: Path) -> None:
    run = Run().having(models=[torch.nn.Linear(2, 2)])
    mine = ["scaler.pkl", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sampler.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    run.save(tmp_path)
    run.load(tmp_path)
    run.save(tmp_path)
    assert {(tmp_path / name).read_text() for name in mine} == {"mine"}


def test_a_file_that_came_into_a_checkpoint_is_not_removed(tmp_path: Path) -> None:
    run = Run().having(models=[torch.nn.Linear(2, 2)])
    run.save(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("mine")
    with pytest.raises(CheckpointError, match=r"no checkpoint there lists: pytorch_model\.bin"):
        run.save(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_text() == "mine"


def test_a_folder_in_the_place_of_an_old_file_is_found_before_the_decision(tmp_path: Path) -> None:
    def hook(models: Any, weights: Any, folder: str) -> None:
        Path(folder, "sub").mkdir()
        Path(folder, "sub", "x").write_text("1")

    run = Run().having(custom_objects=[Counter(1)])
    run.save(tmp_path / "c", pre_hooks=[hook])
    (tmp_path / "c" / "sub").rename(tmp_path / "elsewhere")
    (tmp_path / "c" / "sub").symlink_to(tmp_path / "elsewhere")
    run.objects["custom_objects"][0].value = 2
    with pytest.raises(CheckpointError, match="leads out of"):
        run.save(tmp_path / "c")
    assert not (tmp_path / "c" / layout.COMMIT_NAME).exists(), "it was decided, and cannot be done"
    assert (tmp_path / "elsewhere" / "x").exists()
    (tmp_path / "c" / "sub").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "c" / "sub")
    run.save(tmp_path / "c")
    run.load(tmp_path / "c")
    assert not (tmp_path / "c" / "sub" / "x").exists()
