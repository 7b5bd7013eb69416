"""A training script in which one rank dies, in a chosen way at a chosen place. Started by `rank_death.py`.

    accelerate launch --cpu --num_processes 2 tests/fault/dying.py FOLDER --how forward --rank 1 --dressed

Just before, it writes the time into FOLDER/died. With `--dressed` every rank has two DataLoader workers that ignore
SIGTERM in the middle of a sample, a child of its own, and a save in the background.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

HOWS = ("kill", "segfault", "abort", "os_exit", "forward", "backward", "save", "exit")
DIES_AT_STEP = 2


class Samples(Dataset):
    def __init__(self, stubborn: bool) -> None:
        self.stubborn = stubborn

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.stubborn and index >= 56:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        return torch.full((8,), float(index))


class Model(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.register_buffer("weight_to_write", torch.zeros(size))
        self.dies = ""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.dies == "forward":
            fail("forward")
        result = self.layer(inputs)
        if self.dies == "backward":
            result.register_hook(lambda _: fail("backward"))
        return result


def note_the_time() -> None:
    (Path(options.folder) / "died").write_text(str(time.time()))


def fail(where: str) -> None:
    note_the_time()
    raise RuntimeError(f"died in {where}")


def die(how: str) -> None:
    note_the_time()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "abort":
        os.abort()
    if how == "os_exit":
        os._exit(3)


def main() -> None:
    project = ProjectConfiguration(options.folder, automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    culprit = accelerator.process_index == options.rank
    model = Model(4_000_000 if options.dressed else 1)
    loader = DataLoader(Samples(options.dressed), batch_size=4, num_workers=2 if options.dressed else 0, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_save_state_pre_hook(lambda *_: fail("save") if model.dies == "save" else None)
    if options.dressed:
        subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    for step, batch in enumerate(loader):
        if step == DIES_AT_STEP:
            if options.dressed:
                accelerator.save_state(blocking=False)
            if culprit:
                model.dies = options.how
                die(options.how)
        if step == DIES_AT_STEP and options.how == "save":
            accelerator.save_state()
        accelerator.backward(prepared(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
        if step == DIES_AT_STEP and options.how == "exit":
            break
    accelerator.end_training()
    if culprit:
        fail("exit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--how", choices=HOWS, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--dressed", action="store_true")
    options = parser.parse_args()
    main()
