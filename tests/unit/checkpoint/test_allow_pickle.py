"""A state that JSON and tensors cannot express is a pickle where that is asked for, and is never read unasked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpoint import describe, layout, manifest
from accelerate.core.errors import CheckpointError

from .support import Counter, Run
from .test_state import Loader


class Point:
    """What no checkpoint knows."""

    def __init__(self, x: float) -> None:
        self.x = x


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.place,))


class Odd(torch.optim.SGD):
    """Keeps an object of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "point": Point(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.point = state.pop("point")
        super().load_state_dict(state)


PICKLES = ["custom_checkpoint_0", "dl_state_dict_rank0", "optimizer", "sampler", "scaler", "scheduler"]


def odd_run(stems: Sequence[str] = tuple(PICKLES)) -> Run:
    """A run in which these states hold an object."""

    def state(stem: str) -> Any:
        return Point(PICKLES.index(stem)) if stem in stems else 0

    model = torch.nn.Linear(2, 2)
    optimizer = (Odd if "optimizer" in stems else torch.optim.SGD)(model.parameters(), lr=0.1)
    loader: Any = Loader(stateful=True)
    loader.place, loader.reading = {"kept": state("sampler")}, state("dl_state_dict_rank0")
    return Run().having(
        models=[model],
        optimizers=[optimizer],
        schedulers=[Counter(state("scheduler"))],
        scaler=Counter(state("scaler")),
        dataloaders=[loader],
        custom_objects=[Counter(state("custom_checkpoint_0")), Counter({"plain": torch.ones(2)})],
    )


def test_without_the_argument_the_error_of_a_save_names_it(tmp_path: Path) -> None:
    run = Run().having(custom_objects=[Counter({"point": Point(1.0)})])
    with pytest.raises(
        CheckpointError, match=r"custom_checkpoint_0 -> 'value' -> 'point' is a Point[^*]*allow_pickle=True"
    ):
        run.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocking", [True, False])
def test_only_what_cannot_be_expressed_is_pickled(tmp_path: Path, blocking: bool) -> None:
    run = odd_run()
    run.begin_save(tmp_path / "c", allow_pickle=True, blocking=blocking).wait()
    run.objects["custom_objects"][0].value.x = 100.0

    names = [path.name for path in (tmp_path / "c").iterdir()]
    assert sorted(name for name in names if name.endswith(".pkl")) == [f"{stem}.pkl" for stem in PICKLES]
    assert {"custom_checkpoint_1.json", "custom_checkpoint_1.safetensors", "model.safetensors"} < set(names)

    other = odd_run(stems=["optimizer"])
    other.load(tmp_path / "c", allow_pickle=True)
    objects = other.objects
    loader = objects["dataloaders"][0]
    found = [objects["custom_objects"][0].value, loader.reading, objects["optimizers"][0].point, loader.place["kept"]]
    found += [objects["scaler"].value, objects["schedulers"][0].value]
    assert [point.x for point in found] == list(range(6))
    assert torch.equal(objects["custom_objects"][1].value["plain"], torch.ones(2))


@pytest.mark.parametrize("stem", PICKLES)
@pytest.mark.parametrize("options", [{}, {"verify": "off"}, {"strict": False}, {"verify": "off", "strict": False}])
def test_no_pickle_is_read_unasked_and_nothing_is_loaded_then(
    tmp_path: Path, stem: str, options: dict[str, Any]
) -> None:
    folder = odd_run([stem]).save(tmp_path / "c", allow_pickle=True)
    torch.save(Canary(tmp_path / "canary"), folder / f"{stem}.pkl")
    rewrite_manifest(folder)

    run = odd_run([stem])
    before = [parameter.clone() for parameter in run.objects["models"][0].parameters()]
    text = rf"{stem}\.pkl[^*]*Only if you trust[^*]*allow_pickle=True to load_state"
    with pytest.raises(CheckpointError, match=text):
        run.load(folder, **options)

    after = list(run.objects["models"][0].parameters())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not (tmp_path / "canary").exists()


def rewrite_manifest(folder: Path) -> None:
    """Describe what lies there now, as whoever made the folder can."""
    found = manifest.read(folder)
    assert found is not None
    (folder / layout.MANIFEST_NAME).unlink()
    manifest.write(folder, {}, save_id=found.save_id, world_size=1, step=0, iteration=0)


def test_a_pickle_under_the_name_of_accelerate_1_is_data_or_refused(tmp_path: Path) -> None:
    torch.save(Canary(tmp_path / "canary"), tmp_path / "custom_checkpoint_0.pkl")
    run = Run().having(custom_objects=[Counter(0)])
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl is refused"):
        run.load(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_hashes_are_compared_before_a_pickle_is_read(tmp_path: Path) -> None:
    folder = Run().having(custom_objects=[Counter(Point(1.0))]).save(tmp_path / "c", allow_pickle=True)
    torch.save(Canary(tmp_path / "canary"), folder / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl has"):
        Run().having(custom_objects=[Counter(0)]).load(folder, allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_an_evaluation_that_takes_only_weights_needs_no_argument(tmp_path: Path) -> None:
    run = odd_run().having(custom_objects=[])
    folder = run.save(tmp_path / "c", allow_pickle=True)
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="holds more than is loaded"):
        Run().having(models=[model]).load(folder)
    assert torch.equal(model.weight, run.objects["models"][0].weight)


def test_what_cannot_be_pickled_either_is_an_error_at_once(tmp_path: Path) -> None:
    run = Run().having(custom_objects=[Counter(lambda: 0)])
    with pytest.raises(CheckpointError, match="custom_checkpoint_0 cannot be pickled either"):
        run.begin_save(tmp_path / "c", allow_pickle=True, blocking=False)
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Run().having(custom_objects=[Counter(Point(1.0))]).save(tmp_path / "c", allow_pickle=True)
    monkeypatch.delattr(f"{__name__}.Point")
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl cannot be read: AttributeError"):
        Run().having(custom_objects=[Counter(0)]).load(folder, allow_pickle=True)


def test_a_pickle_goes_with_the_state_it_belongs_to_and_is_shown(tmp_path: Path) -> None:
    counter = Counter(Point(1.0))
    run = Run().having(custom_objects=[counter])
    run.save(tmp_path / "c", allow_pickle=True)
    shown = {file.name: file for file in describe.describe(tmp_path / "c").files}
    assert (shown["custom_checkpoint_0.pkl"].kind, shown["custom_checkpoint_0.pkl"].problem) == (
        "registered object 0",
        "",
    )

    counter.value = 1
    run.save(tmp_path / "c", allow_pickle=True)
    assert sorted(path.name for path in (tmp_path / "c").glob("custom*")) == ["custom_checkpoint_0.json"]


def test_an_accelerator_passes_it_on(tmp_path: Path) -> None:
    accelerator, counter = Accelerator(cpu=True), Counter(Point(1.0))
    accelerator.register_for_checkpointing(counter)
    accelerator.save_state(tmp_path / "c", allow_pickle=True)
    counter.value = None
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        accelerator.load_state(tmp_path / "c")
    accelerator.load_state(tmp_path / "c", allow_pickle=True)
    assert counter.value is not None
    assert counter.value.x == 1.0
