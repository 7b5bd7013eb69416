"""A training script that can be told to send itself, or its launcher, a signal at an exact place.

It prints, on the main process, the running hash of the samples it has trained on, and a hash of the weights.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

SAMPLES, BATCH, EPOCHS = 72, 12, 3  # batches that 1, 2, 3 and 4 processes can share


class Consumed:
    """A running hash of the samples that were trained on."""

    def __init__(self) -> None:
        self.count, self.digest = 0, ""

    def add(self, ids: torch.Tensor) -> None:
        for number in ids.tolist():
            self.digest = sha256(f"{self.digest} {number}".encode()).hexdigest()
        self.count += len(ids)

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count, "digest": self.digest}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.count, self.digest = state["count"], state["digest"]


class Sender:
    """Sends a signal when the run has come to one place of one rank, or all."""

    def __init__(self, place: str | None, number: int, to: str, rank: int) -> None:
        self.place, self.number, self.to, self.rank = place, number, to, rank

    def at(self, place: str) -> None:
        if place != self.place:
            return
        if self.to == "launcher":
            if self.rank == 0:
                os.kill(os.getppid(), self.number)
        elif self.to in ("all", str(self.rank)):
            os.kill(os.getpid(), self.number)


def train(
    folder: Path,
    place: str | None = None,
    name: str = "SIGTERM",
    to: str = "0",
    signals: tuple[str, ...] | None = ("SIGTERM", "SIGUSR1"),
    resume: str | None = None,
    parts: int = 1,
    save_each: bool = False,
    epochs: int = EPOCHS,
    fixed_buckets: bool = False,
    workers: int = 0,
) -> tuple[int, str, str]:
    """Train; return how many samples were trained on, their hash, and that of the weights."""
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=signals)
    accelerator = Accelerator(
        cpu=True,
        project_config=project,
        dataloader_config=DataLoaderConfiguration(global_batch_size=BATCH),
        # Otherwise DDP arranges its buckets anew after the first backward of a process. The sums of three and more ranks
        # are rounded by their place in a bucket, and the first step after a restart would differ in the last bit.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if fixed_buckets else [],
    )
    sender = Sender(place, getattr(signal, name), to, accelerator.process_index)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, 4), torch.arange(SAMPLES))
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    # Smaller batches are added up to the global one: a window of accumulation.
    loader, evaluation = DataLoader(data, BATCH // parts, shuffle=True, num_workers=workers), DataLoader(data, BATCH)
    model, optimizer, scheduler, loader, evaluation = accelerator.prepare(
        model, optimizer, scheduler, loader, evaluation
    )
    consumed = Consumed()
    accelerator.register_for_checkpointing(consumed)
    accelerator.register_save_state_pre_hook(lambda *_: sender.at("saving"))
    sender.at("before")
    accelerator.resume(resume)
    for epoch in range(loader.position.epoch, epochs):
        for step, (inputs, ids) in enumerate(loader, start=loader.position.step):
            with accelerator.accumulate(model):
                sender.at(f"step {epoch} {step}")
                accelerator.backward(model(inputs).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            consumed.add(accelerator.gather_for_metrics(ids))
            if save_each:
                accelerator.save_state()
        # What a resumed run would leave out if it were stopped from here on.
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (epoch + 1)
        for step, (inputs, _) in enumerate(evaluation):
            sender.at(f"evaluation {epoch} {step}")
            with torch.no_grad():
                accelerator.gather_for_metrics(model(inputs))
    accelerator.end_training()
    weights = sha256(b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())).hexdigest()
    return consumed.count, consumed.digest, weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--place")
    parser.add_argument("--name", default="SIGTERM")
    parser.add_argument("--to", default="0")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    ended = train(options.folder, options.place, options.name, options.to, workers=options.workers)
    if int(os.environ.get("RANK", "0")) == 0:
        print("ended with", *ended)
    sys.exit(0)
