"""Damage of a checkpoint, of any file at any place: found, named, and never loaded."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpoint import layout, manifest
from accelerate.core.errors import CheckpointError, SettingError
from accelerate.runtime.state import ProcessSettings, start
from tests.support.ranks import run_on_ranks
from tests.unit.checkpoint.support import Counter, Run, Tied

MANIFEST = layout.MANIFEST_NAME


class Training:
    """A run with every kind of file, saved twice: as `checkpoint_0`, and with other numbers as `checkpoint_1`."""

    def __init__(self, folder: Path):
        self.model, self.box = Tied(), Counter(torch.ones(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.run = Run(folder, automatic_checkpoint_naming=True).having(
            models=[self.model],
            optimizers=[self.optimizer],
            schedulers=[torch.optim.lr_scheduler.StepLR(self.optimizer, 1)],
            scaler=torch.amp.GradScaler("cpu"),
            custom_objects=[self.box],
        )
        for number in (0, 1):
            self.box.value = torch.full((3,), float(number))
            self.model.a.weight.sum().backward()
            self.optimizer.step()
            last = self.run.save(windows=[{"reference": None}])
        self.last = last
        self.names = sorted(os.listdir(last))

    def refusal(self, **options: Any) -> str:
        """Load the damaged `checkpoint_1`, which has to fail before anything changes."""
        before = self.box.value
        with pytest.raises(CheckpointError) as caught:
            self.run.load(self.last, **options)
        assert self.box.value is before
        return str(caught.value)

    def passes_over(self, name: str) -> None:
        """Load without a folder: the older one is taken, with a warning that names what is wrong with the newer."""
        with pytest.warns(UserWarning) as told:
            assert self.run.load().folder.name == "checkpoint_0"
        [text] = [str(item.message) for item in told if "newer ones cannot be" in str(item.message)]
        assert str(self.last) in text
        assert name in text
        assert self.box.value.eq(0).all()


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_every_kind_of_file_is_there(training: Training) -> None:
    stems = {name.partition(".")[0] for name in training.names}
    expected = {"accelerate_manifest", "model", "optimizer", "scheduler", "scaler", "random_states_0"}
    assert stems == expected | {"custom_checkpoint_0", "accumulation_rank0"}


def _header(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_every_file_cut_off_at_eight_places(training: Training) -> None:
    counted = 0
    for name in training.names:
        file = training.last / name
        content = file.read_bytes()
        header = _header(content) if name.endswith(".safetensors") else 16
        for size in (0, 1, 7, 8, header - 1, header, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            for verify in ("full", "size"):
                assert name in training.refusal(verify=verify), (name, size, verify)
            counted += 1
        training.passes_over(name)
        file.write_bytes(content)
    assert counted == 8 * len(training.names)
    assert training.run.load().folder.name == "checkpoint_1"


def flip_bits(training: Training, count: int, seed: int) -> None:
    """Change single bits, as many in each file; each one has to be found by name."""
    draw = random.Random(seed)
    for number in range(count):
        name = training.names[number % len(training.names)]
        file = training.last / name
        content = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        assert name in training.refusal(), f"seed {seed}, flip {number}: bit {bit} of {name}"
        if number < len(training.names):
            training.passes_over(name)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    assert training.run.load().folder.name == "checkpoint_1"


def test_single_bits_that_change(training: Training) -> None:
    flip_bits(training, 40, seed=4)


@pytest.mark.full
def test_a_thousand_single_bits_that_change(training: Training) -> None:
    flip_bits(training, 1000, seed=1)


@pytest.mark.full
def test_every_single_bit_of_the_manifest(training: Training) -> None:
    file = training.last / MANIFEST
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"accelerate_manifest\.json|checkpoint format"):
            manifest.read(training.last)


def test_every_file_lost(training: Training) -> None:
    for name in training.names:
        file = training.last / name
        content = file.read_bytes()
        file.unlink()
        for verify in ("full", "size"):
            assert name in training.refusal(verify=verify)
        training.passes_over(name)
        file.write_bytes(content)


def test_a_folder_of_the_same_name_is_no_file(training: Training) -> None:
    (training.last / "scheduler.json").unlink()
    (training.last / "scheduler.json").mkdir()
    assert "scheduler.json is missing" in training.refusal()


def test_a_file_of_another_save_in_place_of_one(training: Training) -> None:
    older = training.last.parent / "checkpoint_0"
    for name in training.names:
        file = training.last / name
        content, other = file.read_bytes(), (older / name).read_bytes()
        if content == other:
            continue
        shutil.copy(older / name, file)
        text = training.refusal()
        # The manifest of the other save is a good one: the files are not those it knows.
        assert name in text or (name == MANIFEST and "model.safetensors has other content" in text), text
        training.passes_over("model.safetensors" if name == MANIFEST else name)
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["random_states_1.json", "model_1.safetensors", "custom_checkpoint_7.pkl", "scaler.pt"]
)
def test_a_file_that_another_save_has_left(training: Training, name: str) -> None:
    shutil.copy(training.last / "random_states_0.json", training.last / name)
    for verify in ("full", "size"):
        assert f"{name} does not belong to this save" in training.refusal(verify=verify)
    training.passes_over(name)


def test_files_of_others_are_none_of_our_business(training: Training) -> None:
    (training.last / "notes.txt").write_text("mine")
    (training.last / "my_model.safetensors").write_text("mine")
    (training.last / "sub").mkdir()
    (training.last / "sub" / "optimizer.json").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training.run.load().folder == training.last


def test_what_sizes_do_not_see_is_loaded_when_only_sizes_are_asked_for(training: Training) -> None:
    shutil.copy(training.last.parent / "checkpoint_0" / "custom_checkpoint_0.safetensors", training.last)
    training.run.load(training.last, verify="size")
    assert training.box.value.eq(0).all()
    assert "custom_checkpoint_0.safetensors has other content" in training.refusal(verify="full")


def test_nothing_is_compared_when_it_is_off(training: Training) -> None:
    shutil.copy(training.last / "random_states_0.json", training.last / "random_states_1.json")
    (training.last / "scaler.json").write_bytes((training.last / "scaler.json").read_bytes() + b"\n")
    training.run.load(training.last, verify="off")
    (training.last / MANIFEST).write_text("")
    assert MANIFEST in training.refusal(verify="off")


def test_an_unknown_way_of_verifying_is_refused_at_once(tmp_path: Path) -> None:
    run: Any = Run()
    with pytest.raises(SettingError, match=r"verify='sizes'[\s\S]*'full', 'size', 'off'"):
        run.load(tmp_path / "absent", verify="sizes")
    accelerator: Any = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="verify='quick'"):
        accelerator.load_state(tmp_path, verify="quick")


def test_the_accelerator_passes_it_on(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.save_state(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content"):
        accelerator.load_state(tmp_path / "c")
    accelerator.load_state(tmp_path / "c", verify="size")
    assert any((value == 0).any() for value in model.parameters())


def test_it_never_starts_from_scratch_by_itself(training: Training) -> None:
    for number in (0, 1):
        os.truncate(training.last.parent / f"checkpoint_{number}" / "model.safetensors", 10)
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint.*checkpoint_1.*checkpoint_0.*model\.safetensors"
    ):
        training.run.load()


# Several ranks --------------------------------------------------------------------------------------------------------


def _load_damaged(folder: Path) -> tuple[str, str, Any]:
    runtime = start(ProcessSettings(cpu=True))
    box = Counter("old")
    run = Run(folder, runtime, automatic_checkpoint_naming=True).having(custom_objects=[box])
    run.save()
    box.value = "new"
    last = run.save()
    if runtime.process.rank == 1:
        file = last / "random_states_1.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    runtime.collectives.barrier()
    texts = []
    for options in ({}, {"verify": "never"}):
        try:
            run.load(last, **options)
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.load()
    return texts[0], texts[1], box.value


def test_all_ranks_refuse_with_one_error_and_fall_back_together(tmp_path: Path) -> None:
    first, second = run_on_ranks(_load_damaged, 2, tmp_path)
    assert first == second
    assert "CheckpointError" in first[0]
    assert "random_states_1.safetensors has other content" in first[0]
    assert "SettingError" in first[1]
    assert first[2] == "old"


def _ranks_of_another_save(folder: Path) -> list[str]:
    runtime = start(ProcessSettings(cpu=True))
    run = Run(runtime=runtime)
    old = run.save(folder / "old")
    torch.rand(1)  # or the files of both saves were the same
    new = run.save(folder / "new")
    texts = []
    for source, target in (("random_states_1", "random_states_1"), ("random_states_1", "random_states_2")):
        runtime.collectives.barrier()
        if runtime.process.rank == 0:
            for suffix in ("json", "safetensors"):
                shutil.copy(old / f"{source}.{suffix}", new / f"{target}.{suffix}")
        runtime.collectives.barrier()
        with pytest.raises(CheckpointError) as caught:
            run.load(new)
        texts.append(str(caught.value))
    return texts


def test_the_file_of_a_rank_that_is_of_another_save_is_named(tmp_path: Path) -> None:
    texts = run_on_ranks(_ranks_of_another_save, 2, tmp_path)
    assert texts[0] == texts[1]
    assert "random_states_1.safetensors has other content than was written" in texts[0][0]
    assert "random_states_2.json does not belong to this save" in texts[0][1]


def _damaged_on_one_node(folder: Path) -> Any:
    """Each rank stands for a node with a disk of its own."""
    runtime = start(ProcessSettings(cpu=True))
    rank = runtime.process.rank
    runtime = replace(runtime, process=replace(runtime.process, local_rank=0, local_world_size=1))
    box = Counter(None)
    run = Run(folder / str(rank), runtime, automatic_checkpoint_naming=True, save_on_each_node=True)
    run.having(custom_objects=[box])
    for box.value in range(3):
        last = run.save()
    # Node 0 has lost the newest, node 1 the one before it.
    os.truncate(last.parent / f"checkpoint_{2 - rank}" / f"random_states_{rank}.json", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = run.load()
    return loaded.folder.name, box.value


def test_nodes_take_the_newest_that_is_good_on_all_of_them(tmp_path: Path) -> None:
    assert run_on_ranks(_damaged_on_one_node, 2, tmp_path) == [("checkpoint_0", 0)] * 2


def test_a_manifest_that_is_a_folder_keeps_no_file_open(training: Training) -> None:
    (training.last / MANIFEST).unlink()
    (training.last / MANIFEST).mkdir()
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        with pytest.raises(CheckpointError, match=MANIFEST):
            manifest.read(training.last)
    assert len(os.listdir("/dev/fd")) <= before


@pytest.mark.parametrize("kept", ["optimizer", "scheduler", "scaler", "custom_checkpoint_0", "accumulation_rank0"])
def test_one_state_is_enough_to_tell_that_the_manifest_is_lost(training: Training, kept: str) -> None:
    for name in training.names:
        if name.endswith(".json") and name != f"{kept}.json":
            (training.last / name).unlink()
    assert "was not copied whole" in training.refusal()


# Hostile manifests ----------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **changes: Any) -> None:
    """Let the manifest say something else, with a right hash."""
    file = folder / MANIFEST
    found = msgspec.json.decode(file.read_bytes(), type=manifest.Manifest)
    file.write_bytes(manifest.to_bytes(msgspec.structs.replace(found, **changes)))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "sub/../../secret", "a\0b", "", ".", "C:\\x", "..\\x"])
def test_a_manifest_that_names_files_elsewhere(training: Training, name: str) -> None:
    (training.last.parent / "secret").write_text("mine")
    rewritten(training.last, files={name: manifest.FileEntry(4, "")})
    assert "outside its folder" in training.refusal()


@pytest.mark.parametrize("name", ["model.safetensors", "link/model.safetensors", "optimizer.json"])
@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_links_that_leave_the_folder(training: Training, tmp_path: Path, name: str, verify: str) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(training.last, outside)
    if "/" in name:
        if verify == "off":
            return  # only hooks know such names
        (training.last / "link").symlink_to(outside)
        rewritten(training.last, files={name: manifest.entry_of(outside / "model.safetensors")})
    else:
        (training.last / name).unlink()
        (training.last / name).symlink_to(outside / name)
    assert "leaves its folder" in (text := training.refusal(verify=verify)) or f"{name} leads out" in text


def test_a_manifest_that_is_a_pipe_or_a_link(training: Training, tmp_path: Path) -> None:
    file = training.last / MANIFEST
    shutil.copy(file, tmp_path / "elsewhere")
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert MANIFEST in training.refusal()
    file.unlink()
    os.mkfifo(file)
    assert "not a plain file" in training.refusal()
