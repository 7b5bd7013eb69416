"""A run is saved and continued as if nothing had happened."""

from __future__ import annotations

import copy
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accelerate.checkpoint import commit, durable, layout, manifest, train_state
from accelerate.checkpoint.train_state import plan_state
from accelerate.checkpoint.weights import load
from accelerate.core.errors import CheckpointError
from accelerate.session import save as saving

from .support import OPTIMIZERS, SCHEDULERS, Counter, Run, Tied, Training, same_bits, write


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("adamw", name) for name in SCHEDULERS] + [(name, "step") for name in OPTIMIZERS if name != "adamw"],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, scheduler: str) -> None:
    first = Training(optimizer, scheduler, seed=1)
    first.steps(4)
    first.run().save(tmp_path / "c", step=3)
    expected = first.steps(4)

    second = Training(optimizer, scheduler, seed=2)
    loaded = second.run().load(tmp_path / "c")
    assert loaded.step == 3
    assert second.steps(4) == expected
    assert same_bits(dict(second.model.state_dict()), dict(first.model.state_dict()))
    assert same_bits(second.optimizer.state_dict(), first.optimizer.state_dict())
    assert same_bits(second.scheduler.state_dict(), first.scheduler.state_dict())


def test_what_was_loaded_does_not_lie_in_the_files(tmp_path: Path) -> None:
    """A run that has loaded a checkpoint neither changes with its files nor keeps the disk from deleting them."""
    first, second = Training("adamw", "step", seed=1), Training("adamw", "step", seed=2)
    first.steps(2)
    first.run().save(tmp_path / "c")
    second.run().load(tmp_path / "c", load_model_kwargs={"assign": True})
    for file in (tmp_path / "c").glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("r+b") as stream:  # the same file, not another one in its place
            stream.write(b"\xff" * size)
    assert same_bits(dict(second.model.state_dict()), dict(first.model.state_dict()))
    assert same_bits(second.optimizer.state_dict(), first.optimizer.state_dict())


def test_files_of_a_full_run(tmp_path: Path) -> None:
    one, two = Training("adamw", "step", 1), Training("sgd", "step", 1)
    run = Run().having(
        models=[one.model, two.model],
        optimizers=[one.optimizer, two.optimizer],
        schedulers=[one.scheduler, two.scheduler],
        dataloaders=[Loader()],
        scaler=torch.amp.GradScaler("cpu"),
        custom_objects=[Counter(3), Counter(torch.ones(2))],
    )
    one.steps(1)
    two.steps(1)
    path = run.save(tmp_path / "c")
    assert path == tmp_path / "c"
    assert sorted(durable.files_below(path)) == sorted(
        """accelerate_manifest.json custom_checkpoint_0.json custom_checkpoint_1.json custom_checkpoint_1.safetensors
        model.safetensors model_1.safetensors optimizer.json optimizer.safetensors optimizer_1.json
        optimizer_1.safetensors random_states_0.json random_states_0.safetensors sampler.json sampler.safetensors
        scaler.json scheduler.json scheduler_1.json""".split()
    )
    found = manifest.read(path)
    assert found is not None
    manifest.check(path, found)
    for name in durable.files_below(path):
        start = (path / name).read_bytes()[:9]
        assert start.startswith(b"{") or start.endswith(b"{"), f"{name} is neither JSON nor safetensors"


class Loader:
    """What a checkpoint looks at in a prepared loader."""

    def __init__(self, stateful: bool = False):
        self.use_stateful_dataloader = stateful
        self.place = {"epoch": 0, "generator": torch.Generator().get_state()}
        self.reading = 0

    def position_state(self) -> dict[str, Any]:
        return self.place

    def load_position_state(self, saved: dict[str, Any]) -> None:
        self.place = saved

    def own_state(self) -> dict[str, int] | None:
        return {"reading": self.reading} if self.use_stateful_dataloader else None

    def load_own_state(self, saved: dict[str, int]) -> None:
        self.reading = saved["reading"]


def test_loaders_and_scaler_come_back(tmp_path: Path) -> None:
    loader, plain, scaler = Loader(stateful=True), Loader(), torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = torch.Generator().manual_seed(3).get_state()
    loader.place, loader.reading, plain.reading = {"epoch": 2, "generator": expected}, 7, 7
    run = Run().having(dataloaders=[loader, plain], scaler=scaler, custom_objects=[Counter(("a", 1))])
    run.save(tmp_path / "c")

    loader, plain, scaler, counter = Loader(stateful=True), Loader(), torch.amp.GradScaler("cpu"), Counter()
    Run().having(dataloaders=[loader, plain], scaler=scaler, custom_objects=[counter]).load(tmp_path / "c")
    assert (loader.place["epoch"], loader.reading, plain.reading) == (2, 7, 0)
    assert torch.equal(loader.place["generator"], expected)
    assert scaler.get_scale() == 8.0
    assert counter.value == ("a", 1)


def test_half_precision_and_tied_models(tmp_path: Path) -> None:
    tied, half = Tied(), torch.nn.Linear(2, 2).bfloat16()
    Run().having(models=[tied, half]).save(tmp_path / "c")
    fresh = [Tied(), torch.nn.Linear(2, 2).bfloat16()]
    Run().having(models=fresh).load(tmp_path / "c")
    assert same_bits(dict(fresh[0].state_dict()), dict(tied.state_dict()))
    assert same_bits(dict(fresh[1].state_dict()), dict(half.state_dict()))
    assert fresh[0].a.weight is fresh[0].b.weight


def test_weights_as_pickles_only_when_asked(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    Run().having(models=[model]).save(tmp_path / "c", safe_serialization=False)
    assert (tmp_path / "c" / "pytorch_model.bin").is_file()
    assert not (tmp_path / "c" / "model.safetensors").exists()
    other = torch.nn.Linear(2, 2)
    Run().having(models=[other]).load(tmp_path / "c")
    assert torch.equal(model.weight, other.weight)


def test_no_folder_and_no_naming(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="automatic_checkpoint_naming"):
        Run().save()
    with pytest.raises(ValueError, match="automatic_checkpoint_naming"):
        Run().load()
    with pytest.raises(ValueError, match="project_dir"):
        Run(automatic_checkpoint_naming=True).save()
    with pytest.raises(ValueError, match="absent"):
        Run().load(tmp_path / "absent")


def test_automatic_naming_counts_rotates_and_resumes(tmp_path: Path) -> None:
    counter = Counter(0)
    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=2).having(custom_objects=[counter])
    seen = []
    for counter.value in range(3):
        run.save()
        seen.append(sorted(os.listdir(tmp_path / "checkpoints")))
    assert seen == [["checkpoint_0"], ["checkpoint_0", "checkpoint_1"], ["checkpoint_1", "checkpoint_2"]]
    assert run.project.iteration == 3

    counter = Counter()
    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=2).having(custom_objects=[counter])
    assert run.load().folder.name == "checkpoint_2"
    assert (counter.value, run.project.iteration) == (2, 3)
    assert run.save().name == "checkpoint_3"


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    Run(tmp_path, automatic_checkpoint_naming=True).save()
    run = Run(tmp_path, automatic_checkpoint_naming=True)
    with pytest.raises(ValueError, match="exists already"):
        run.save()
    assert run.project.iteration == 0


def test_explicit_folders_count_too(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "a")
    run.save(str(tmp_path / "a"))
    assert run.project.iteration == 2


def test_the_oldest_goes_only_when_the_newest_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    run.save()
    events: list[str] = []
    real_flush, real_rotate = durable.flush_folder, commit.rotate

    def flush(folder: Path) -> None:
        events.append(folder.name)
        real_flush(folder)

    def rotate(*args: Any) -> list[str]:
        assert (tmp_path / "checkpoints" / "checkpoint_1").is_dir()
        events.append("rotate")
        return real_rotate(*args)

    monkeypatch.setattr(durable, "flush_folder", flush)
    monkeypatch.setattr(saving.commit, "rotate", rotate)
    run.save()
    assert events[events.index("rotate") - 1] == "checkpoints"


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter("old")
    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=1).having(custom_objects=[counter])
    run.save()
    counter.value = lambda: 0
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0 -> 'value' is a function"):
        run.save()
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_0"]
    assert run.project.iteration == 1
    counter.value = None
    run.load()
    assert counter.value == "old"


def test_a_new_save_removes_what_the_old_one_had_more(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    Run().having(models=[Tied(), Tied()], custom_objects=[Counter(1)]).save(tmp_path)
    Run().having(models=[Tied()]).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "accelerate_manifest.json",
        "model.safetensors",
        "notes.txt",
        "random_states_0.json",
        "random_states_0.safetensors",
    ]


def test_hooks_take_models_out(tmp_path: Path) -> None:
    calls = []

    def on_save(models: list[Any], weights: list[Any], folder: str) -> None:
        calls.append(([type(m).__name__ for m in models], len(weights), Path(folder).name))
        (Path(folder) / "adapter").mkdir()
        (Path(folder) / "adapter" / "a.txt").write_text("mine")
        weights.pop()

    def on_load(models: list[Any], folder: str) -> None:
        calls.append((Path(folder) / "adapter" / "a.txt").read_text())
        models.pop()

    model = Tied()
    run = Run().having(models=[model])
    run.save(tmp_path / "hooks", pre_hooks=[on_save])
    assert not (tmp_path / "hooks" / "model.safetensors").exists()
    run.load(tmp_path / "hooks", pre_hooks=[on_load])
    assert calls == [(["Tied"], 1, "hooks"), "mine"]


def test_numbers_of_objects_have_to_match(tmp_path: Path) -> None:
    Run().having(models=[Tied()], custom_objects=[Counter(1)]).save(tmp_path / "c")
    with pytest.raises(RuntimeError, match="1 registered objects, and 0"):
        Run().having(models=[Tied()]).load(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="model 1"):
        Run().having(models=[Tied(), Tied()], custom_objects=[Counter()]).load(tmp_path / "c")
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(FileNotFoundError, match="optimizer"):
        run = Run().having(models=[Tied()], optimizers=[torch.optim.SGD(parameters)], custom_objects=[Counter()])
        run.load(tmp_path / "c")
    Run().having(models=[Tied()], custom_objects=[Counter()]).load(tmp_path / "c")


def _trainings(count: int) -> Run:
    parts = [Training("adamw", "step", seed) for seed in range(count)]
    return Run().having(
        models=[part.model for part in parts],
        optimizers=[part.optimizer for part in parts],
        schedulers=[part.scheduler for part in parts],
    )


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["models", "optimizers", "schedulers"])
def test_saved_objects_that_nothing_takes_are_named(tmp_path: Path, kind: str, safe: bool) -> None:
    _trainings(2).save(tmp_path / "c", safe_serialization=safe)
    fewer = _trainings(2)
    fewer.objects[kind].pop()

    with pytest.raises(CheckpointError, match=rf"\({kind}: 2, prepared here: 1\)") as caught:
        fewer.load(tmp_path / "c")
    assert "pass strict=False to load_state" in str(caught.value)
    with pytest.warns(UserWarning, match=rf"holds more than is loaded \({kind}: 2, prepared here: 1\)"):
        fewer.load(tmp_path / "c", strict=False)


def test_an_evaluation_without_optimizers_is_told_once_what_it_leaves(tmp_path: Path) -> None:
    _trainings(1).save(tmp_path / "c")
    alone = _trainings(1).having(optimizers=[], schedulers=[])

    with pytest.warns(UserWarning) as told:
        alone.load(tmp_path / "c")

    assert [str(item.message).partition(" holds ")[2] for item in told] == [
        "more than is loaded (optimizers: 1, prepared here: 0; schedulers: 1, prepared here: 0)."
    ]


def test_models_that_a_hook_may_load_are_not_counted(tmp_path: Path) -> None:
    Run().having(models=[Tied(), Tied()]).save(tmp_path / "c")

    Run().having(models=[Tied()]).load(tmp_path / "c", pre_hooks=[lambda models, folder: None])


def test_what_lies_beside_checkpoints_does_not_keep_old_ones_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    run.save()
    folder = tmp_path / "checkpoints"
    (folder / f"{layout.SAVING_NAME}-ab12").touch()
    run.save()
    assert os.listdir(folder) == ["checkpoint_1"]

    stuck = folder / f"{layout.SAVING_NAME}-cd34"
    stuck.mkdir()
    remove = shutil.rmtree

    def refuse(path: Any, **options: Any) -> None:
        if Path(path) == stuck:
            raise PermissionError(13, "no", str(path))
        remove(path, **options)

    monkeypatch.setattr(commit.shutil, "rmtree", refuse)
    run.save()
    assert "could not be removed" in caplog.text
    assert sorted(os.listdir(folder)) == [stuck.name, "checkpoint_2"]


def test_states_of_devices_that_are_not_there_any_more_are_left_out_with_a_word(tmp_path: Path) -> None:
    class Device:
        """As many generators as devices are visible."""

        rng_key = "random_device"

        def __init__(self, states: list[int]) -> None:
            self.states = states

        def count(self) -> int:
            return len(self.states)

        def get_rng_state(self) -> list[int]:
            return list(self.states)

        def set_rng_state(self, states: list[int]) -> None:
            for index, state in enumerate(states):
                self.states[index] = state

    many: Any = Device([1, 2, 3])
    few: Any = Device([0, 0])
    write(tmp_path, plan_state(layout.rng_stem(0), train_state.random_state(many)))

    with pytest.warns(UserWarning, match=r"random_device of 1 devices \(not visible here\)"):
        train_state.load_random_state(tmp_path, 0, 1, few, strict=True)

    assert few.states == [1, 2]


def _smaller(training: Training) -> None:
    training.optimizer = torch.optim.AdamW(list(training.model.parameters())[:1])


def _no_schedule(training: Training) -> None:
    (training.folder / "scheduler.json").unlink()


def _no_weights(training: Training) -> None:
    (training.folder / "model_1.safetensors").unlink()


def _damaged_object(training: Training) -> None:
    (training.folder / "custom_checkpoint_0.json").write_text("{")


def _of_other_windows(training: Training) -> None:
    (training.folder / "accumulation_rank0.json").write_text("{")


@pytest.mark.parametrize("harm", [_smaller, _no_schedule, _no_weights, _damaged_object, _of_other_windows])
def test_what_does_not_fit_is_found_before_anything_is_loaded(tmp_path: Path, harm: Callable[[Training], None]) -> None:
    first = Training("adamw", "step", seed=1)
    first.steps(1)
    first.run().having(models=[first.model, Tied()], custom_objects=[Counter("old")]).save(tmp_path)
    second = Training("adamw", "step", seed=2)
    second.steps(1)
    second.folder = tmp_path
    harm(second)
    counter, optimizer = Counter("new"), second.optimizer
    before = copy.deepcopy((dict(second.model.state_dict()), optimizer.state_dict(), second.scheduler.state_dict()))

    with pytest.raises(CheckpointError):
        run = second.run().having(models=[second.model, Tied()], custom_objects=[counter])
        run.load(tmp_path, verify="off")

    after = (dict(second.model.state_dict()), optimizer.state_dict(), second.scheduler.state_dict())
    assert same_bits(after, before)
    assert counter.value == "new"


def test_arguments_for_the_model(tmp_path: Path) -> None:
    Run().having(models=[torch.nn.Linear(2, 2)]).save(tmp_path / "c")
    more = torch.nn.ModuleDict({"x": torch.nn.Linear(1, 1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        Run().having(models=[more]).load(tmp_path / "c")
    Run().having(models=[more]).load(tmp_path / "c", load_model_kwargs={"strict": False})
    with pytest.raises(TypeError):
        Run().having(models=[more]).load(tmp_path / "c", load_model_kwargs={"unknown": 1})


# Incomplete and damaged folders


@pytest.mark.parametrize("harm", ["manifest", "missing", "truncated", "emptied"])
def test_the_newest_complete_checkpoint_is_taken(tmp_path: Path, harm: str) -> None:
    counter = Counter(0)
    run = Run(tmp_path, automatic_checkpoint_naming=True).having(models=[Tied()], custom_objects=[counter])
    run.save()
    counter.value = 1
    run.save()
    newest = tmp_path / "checkpoints" / "checkpoint_1"
    if harm == "manifest":
        (newest / layout.MANIFEST_NAME).unlink()
    elif harm == "missing":
        (newest / "custom_checkpoint_0.json").unlink()
    elif harm == "truncated":
        os.truncate(newest / "model.safetensors", 40)
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    with pytest.warns(UserWarning, match="checkpoint_1"):
        assert run.load().folder.name == "checkpoint_0"
    assert counter.value == 0
    with pytest.raises(CheckpointError, match=r"manifest|missing|bytes|registered"):
        run.load(newest)


def test_no_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*checkpoint_0"):
        Run(tmp_path, automatic_checkpoint_naming=True).load()


def test_a_folder_without_manifest_only_when_asked(tmp_path: Path) -> None:
    counter = Counter(1)
    run = Run().having(custom_objects=[counter])
    run.save(tmp_path / "c")
    (tmp_path / "c" / layout.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="strict=False"):
        run.load(tmp_path / "c")
    counter.value = 0
    run.load(tmp_path / "c", strict=False)
    assert counter.value == 1


def test_a_save_cut_off_at_its_end_is_finished_by_loading(tmp_path: Path) -> None:
    counter = Counter("old")
    run = Run().having(custom_objects=[counter])
    run.save(tmp_path / "c")
    counter.value = "new"
    run.save(tmp_path / "d")
    pending = tmp_path / "c" / layout.COMMIT_NAME
    pending.mkdir()
    (tmp_path / "d").rename(pending / "c")
    (pending / layout.JOURNAL_NAME).write_text('{"folder": "c", "remove": []}')
    run.load(tmp_path / "c")
    assert counter.value == "new"
    assert not pending.exists()


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    Run().save(tmp_path / "c")
    file = tmp_path / "c" / layout.MANIFEST_NAME
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99"):
        Run().load(tmp_path / "c")


def test_changed_bytes_of_the_same_size_are_seen_by_hashes(tmp_path: Path) -> None:
    Run().having(models=[Tied()]).save(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = manifest.read(tmp_path / "c")
    assert found is not None
    manifest.check(tmp_path / "c", found, "size")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content"):
        manifest.check(tmp_path / "c", found)


# Random states


def test_what_of_the_random_states_is_not_restored_is_named(tmp_path: Path) -> None:
    Run().save(tmp_path / "c")
    state = train_state.read_state(tmp_path / "c", "random_states_0")
    del state["torch_manual_seed"]
    write(tmp_path, plan_state("random_states_0", state))
    cpu = Run().runtime.hardware
    with pytest.warns(UserWarning, match=r"rank 0: torch_manual_seed \(not in the checkpoint\)"):
        train_state.load_random_state(tmp_path, 0, 1, cpu, strict=True)
    write(tmp_path, plan_state("random_states_0", state | {"torch_manual_seed": "wrong"}))
    with pytest.raises(CheckpointError, match="torch_manual_seed"):
        train_state.load_random_state(tmp_path, 0, 1, cpu, strict=True)
    with pytest.warns(UserWarning, match="torch_manual_seed"):
        train_state.load_random_state(tmp_path, 0, 1, cpu, strict=False)


def test_a_rank_that_was_not_there_gets_numbers_that_follow_from_the_checkpoint(tmp_path: Path) -> None:
    Run().save(tmp_path / "c")
    drawn = []
    for seed, rank in ((5, 3), (6, 3), (7, 4)):
        torch.manual_seed(seed)
        train_state.load_random_state(tmp_path / "c", rank, 1, Run().runtime.hardware, strict=True)
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    with pytest.raises(CheckpointError, match="Rank 3"):
        train_state.load_random_state(tmp_path / "c", 3, 8, Run().runtime.hardware, strict=True)


def test_a_state_does_not_depend_on_its_file_once_read(tmp_path: Path) -> None:
    write(tmp_path, plan_state("s", {"x": torch.ones(1000)}))
    state = train_state.read_state(tmp_path, "s")
    with (tmp_path / "s.safetensors").open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(2000))
    assert state["x"].eq(1).all()


# Folders of Accelerate 1.x


def peer_folder(folder: Path, training: Training, custom: Any = None) -> None:
    folder.mkdir(parents=True)
    torch.save(training.model.state_dict(), folder / "pytorch_model.bin")
    torch.save(training.optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(training.scheduler.state_dict(), folder / "scheduler.bin")
    torch.save(torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(), folder / "scaler.pt")
    torch.save({"value": custom}, folder / "custom_checkpoint_0.pkl")
    states = {"random_state": random.getstate(), "numpy_random_seed": np.random.get_state()}
    torch.save({"step": 4, **states, "torch_manual_seed": torch.get_rng_state()}, folder / "random_states_0.pkl")


def test_a_folder_of_the_peer_is_continued(tmp_path: Path) -> None:
    first = Training("adamw", "multistep", 1)
    first.steps(3)
    peer_folder(tmp_path / "checkpoints" / "checkpoint_4", first, [1, torch.ones(1)])
    expected = first.steps(3)
    second, scaler, counter = Training("adamw", "multistep", 2), torch.amp.GradScaler("cpu"), Counter()
    run = Run(tmp_path, automatic_checkpoint_naming=True)
    run.objects = second.run().having(scaler=scaler, custom_objects=[counter]).objects
    loaded = run.load()
    assert (loaded.step, loaded.iteration) == (4, 5)
    assert (scaler.get_scale(), counter.value) == (8.0, [1, torch.ones(1)])
    assert second.steps(3) == expected


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.file),))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "optimizer.bin",
        "scheduler.bin",
        "scaler.pt",
        "custom_checkpoint_0.pkl",
        "random_states_0.pkl",
    ],
)
@pytest.mark.parametrize("raw", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("strict", [True, False])
def test_no_code_of_a_pickle_runs(tmp_path: Path, name: str, raw: bool, strict: bool) -> None:
    training = Training("sgd", "step", 1)
    folder = tmp_path / "c"
    peer_folder(folder, training)
    poison = {"x": Canary(tmp_path / "canary")}
    if raw:
        (folder / name).write_bytes(pickle.dumps(poison, protocol=2))
    else:
        torch.save(poison, folder / name)
    run = training.run().having(scaler=torch.amp.GradScaler("cpu"), custom_objects=[Counter()])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        run.load(folder, strict=strict)
    assert not (tmp_path / "canary").exists()


def test_the_canary_sings_when_trusted(tmp_path: Path) -> None:
    torch.save(Canary(tmp_path / "canary"), tmp_path / "f")
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / "f")
    assert not (tmp_path / "canary").exists()
    load(tmp_path / "f", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_a_peer_folder_says_nothing_of_loaders(tmp_path: Path) -> None:
    training = Training("sgd", "step", 1)
    peer_folder(tmp_path / "c", training)
    torch.save({"reading": 3}, tmp_path / "c" / "dl_state_dict.bin")
    loader = Loader(stateful=True)
    run = training.run().having(dataloaders=[loader], custom_objects=[Counter()])
    with pytest.warns(UserWarning, match="loader 0"):
        run.load(tmp_path / "c")
    assert loader.reading == 3


@pytest.mark.parametrize("error", [PermissionError("no"), CheckpointError("no")])
def test_rotation_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def rotate(*_: Any) -> list[str]:
        raise error

    run = Run(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    monkeypatch.setattr(saving.commit, "rotate", rotate)
    run.save()
    assert "could not be removed" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.load()
