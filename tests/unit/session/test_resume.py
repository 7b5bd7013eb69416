"""`accelerator.resume()`: what the launch asks to continue."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import CheckpointError, SettingError
from accelerate.session.state import AcceleratorState
from accelerate.utils import Preempted, ProjectConfiguration
from tests.support.ranks import run_on_ranks


def new(folder: Path | str | None) -> tuple[Accelerator, torch.nn.Module]:
    AcceleratorState._reset_state(reset_partial_state=True)
    project = ProjectConfiguration(None if folder is None else str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    return accelerator, accelerator.prepare(torch.nn.Linear(1, 1))


@pytest.fixture
def saved(tmp_path) -> Path:
    accelerator, model = new(tmp_path)
    for number in range(2):
        torch.nn.init.constant_(model.weight, number)
        accelerator.save_state()
    return tmp_path


@pytest.fixture
def auto(monkeypatch):
    monkeypatch.setenv("ACCELERATE_RESUME", "auto")


def test_the_newest_checkpoint_is_loaded_and_named_once(saved, auto, capsys):
    accelerator, model = new(saved)
    newest = saved / "checkpoints" / "checkpoint_1"
    assert accelerator.resume() == newest
    assert model.weight.item() == 1
    torch.nn.init.constant_(model.weight, 5)
    assert accelerator.resume() == newest
    assert model.weight.item() == 5, "a second call changes nothing"
    assert capsys.readouterr().err == f"accelerate: the run continues from {newest}\n"


def test_a_folder_is_loaded(saved, monkeypatch):
    monkeypatch.setenv("ACCELERATE_RESUME", str(saved / "checkpoints" / "checkpoint_0"))
    accelerator, model = new(saved)
    assert accelerator.resume() == saved / "checkpoints" / "checkpoint_0"
    assert model.weight.item() == 0


@pytest.mark.parametrize("text", [None, "off"])
def test_without_the_flag_nothing_is_loaded(saved, monkeypatch, text, capsys):
    if text is not None:
        monkeypatch.setenv("ACCELERATE_RESUME", text)
    accelerator, _ = new(saved / "other")
    assert accelerator.resume() is None
    assert capsys.readouterr().err == ""
    accelerator, _ = new(saved)
    assert accelerator.resume("auto") == saved / "checkpoints" / "checkpoint_1"


def test_a_run_from_the_beginning_in_a_folder_with_checkpoints_is_refused_before_it_begins(saved):
    accelerator, _ = new(saved)
    with pytest.raises(SettingError, match="checkpoint_0.\nAccepted.*\nLaunch with --resume auto"):
        accelerator.resume()
    accelerator.project_configuration.iteration = 2
    assert accelerator.resume() is None


def test_a_script_may_say_off(tmp_path, auto):
    accelerator, _ = new(tmp_path)
    assert accelerator.resume("off") is None
    assert list(accelerator.prepare(torch.utils.data.DataLoader([1])))


@pytest.mark.parametrize("left", [None, "checkpoints", "checkpoints/.accelerate-saving-1234"])
def test_a_run_without_any_checkpoint_starts_from_the_beginning_and_says_so(tmp_path, auto, capsys, left):
    if left is not None:
        (tmp_path / left).mkdir(parents=True)
    accelerator, _ = new(tmp_path)
    assert accelerator.resume() is None
    folder = tmp_path / "checkpoints"
    assert (
        capsys.readouterr().err
        == f"accelerate: {folder} holds no checkpoint at all: the run starts from the beginning.\n"
    )
    accelerator.save_state()
    assert accelerator.resume() is None, "what was saved since is none to go back to"


def test_where_all_checkpoints_are_damaged_it_does_not_start_from_the_beginning(saved, auto):
    for folder in (saved / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    accelerator, _ = new(saved)
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        accelerator.resume()
    with pytest.raises(SettingError, match="would begin from scratch"):
        accelerator.save_state()


def test_an_older_one_is_loaded_with_a_warning(saved, auto):
    (saved / "checkpoints" / "checkpoint_1" / "model.safetensors").unlink()
    accelerator, _ = new(saved)
    with pytest.warns(UserWarning, match="checkpoint_1: .*is not complete"):
        assert accelerator.resume() == saved / "checkpoints" / "checkpoint_0"


def test_auto_without_a_folder_of_checkpoints_is_refused(auto):
    accelerator, _ = new(None)
    with pytest.raises(SettingError, match=r"resume auto.*project_dir=None"):
        accelerator.resume()


def test_load_state_does_as_well(saved, auto):
    accelerator, _ = new(saved)
    shutil.copytree(saved / "checkpoints" / "checkpoint_0", saved / "other")
    accelerator.load_state(saved / "other")
    assert accelerator.resume() == saved / "other"
    assert list(accelerator.prepare(torch.utils.data.DataLoader([1])))


@pytest.mark.parametrize(
    ("begin", "named"),
    [
        (lambda _, loader: next(iter(loader)), "A loop over a prepared loader began"),
        (lambda _, loader: loader.position, "The position of a loader was read"),
        (lambda accelerator, _: accelerator.save_state(), r"save_state\(\) was called"),
    ],
    ids=["loop", "position", "save"],
)
def test_a_script_that_never_loads_does_not_begin_from_scratch(tmp_path, auto, begin, named):
    accelerator, _ = new(tmp_path)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(4)))
    with pytest.raises(SettingError, match=rf"{named}, and the run was launched to continue \(--resume auto"):
        begin(accelerator, loader)
    accelerator.resume()
    begin(accelerator, loader)


def test_an_evaluation_that_was_stopped_begins_at_its_start_in_the_resumed_run(tmp_path, monkeypatch):
    def begin():
        AcceleratorState._reset_state(reset_partial_state=True)
        project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",))
        accelerator = Accelerator(cpu=True, project_config=project)
        model = torch.nn.Linear(1, 1)
        loaders = [torch.utils.data.DataLoader(torch.arange(4)) for _ in range(2)]
        return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), *loaders)

    accelerator, model, optimizer, training, evaluation = begin()
    for _ in training:
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
    with pytest.raises(Preempted):
        for _ in evaluation:
            signal.raise_signal(signal.SIGTERM)
            accelerator.check_preemption()
    monkeypatch.setenv("ACCELERATE_RESUME", "auto")
    accelerator, _, _, training, evaluation = begin()
    accelerator.resume()
    assert (training.position.epoch, training.position.step) == (1, 0)
    assert [batch.item() for batch in evaluation] == [0, 1, 2, 3]


# Addresses and nodes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def address():
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def test_the_newest_checkpoint_at_an_address_is_loaded_and_named(address, auto, capsys, monkeypatch):
    monkeypatch.delenv("ACCELERATE_RESUME")
    accelerator, model = new(address)
    for number in range(2):
        torch.nn.init.constant_(model.weight, number)
        accelerator.save_state()
    with pytest.raises(SettingError, match=f"exists already: {address}/checkpoints/checkpoint_0"):
        new(address)[0].resume()
    monkeypatch.setenv("ACCELERATE_RESUME", "auto")
    accelerator, model = new(address)
    assert accelerator.resume() == f"{address}/checkpoints/checkpoint_1"
    assert model.weight.item() == 1
    assert capsys.readouterr().err == f"accelerate: the run continues from {address}/checkpoints/checkpoint_1\n"


@pytest.mark.parametrize("left", [None, "files-1234/model.safetensors"])
def test_at_an_address_without_any_checkpoint_the_run_starts_from_the_beginning(address, auto, capsys, left):
    if left is not None:  # a first save that was cut off
        fsspec.filesystem("memory").pipe_file(f"/bucket/run/checkpoints/checkpoint_0/{left}", b"")
    accelerator, _ = new(address)
    assert accelerator.resume() is None
    assert f"accelerate: {address}/checkpoints holds no checkpoint at all" in capsys.readouterr().err
    assert accelerator.resume("off") is None
    accelerator.save_state()


def test_a_run_saves_itself_at_an_address_that_holds_checkpoints(address, monkeypatch):
    for number in (0, 9, 10):
        accelerator, _ = new(address)
        accelerator.project_configuration.iteration = number
        accelerator.save_state()
    monkeypatch.setenv("ACCELERATE_SAVE_ON_SIGNALS", "TERM")
    accelerator, _ = new(address)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        accelerator.check_preemption()
    assert left.value.folder == f"{address}/checkpoints/checkpoint_11"


def resume_on_nodes(folders: list[str]) -> object:
    """Each rank is a node of its own, whose disk nobody else reads."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    project = ProjectConfiguration(folders[rank], automatic_checkpoint_naming=True, save_on_each_node=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    assert accelerator.is_local_main_process
    try:
        return accelerator.resume("auto")
    except (CheckpointError, SettingError) as error:
        return str(error)


def test_a_node_whose_disk_is_new_does_not_have_all_start_from_the_beginning(saved, tmp_path):
    told = run_on_ranks(resume_on_nodes, 2, [str(tmp_path / "new"), str(saved)])
    assert all(isinstance(text, str) and "no folder to load a checkpoint from" in text for text in told), told


def test_a_folder_that_cannot_be_listed_is_told_on_all_ranks(saved, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to("checkpoints")  # to itself
    told = run_on_ranks(resume_on_nodes, 2, [str(tmp_path / "other"), str(saved)])
    assert all("symbolic links" in str(text) for text in told), told
