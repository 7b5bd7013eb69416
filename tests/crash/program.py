"""The run that is saved and loaded: everything a checkpoint can hold, in a few kilobytes.

Uses the public interface of `accelerate` only: what is checked here runs on any implementation of it.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration

from .processes import READY

MODES: dict[str, dict[str, Any]] = {"blocking": {}, "asynchronous": {"blocking": False}}
"""Keywords of `save_state`; a result that can be waited for is waited for."""

NUMBERED, OVER, BESIDE, NEW = "numbered", "over", "beside", "new"
PLACES = (NUMBERED, OVER, BESIDE, NEW)
"""Automatic naming with total_limit=1; a folder with an older state; one that holds files of others too; no folder."""

FOREIGN = {"theirs.txt": b"not ours\n", "notes/theirs.txt": b"not ours either\n"}

Digest = dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where a run saves."""

    root: Path
    kind: str
    total_limit: int = 1

    @property
    def destination(self) -> Path | None:
        """The folder that is passed to `save_state` and `load_state`."""
        return None if self.kind == NUMBERED else self.root / "state"


class Tally:
    """An object that a script registers for checkpoints."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.seen = state["steps"], state["seen"]


class Run:
    """A small training run."""

    def __init__(self, place: Place) -> None:
        warnings.simplefilter("ignore")
        numbered = place.kind == NUMBERED
        self.place = place
        self.accelerator = Accelerator(
            project_config=ProjectConfiguration(
                project_dir=str(place.root),
                automatic_checkpoint_naming=numbered,
                total_limit=place.total_limit if numbered else None,
            )
        )
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        loader = DataLoader(TensorDataset(torch.arange(64.0).reshape(32, 2)), batch_size=2, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared
        self.tally = Tally()
        self.accelerator.register_for_checkpointing(self.tally)
        self.accelerator.register_save_state_pre_hook(self._write_note)

    def _write_note(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Write what a hook of the user may write: a file in folders of its own, without any care."""
        if self.accelerator.process_index == 0:
            file = Path(folder, "notes", "deep", "hook.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"after step {self.tally.steps}\n")

    def seed(self, seed: int) -> None:
        """Give each generator of this rank a state of its own."""
        seed = 10 * seed + self.accelerator.process_index
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def step(self, batch: Any) -> None:
        (inputs,) = batch
        self.accelerator.backward(self.model(inputs / 64).square().mean())
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.tally.steps += 1
        # The same on all ranks: rank 0 saves it for all.
        self.tally.seen = self.accelerator.unwrap_model(self.model).weight.detach().sum(0)
        random.random()
        np.random.random()
        torch.rand(1)

    def save(self, number: int, mode: str) -> None:
        """Return when the new state is promised to be there."""
        if self.place.kind == NUMBERED:
            self.accelerator.project_configuration.iteration = number
        folder = self.place.destination
        result = self.accelerator.save_state(None if folder is None else str(folder), **MODES[mode])
        if callable(getattr(result, "wait", None)):
            result.wait()

    def load(self, folder: Path | None = None) -> None:
        """Load what the script would load after a restart, or a certain folder."""
        folder = folder or self.place.destination
        self.accelerator.load_state(None if folder is None else str(folder))

    def digest(self) -> Digest:
        """Return a hash of each part of the state of this rank."""
        parts = {
            "weights": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
            "object": self.tally.state_dict(),
        }
        return {name: hash_of(value) for name, value in parts.items()}


def hash_of(value: Any) -> str:
    """Return a hash of nested data, exact to the bit; a list and a tuple are the same."""
    hasher = hashlib.sha256()
    _feed(hasher.update, value)
    return hasher.hexdigest()[:16]


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, dict):
        update(f"dict {len(value)}".encode())
        for key in sorted(value, key=repr):
            update(repr(key).encode())
            _feed(update, value[key])
    elif isinstance(value, list | tuple):
        update(f"list {len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode())
        update(value.tobytes())
    else:
        update(repr(value).encode())


def save(tell: Callable[[Any], None], place: Place, generation: int, mode: str) -> Digest:
    """Train to a state that depends on `generation`, save it inside a pass, and return its digest."""
    run = Run(place)
    run.seed(generation)
    batches = iter(run.loader)
    for _ in range(generation + 1):
        run.step(next(batches))
    digest = run.digest()
    tell(READY)
    run.save(generation, mode)
    tell("returned")
    return digest | {"loader": hash_of(next(batches))}


def load(tell: Callable[[Any], None], place: Place) -> Digest:
    """Load as after a restart; return the digest of what came."""
    run = Run(place)
    run.seed(99)
    run.load()
    digest = run.digest()
    return digest | {"loader": hash_of(next(iter(run.loader)))}


def many(tell: Callable[[Any], None], function: Callable[..., Any], places: list[Place], *args: Any) -> None:
    """Call `function(tell, place, *args)` for each place in one process; tell each result or error."""
    for place in places:
        try:
            tell(function(print_nothing, place, *args))
        except Exception as error:
            tell(f"{type(error).__name__}: {error}"[:300])


def train(tell: Callable[[Any], None], place: Place, mode: str) -> None:
    """Tell what each checkpoint holds, continue from the newest and save after each step, without end."""
    run = Run(place)
    found = {}
    for folder in checkpoints(place):
        try:
            run.load(folder)
            found[folder.name] = run.digest()
        except Exception as error:
            found[folder.name] = f"{type(error).__name__}: {error}"[:300]
    tell({"found": found})
    if found:
        run.load()
        tell({"continued": run.digest()})
    else:
        run.seed(1)
    while True:
        for batch in run.loader:
            run.step(batch)
            number = run.tally.steps
            tell({"saving": number, "digest": run.digest()})
            run.save(number, mode)
            tell({"saved": number})


def checkpoints(place: Place) -> list[Path]:
    """Return the folders that hold, or should hold, a state; oldest first."""
    if place.destination is not None:
        return [place.destination] if place.destination.is_dir() else []
    folders = (place.root / "checkpoints").glob("checkpoint_*")
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("_")[2]))


def warm(folder: Path) -> None:
    """Do everything once, so that processes forked from this one find all modules loaded."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        with warnings.catch_warnings():
            place = Place(folder, OVER)
            save(print_nothing, place, 0, "blocking")
            load(print_nothing, place)
    finally:
        forget()
        os.environ.pop("ACCELERATE_USE_CPU")


def forget() -> None:
    """Forget the state of the process, which an `Accelerator` leaves behind."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def print_nothing(_: Any) -> None:
    """Stand for `tell` where nobody listens."""
