"""Several processes save and load one checkpoint."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from accelerate.checkpoint import commit, durable, layout, manifest, train_state, weights
from accelerate.core.errors import CheckpointError
from accelerate.runtime.state import ProcessSettings, Runtime, start
from accelerate.session.load import load_state
from accelerate.session.save import Contents, Saving, save_state
from accelerate.settings.options.project import ProjectConfiguration
from tests.support.ranks import run_on_ranks


class Box:
    """A registered object with one value."""

    def __init__(self, value: Any):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def contents(custom: Sequence[Box], model: torch.nn.Module | None) -> Contents:
    models = [model] if model else []
    return Contents(models=models, optimizers=[], schedulers=[], dataloaders=[], scaler=None, custom_objects=custom)


def save(
    runtime: Runtime,
    project: ProjectConfiguration,
    folder: Path | None = None,
    custom: Sequence[Box] = (),
    model: torch.nn.Module | None = None,
) -> Path:
    return save_state(
        contents(custom, model),
        folder=folder,
        project=project,
        step=1,
        runtime=runtime,
        saving=Saving(runtime),
        get_model_state=lambda module: module.state_dict(),
    ).wait()


def load(
    runtime: Runtime,
    project: ProjectConfiguration,
    folder: Path | None = None,
    custom: Sequence[Box] = (),
    model: torch.nn.Module | None = None,
) -> Path:
    return load_state(contents(custom, model), folder=folder, project=project, runtime=runtime).folder


def begin() -> Runtime:
    runtime = start(ProcessSettings(cpu=True))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + runtime.process.rank)
    return runtime


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def error_of(action: Any) -> tuple[str, str, float]:
    """Return the class and text of the error that `action` raises, and after how many seconds."""
    started = time.monotonic()
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", 0.0


def _save_and_load(folder: Path) -> Any:
    runtime = begin()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    torch.manual_seed(100 + runtime.process.rank)
    save(runtime, ProjectConfiguration(), folder, model=model)
    seen = sorted(os.listdir(folder))  # complete on every rank as soon as the call returns
    expected = draw()
    other = torch.nn.Linear(3, 3)
    load(runtime, ProjectConfiguration(), folder, model=other)
    return seen, draw() == expected, torch.equal(model.weight, other.weight), expected


def test_each_rank_gets_its_own_random_state_and_the_same_weights(tmp_path: Path) -> None:
    first, second = run_on_ranks(_save_and_load, 2, tmp_path / "c")
    states = [f"random_states_{rank}.{suffix}" for rank in (0, 1) for suffix in ("json", "safetensors")]
    assert first[0] == second[0] == ["accelerate_manifest.json", "model.safetensors", *states]
    assert first[1:3] == second[1:3] == (True, True)
    assert first[3] != second[3]


def _fail_on_rank_one(folder: Path, error: type[Exception]) -> Any:
    runtime = begin()
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    box = Box("old")
    save(runtime, project, custom=[box])
    real = durable.flush_file

    def failing(file: Path) -> None:
        if file.name.startswith(layout.RNG_STATE_NAME) and runtime.process.rank == 1:
            raise error("No space left on device")
        real(file)

    durable.flush_file = failing
    box.value = "new"
    outcome = error_of(lambda: save(runtime, project, custom=[box]))
    durable.flush_file = real
    runtime.collectives.barrier()  # rank 0 has cleaned up
    left = sorted(os.listdir(folder / "checkpoints"))
    load(runtime, project, custom=[box])
    old = box.value
    box.value = "newer"
    again = save(runtime, project, custom=[box]).name
    return outcome, left, old, again, project.iteration


@pytest.mark.parametrize("error", [OSError, KeyError])
def test_a_failed_write_on_one_rank_is_an_error_on_all(tmp_path: Path, error: type[Exception]) -> None:
    for rank, result in enumerate(run_on_ranks(_fail_on_rank_one, 2, tmp_path, error)):
        (kind, text, seconds), left, old, again, iteration = result
        assert kind == "CheckpointError", f"rank {rank}: {text}"
        assert f"rank 1: {error.__name__}" in text
        assert "No space left on device" in text
        assert "rank 0" not in text
        assert seconds < 10
        assert (left, old, again, iteration) == (["checkpoint_0"], "old", "checkpoint_1", 2)


def _fail_while_publishing(folder: Path) -> Any:
    runtime = begin()
    save(runtime, ProjectConfiguration(), folder, custom=[Box("old")])

    def failing(_: Path) -> None:
        raise RuntimeError("the disk is gone")

    durable.flush_tree, real = failing, durable.flush_tree
    outcome = error_of(lambda: save(runtime, ProjectConfiguration(), folder, custom=[Box("new")]))
    durable.flush_tree = real
    box = Box(None)
    load(runtime, ProjectConfiguration(), folder, custom=[box])
    return outcome, box.value


def test_a_failure_of_the_last_step_is_an_error_on_all(tmp_path: Path) -> None:
    for outcome, value in run_on_ranks(_fail_while_publishing, 2, tmp_path / "c"):
        assert outcome[0] == "CheckpointError"
        assert "rank 0: RuntimeError: the disk is gone" in outcome[1]
        assert value == "old"


def _existing(folder: Path) -> Any:
    runtime = begin()
    outcomes = []
    for _ in range(2):
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
        outcomes.append(error_of(lambda project=project: save(runtime, project))[0])
    outcomes.append(error_of(lambda: load(runtime, ProjectConfiguration(), folder / "absent"))[0])
    return outcomes


def test_a_refused_folder_is_an_error_on_all(tmp_path: Path) -> None:
    assert run_on_ranks(_existing, 2, tmp_path) == [["", "SettingError", "SettingError"]] * 2


def _load_fails_on_one_rank(folder: Path) -> Any:
    runtime = begin()
    project = ProjectConfiguration()
    save(runtime, project, folder, model=torch.nn.Linear(2, 2))
    size = 2 if runtime.process.rank == 0 else 3
    return error_of(lambda: load(runtime, project, folder, model=torch.nn.Linear(size, 2)))


def test_no_rank_goes_on_when_another_could_not_load(tmp_path: Path) -> None:
    first, second = run_on_ranks(_load_fails_on_one_rank, 2, tmp_path / "c")
    assert first[0] == second[0] == "CheckpointError"
    assert "rank 1: CheckpointError" in first[1]
    assert "size mismatch" in second[1]


def _misfit_on_one_rank(folder: Path) -> Any:
    runtime = begin()
    model = torch.nn.Linear(2, 2)
    save(runtime, ProjectConfiguration(), folder, model=model, custom=[Box(1)])
    if runtime.process.rank == 1:
        (folder / "custom_checkpoint_0.json").write_text("{")
    runtime.collectives.barrier()
    if runtime.process.rank == 0:  # as if it had a disk of its own
        train_state.read_state = lambda *_, **__: {"value": 1}
    box = Box(None)
    fresh = torch.nn.Linear(2, 2)
    before = fresh.weight.clone()
    options: Any = {"project": ProjectConfiguration(), "runtime": runtime, "verify": "off"}
    outcome = error_of(lambda: load_state(contents([box], fresh), folder=folder, **options))
    return outcome[0], torch.equal(fresh.weight, before), box.value


def test_what_does_not_fit_on_one_rank_is_loaded_on_none(tmp_path: Path) -> None:
    assert run_on_ranks(_misfit_on_one_rank, 2, tmp_path / "c") == [("CheckpointError", True, None)] * 2


def _save_on_two_disks(folder: Path) -> Any:
    """Each rank stands for a node with a disk of its own, though they share a host."""
    runtime = begin()
    rank = runtime.process.rank
    runtime = replace(runtime, process=replace(runtime.process, local_rank=0, local_world_size=1))
    disk = folder / f"disk{rank}"
    project = ProjectConfiguration(str(disk), automatic_checkpoint_naming=True, total_limit=1, save_on_each_node=True)
    box = Box(0)
    for box.value in (1, 2):
        save(runtime, project, custom=[box])
    expected = draw()
    box.value = 0
    load(runtime, project, custom=[box])
    same = draw() == expected
    names = sorted(os.listdir(disk / "checkpoints" / "checkpoint_1"))
    # One node goes back to an older copy.
    if rank == 1:
        file = disk / "checkpoints" / "checkpoint_1" / layout.MANIFEST_NAME
        found = msgspec.json.decode(file.read_bytes(), type=manifest.Manifest)
        file.write_bytes(manifest.to_bytes(msgspec.structs.replace(found, save_id="another")))
    mixed = error_of(lambda: load(runtime, project, custom=[box]))
    return os.listdir(disk / "checkpoints"), names, box.value, same, mixed


def test_nodes_with_their_own_disks(tmp_path: Path) -> None:
    for rank, (folders, names, value, same, mixed) in enumerate(run_on_ranks(_save_on_two_disks, 2, tmp_path)):
        assert folders == ["checkpoint_1"]
        states = [f"random_states_{rank}.json", f"random_states_{rank}.safetensors"]
        assert names == ["accelerate_manifest.json", "custom_checkpoint_0.json", *states]
        assert (value, same) == (2, True)
        assert mixed[0] == "CheckpointError"
        assert "different saves" in mixed[1]


def _load_on_three(folder: Path) -> Any:
    runtime = begin()
    if runtime.process.rank < 2:
        load(runtime, ProjectConfiguration(), folder)
        load(runtime, ProjectConfiguration(), folder)
        return True
    drawn = []
    for seed in (1, 2):  # what follows comes from the checkpoint, and not from before
        torch.manual_seed(seed)
        load(runtime, ProjectConfiguration(), folder)
        drawn.append(torch.rand(3))
    return torch.equal(*drawn)


def _save_plain(folder: Path) -> None:
    save(begin(), ProjectConfiguration(), folder)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    run_on_ranks(_save_plain, 2, tmp_path / "c")
    assert run_on_ranks(_load_on_three, 3, tmp_path / "c") == [True] * 3
    assert run_on_ranks(_load_plain, 1, tmp_path / "c") == [tmp_path / "c"]


def _load_plain(folder: Path) -> Path:
    return load(begin(), ProjectConfiguration(), folder)


def _one_object(folder: Path) -> Any:
    runtime = begin()
    rank = runtime.process.rank
    weights.save({"rank": rank}, folder / f"by-{rank}")
    weights.save_model({"x": torch.full((2,), float(rank))}, folder / "m", runtime.collectives)
    return weights.load_weights(folder / "m")["x"].tolist()


def test_rank_zero_writes_one_object(tmp_path: Path) -> None:
    assert run_on_ranks(_one_object, 2, tmp_path) == [[0.0, 0.0]] * 2
    assert sorted(os.listdir(tmp_path)) == ["by-0", "m"]


def _die_while_saving(folder: Path) -> Any:
    runtime = begin()
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    save(runtime, project, custom=[Box("old")])
    if runtime.process.rank == 1:
        real = durable.flush_file

        def die(file: Path) -> None:
            real(file)
            os._exit(17)

        durable.flush_file = die
    return error_of(lambda: save(runtime, project, custom=[Box("new")]))


def test_a_rank_that_dies_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 died with exit code 17"):
        run_on_ranks(_die_while_saving, 2, tmp_path, timeout=20)
    assert [name for name in os.listdir(tmp_path / "checkpoints") if not name.startswith(".")] == ["checkpoint_0"]
    assert run_on_ranks(_newest, 1, tmp_path) == [("checkpoint_0", "old")]


def _newest(folder: Path) -> tuple[str, str]:
    box = Box(None)
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    return load(begin(), project, custom=[box]).name, box.value


def _rotation_fails(folder: Path) -> Any:
    runtime = begin()
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    save(runtime, project)

    def rotate(*_: Any) -> list[str]:
        raise CheckpointError("Input/output error")

    commit.rotate = rotate
    save(runtime, project)
    return project.iteration


def test_ranks_go_on_alike_where_an_old_checkpoint_cannot_be_removed(tmp_path: Path) -> None:
    assert run_on_ranks(_rotation_fails, 2, tmp_path) == [2, 2]
