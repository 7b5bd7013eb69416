"""A checkpoint of four ranks on one, two, three or eight, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate import Accelerator
from accelerate.checkpoint import durable, layout
from accelerate.utils import DataLoaderConfiguration
from tests.support.ranks import run_on_ranks


class Counter:
    def __init__(self) -> None:
        self.value = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Training:
    """Everything that a checkpoint holds: weights, optimizer, schedule, loss scale, order of samples, own objects."""

    def __init__(self, seed: int) -> None:
        # The global batch is 24 samples on any number of ranks.
        data = DataLoaderConfiguration(split_batches=True)
        self.accelerator = Accelerator(cpu=True, mixed_precision="fp16", dataloader_config=data)
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loader = DataLoader(torch.arange(240.0)[:, None], batch_size=24, shuffle=True)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def go_on(self, save_after: int = 0, folder: Path | None = None) -> list[list[float]]:
        """Train to the end of the epoch; return the samples of each batch, of all ranks, in order."""
        seen = []
        for batch in self.loader:
            self.accelerator.backward(self.model(batch / 240).square().mean())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.counter.value += 1
            seen.append(self.accelerator.gather(batch).flatten().tolist())
            if len(seen) == save_after:
                self.accelerator.save_state(folder)
        return seen


def _train(folder: Path) -> Any:
    return Training(seed=0).go_on(4, folder / "first")[4:]


def _move(folder: Path, source: str, target: str) -> None:
    training = Training(seed=1)
    training.accelerator.load_state(folder / source)
    training.accelerator.save_state(folder / target)


def _go_on(folder: Path, source: str) -> Any:
    training = Training(seed=2)
    training.accelerator.load_state(folder / source)
    return training.go_on()


def contents(folder: Path, ranks: int) -> dict[str, bytes]:
    """Return all files that say something of the run or of its first ranks, but not the manifest, which has an own id."""
    stems = {layout.rng_stem(rank) for rank in range(ranks)}
    return {
        name: (folder / name).read_bytes()
        for name in durable.files_below(folder)
        if name != layout.MANIFEST_NAME and (not name.startswith(layout.RNG_STATE_NAME) or name.split(".")[0] in stems)
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_four_ranks_to_others_and_back(ranks: int, tmp_path: Path) -> None:
    expected = run_on_ranks(_train, 4, tmp_path)[0]
    run_on_ranks(_move, ranks, tmp_path, "first", "moved")
    run_on_ranks(_move, 4, tmp_path, "moved", "back")

    first = contents(tmp_path / "first", min(ranks, 4))
    assert contents(tmp_path / "moved", min(ranks, 4)) == first
    assert contents(tmp_path / "back", min(ranks, 4)) == first
    assert len(expected) == 6
    for number, source in ((ranks, "first"), (4, "moved"), (4, "back")):
        assert run_on_ranks(_go_on, number, tmp_path, source)[0] == expected


def test_a_save_after_a_load_writes_the_same_bytes(tmp_path: Path) -> None:
    run_on_ranks(_train, 2, tmp_path)
    run_on_ranks(_move, 2, tmp_path, "first", "second")
    assert contents(tmp_path / "second", 2) == contents(tmp_path / "first", 2)
