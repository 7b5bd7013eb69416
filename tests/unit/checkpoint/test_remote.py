"""Checkpoints at addresses: complete when their manifest is there, and the older one until then."""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpoint import layout, manifest, remote
from accelerate.checkpoint.manifest import FileEntry, Manifest
from accelerate.core import available
from accelerate.core.addresses import shown
from accelerate.core.errors import CheckpointError, MissingPackage, SettingError
from accelerate.core.leaving import describe
from accelerate.session import remote as session
from accelerate.session.save import Contents
from accelerate.utils import ProjectConfiguration

from ...support.ranks import run_on_ranks
from .support import Counter, Run, Tied

MEMORY = fsspec.filesystem("memory")


class RemoteRun(Run):
    """The same, through the functions that choose by destination."""

    def save(self, folder: Any = None, step: int = 0, **options: Any) -> Any:
        options = {"get_model_state": lambda model: model.state_dict(), "pre_hooks": (), **options}
        act = session.saver(folder, self.project)
        common: dict[str, Any] = {"project": self.project, "runtime": self.runtime, "saving": self.saving}
        return act(Contents(**self.objects), folder=folder, step=step, **common, **options).wait()

    def load(self, folder: Any = None, **options: Any) -> Any:
        act = session.loader(folder, self.project)
        return act(Contents(**self.objects), folder=folder, project=self.project, runtime=self.runtime, **options)


def counting(value: int, address: str | None = None, **project: Any) -> RemoteRun:
    run = RemoteRun(**project).having(custom_objects=[Counter(value)])
    run.project.project_dir = address
    return run


def value_at(address: str) -> int:
    run = counting(-1)
    run.load(address)
    return run.objects["custom_objects"][0].value


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    yield
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]
    assert [name for name in os.listdir(tmp_path / "tmp") if name.startswith("accelerate-")] == []


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://bucket/run" if request.param == "memory" else f"file://{tmp_path}/bucket/run"


def listing(address: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(address)
    return sorted(str(found)[len(path) :].lstrip("/") for found in system.find(path))


def test_a_run_comes_back_from_an_address(place: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.a(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = RemoteRun().having(models=[model], optimizers=[optimizer], custom_objects=[Counter(5)])
    assert saved.save(f"{place}/c", step=3) == f"{place}/c"
    other = Tied()
    run = RemoteRun().having(
        models=[other], optimizers=[torch.optim.AdamW(other.parameters())], custom_objects=[Counter()]
    )
    assert run.load(f"{place}/c").step == 3
    assert torch.equal(other.a.weight, model.a.weight)
    assert run.objects["optimizers"][0].state_dict()["state"][0]["step"] == 1
    assert run.objects["custom_objects"][0].value == 5


def test_a_second_save_replaces_the_first_and_leaves_nothing_of_it(place: str) -> None:
    counting(1).save(f"{place}/c")
    first = listing(f"{place}/c")
    counting(2).save(f"{place}/c")
    second = listing(f"{place}/c")
    assert value_at(f"{place}/c") == 2
    assert len(first) == len(second)
    assert len({name.partition("/")[0] for name in second}) == 2
    assert not set(first) & set(second) - {layout.MANIFEST_NAME}


def test_automatic_naming_counts_limits_and_finds_the_newest(place: str) -> None:
    run = counting(0, place, automatic_checkpoint_naming=True, total_limit=2)
    for value in range(12):
        run.objects["custom_objects"][0].value = value
        assert run.save() == f"{place}/checkpoints/checkpoint_{value}"
    assert {name.partition("/")[0] for name in listing(f"{place}/checkpoints")} == {"checkpoint_10", "checkpoint_11"}
    other = counting(-1, place, automatic_checkpoint_naming=True)
    loaded = other.load()
    assert other.objects["custom_objects"][0].value == 11
    assert other.project.iteration == loaded.iteration == 12
    early = counting(-1, place, automatic_checkpoint_naming=True, iteration=11)
    with pytest.raises(SettingError, match="There is a checkpoint at .*checkpoint_11 already"):
        early.save()
    assert value_at(f"{place}/checkpoints/checkpoint_11") == 11


def test_an_incomplete_newer_one_is_passed_over_loudly(place: str) -> None:
    run = counting(0, place, automatic_checkpoint_naming=True)
    for value in range(4):
        run.objects["custom_objects"][0].value = value
        run.save()
    system, path = fsspec.core.url_to_fs(f"{place}/checkpoints")
    system.rm_file(f"{path}/checkpoint_3/{layout.MANIFEST_NAME}")
    damaged = next(
        name for name in listing(f"{place}/checkpoints/checkpoint_2") if name.endswith("custom_checkpoint_0.json")
    )
    content = system.cat_file(f"{path}/checkpoint_2/{damaged}")
    system.pipe_file(f"{path}/checkpoint_2/{damaged}", content[:-1] + b" ")
    other = counting(-1, place, automatic_checkpoint_naming=True)
    with pytest.warns(
        UserWarning, match=r"Loading checkpoint_1; newer .*checkpoint_3: .*no accelerate_manifest.*checkpoint_2"
    ):
        other.load()
    assert other.objects["custom_objects"][0].value == 1
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.json has other content"):
        value_at(f"{place}/checkpoints/checkpoint_2")


def test_nothing_there_is_told(place: str) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        counting(0, place, automatic_checkpoint_naming=True).load()
    with pytest.raises(CheckpointError, match="has no accelerate_manifest"):
        value_at(f"{place}/none")


def test_an_upload_that_fails_leaves_the_older_one(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(1).save(f"{place}/c")
    kind = type(fsspec.core.url_to_fs(place)[0])
    for name in ("put_file", "pipe_file"):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
            with pytest.raises(CheckpointError, match="no route"):
                counting(2).save(f"{place}/c")
        assert value_at(f"{place}/c") == 1


def test_an_old_checkpoint_that_cannot_be_removed_whole_is_no_checkpoint_any_more(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = counting(0, place, automatic_checkpoint_naming=True, total_limit=1)
    run.save()
    system, path = fsspec.core.url_to_fs(f"{place}/checkpoints")
    remove = type(system).rm

    def refuse(self: Any, target: str, *args: Any, **kwargs: Any) -> None:
        if str(target).endswith("checkpoint_0"):
            raise OSError("busy")
        remove(self, target, *args, **kwargs)

    monkeypatch.setattr(type(system), "rm", refuse)
    with pytest.warns(UserWarning, match="An old checkpoint at .* could not be removed: .*busy"):
        run.save()
    assert listing(f"{place}/checkpoints/checkpoint_0")
    assert not remote.has_manifest(f"{place}/checkpoints/checkpoint_0")
    assert remote.has_manifest(f"{place}/checkpoints/checkpoint_1")


def test_files_of_older_saves_that_cannot_be_removed_are_no_failed_save(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(1).save(f"{place}/c")
    with monkeypatch.context() as patch:
        patch.setattr(
            type(fsspec.core.url_to_fs(place)[0]), "rm", lambda *_, **__: (_ for _ in ()).throw(PermissionError("403"))
        )
        with pytest.warns(
            UserWarning, match=r"was written, and files of older saves there could not be removed: .*403"
        ):
            assert counting(2).save(f"{place}/c") == f"{place}/c"
    assert value_at(f"{place}/c") == 2
    assert len({name.partition("/")[0] for name in listing(f"{place}/c")}) == 3
    counting(3).save(f"{place}/c")
    assert len({name.partition("/")[0] for name in listing(f"{place}/c")}) == 2


@pytest.mark.parametrize("call", ["get_file", "info"])
def test_a_newer_one_that_cannot_be_reached_is_not_passed_over(
    place: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = counting(0, place, automatic_checkpoint_naming=True)
    run.save()
    run.save()
    kind = type(fsspec.core.url_to_fs(place)[0])
    act = getattr(kind, call)

    def refuse(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint_1" in path:
            raise TimeoutError("read timed out")
        return act(self, path, *args, **kwargs)

    other = counting(-1, place, automatic_checkpoint_naming=True)
    with monkeypatch.context() as patch:
        patch.setattr(kind, call, refuse)
        with pytest.raises(remote.Unreachable, match=r"checkpoint_1 cannot be reached: TimeoutError: read timed out"):
            other.load()
    assert other.objects["custom_objects"][0].value == -1
    other.load()
    assert other.project.iteration == 2


def test_nothing_is_copied_that_is_larger_than_the_manifest_says(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(1).save(f"{place}/c")
    system, path = fsspec.core.url_to_fs(f"{place}/c")
    name = next(name for name in listing(f"{place}/c") if name.endswith("custom_checkpoint_0.json"))
    system.pipe_file(f"{path}/{name}", b" " * 10_000)
    copied = []
    copy = type(system).get_file
    monkeypatch.setattr(type(system), "get_file", lambda *args, **_: (copied.append(args[1]), copy(*args))[1])
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0.json at .*/c has 10000 bytes in place of "):
        value_at(f"{place}/c")
    assert [name.rpartition("/")[2] for name in copied] == [layout.MANIFEST_NAME]
    copied.clear()
    monkeypatch.setattr(remote, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"/c has a accelerate_manifest.json of [0-9]+ bytes"):
        value_at(f"{place}/c")
    assert not copied


@pytest.mark.parametrize(
    "address",
    [
        "nosuch://user:s3cr3t@host/c",
        "ftp://user:s3cr3t@127.0.0.1:1/c",
        "nosuch://host/c?signature=s3cr3t",
        "memory://user:s3cr3t@bucket/c",
    ],
)
def test_passwords_in_addresses_are_not_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(MEMORY), "put_file", lambda _self, _file, path: (_ for _ in ()).throw(OSError(f"cannot write {path}"))
    )
    for act in (counting(1).save, value_at):
        with pytest.raises(CheckpointError, match=r"\*\*\*") as raised:
            act(address)
        assert "s3cr3t" not in "".join(traceback.format_exception(raised.value))
    project = {"automatic_checkpoint_naming": True, "iteration": 0}
    with pytest.raises(CheckpointError) as raised:
        counting(1, address, **project).save()
    assert "s3cr3t" not in str(raised.value)
    assert "s3cr3t" not in describe("rank 0 received SIGTERM", address)


def test_an_address_without_secrets_is_shown_as_it_is() -> None:
    for address in ("s3://bucket/a@b/c", "hf://datasets/org/name@main/x", "/folder/with?question@mark"):
        assert shown(address) == address
    assert shown("s3://key:secret@bucket/a@b") == "s3://***@bucket/a@b"


def change_manifest(change: Callable[[Manifest], Manifest]) -> None:
    """Write another manifest to memory://c, with a hash that fits."""
    file = f"/c/{layout.MANIFEST_NAME}"
    found = msgspec.json.decode(MEMORY.cat_file(file), type=Manifest)
    MEMORY.pipe_file(file, manifest.to_bytes(change(found)))


@pytest.mark.parametrize("bad", ["../outside", "/etc/x", "a/../../x"])
def test_a_manifest_that_names_files_elsewhere_is_refused(bad: str) -> None:
    counting(1).save("memory://c")
    change_manifest(
        lambda found: msgspec.structs.replace(found, files={**found.files, bad: FileEntry(num_bytes=1, xxh3="0" * 16)})
    )
    with pytest.raises(CheckpointError, match="outside its folder"):
        value_at("memory://c")


def test_a_save_id_that_leads_elsewhere_is_refused() -> None:
    counting(1).save("memory://c")
    change_manifest(lambda found: msgspec.structs.replace(found, save_id=f"../{found.save_id}"))
    with pytest.raises(CheckpointError, match="has the save id"):
        value_at("memory://c")


def test_weights_lie_at_an_address_as_other_tools_expect_them(place: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 4)
    accelerator.save_model(model, f"{place}/w", max_shard_size=40)
    assert [name for name in listing(f"{place}/w") if "index" in name]
    accelerator.save_model(model, f"{place}/w")
    assert listing(f"{place}/w") == ["model.safetensors"]


def test_the_accelerator_takes_addresses(place: str) -> None:
    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(project_dir=place, automatic_checkpoint_naming=True)
    )
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    before = model.weight.detach().clone()
    assert accelerator.save_state() == f"{place}/checkpoints/checkpoint_0"
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state()
    assert torch.equal(model.weight, before)
    accelerator.load_state(f"{place}/checkpoints/checkpoint_0")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "is_installed", lambda *_: False)
    with pytest.raises(MissingPackage, match=r"pip install 'accelerate\[remote\]'"):
        counting(1).save("memory://c")


@pytest.mark.parametrize(("address", "error"), [("s3://bucket/c", MissingPackage), ("nosuch://x/c", CheckpointError)])
def test_an_address_of_an_unknown_kind_is_told(address: str, error: type[Exception]) -> None:
    pytest.importorskip("fsspec")
    if error is MissingPackage and available.is_installed("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(error, match=address):
        counting(1).save(address)


# Several ranks ----------------------------------------------------------------------------------------------------------


def save_on_ranks(address: str, broken: bool) -> str:
    accelerator = Accelerator(cpu=True)
    counter = Counter(accelerator.num_processes)
    accelerator.register_for_checkpointing(counter)
    if broken and accelerator.is_main_process:
        from fsspec.implementations.local import LocalFileSystem

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("quota")

        LocalFileSystem.put_file = refuse  # type: ignore[method-assign]
    try:
        accelerator.save_state(address)
        counter.value = -1
        accelerator.load_state(address)
    except CheckpointError as error:
        return str(error).splitlines()[0]
    return f"{counter.value}"


def test_two_ranks_save_and_load_together_and_hear_of_failures(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/c"
    assert run_on_ranks(save_on_ranks, 2, address, False) == ["2", "2"]
    assert len([name for name in listing(address) if "random_states_" in name and name.endswith(".json")]) == 2
    told = run_on_ranks(save_on_ranks, 2, address, True)
    assert all("quota" in message for message in told), told
    assert run_on_ranks(save_on_ranks, 2, address, False) == ["2", "2"]


# Kills ------------------------------------------------------------------------------------------------------------------


def test_a_save_that_is_killed_before_any_of_its_steps_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    address = f"file://{tmp_path}/c"
    counting(0).save(address)
    number, value, seen = 0, 0, []
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            left = number

            def dying(act: Any) -> Any:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        if act.__name__ == "pipe_file":  # in the middle
                            act(args[0], args[1], args[2][: len(args[2]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return act(*args, **kwargs)

                return wrapped

            for name in ("put_file", "pipe_file", "mv", "rm", "rm_file", "makedirs", "ls", "exists"):
                setattr(LocalFileSystem, name, dying(getattr(LocalFileSystem, name)))
            counting(number).save(address)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for path in (tmp_path / "tmp").iterdir():
            shutil.rmtree(path)  # a killed process cannot remove its local copy
        found = value_at(address)
        assert found in (value, number)
        seen.append(found == number)
        value = found
        if not os.WIFSIGNALED(status):
            break
    assert number > 8
    assert seen.count(True) > 1
    assert len({name.partition("/")[0] for name in listing(address)}) == 2


def test_a_save_goes_behind_damaged_checkpoints_that_were_passed_over(place: str) -> None:
    run = counting(1, place, automatic_checkpoint_naming=True)
    run.save()
    run.save()
    system, newest = fsspec.core.url_to_fs(f"{place}/checkpoints/checkpoint_1")
    system.rm(next(file for file in system.find(newest) if "custom" in file))
    again = counting(0, place, automatic_checkpoint_naming=True)
    with pytest.warns(UserWarning, match="newer ones are not complete"):
        again.load()
    assert str(again.save()).endswith("checkpoint_2")
