"""Small runs and single-process stand-ins for the tests of checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

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


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "groups": lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.01 * (i + 1)} for i, q in enumerate(p)]),
    "lr tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


class Training:
    """A few steps with dropout and noise of all generators."""

    folder: Path

    def __init__(self, optimizer: str, scheduler: str, seed: int):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
        )
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            data = torch.randn(6, 4) + random.random() + float(np.random.rand())
            loss = self.model(data).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def run(self) -> Run:
        return Run().having(models=[self.model], optimizers=[self.optimizer], schedulers=[self.scheduler])


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
