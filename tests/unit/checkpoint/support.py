"""Small runs and single-process stand-ins for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from accelerate.checkpoint.background import SaveHandle
from accelerate.checkpoint.files import File
from accelerate.runtime.state import Runtime, current_or_single
from accelerate.session.load import Loaded, load_state
from accelerate.session.save import Contents, Saving, save_state
from accelerate.settings.options.project import ProjectConfiguration


class Tied(torch.nn.Module):
    """Two names for one parameter, and a buffer."""

    def __init__(self, tie: bool = True):
        super().__init__()
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.b = torch.nn.Linear(3, 3, bias=False)
        if tie:
            self.b.weight = self.a.weight
        self.register_buffer("buf", torch.arange(4.0))


class Counter:
    """A registered object with one number."""

    def __init__(self, value: Any = 0):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Run:
    """What an Accelerator would have prepared, with plain torch objects."""

    def __init__(self, folder: Path | None = None, runtime: Runtime | None = None, **project: Any):
        self.runtime = runtime or current_or_single()
        self.project = ProjectConfiguration(project_dir=str(folder) if folder else None, **project)
        self.saving = Saving(self.runtime)
        self.objects: dict[str, Any] = {
            "models": [],
            "optimizers": [],
            "schedulers": [],
            "dataloaders": [],
            "scaler": None,
            "custom_objects": [],
        }

    def having(self, **objects: Any) -> Run:
        self.objects.update(objects)
        return self

    def save(self, folder: Any = None, step: int = 0, **options: Any) -> Path:
        return self.begin_save(folder, step, **options).wait()

    def begin_save(self, folder: Any = None, step: int = 0, **options: Any) -> SaveHandle:
        options = {"get_model_state": lambda model: model.state_dict(), "pre_hooks": (), **options}
        common: dict[str, Any] = {"project": self.project, "runtime": self.runtime, "saving": self.saving}
        return save_state(Contents(**self.objects), folder=folder, step=step, **common, **options)

    def load(self, folder: Any = None, **options: Any) -> Loaded:
        contents = Contents(**self.objects)
        return load_state(contents, folder=folder, project=self.project, runtime=self.runtime, **options)


def write(folder: Path, files: Iterable[File]) -> None:
    """Write planned files."""
    for file in files:
        file.write(folder)


def same_bits(left: Any, right: Any) -> bool:
    """Tell whether two states are equal in types, order, shapes, dtypes and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        one, other = (
            tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right)
        )
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(one, other)
    if isinstance(left, dict):
        keys = list(zip(left, right, strict=False))
        same_keys = len(left) == len(right) and all(same_bits(*pair) for pair in keys)
        return same_keys and all(same_bits(left[a], right[b]) for a, b in keys)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    if hasattr(left, "tobytes"):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return repr(left) == repr(right)
