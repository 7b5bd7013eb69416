"""A script whose processes meet, and what they tell about it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCRIPT = """
import json, os, pathlib, socket, sys
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
met = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
told = {"met": met, "local": accelerator.local_process_index, "host": host}
pathlib.Path(os.environ["OUT"], "-".join([*sys.argv[1:], str(accelerator.process_index)])).write_text(json.dumps(told))
accelerator.end_training()
"""
_PLACES = ("ACCELERATE_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "PET_")


def four(first: str, second: str) -> dict[str, dict[str, Any]]:
    """Return what four processes tell that have met, two on each of two hosts."""
    return {
        str(rank): {"met": [0, 1, 2, 3], "local": rank % 2, "host": first if rank < 2 else second} for rank in range(4)
    }


def prepare(folder: Path) -> dict[str, str]:
    """Write the script, as `meet.py`; return an environment to run it in, without a place or a configuration file."""
    (folder / "out").mkdir()
    (folder / "meet.py").write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PLACES)}
    return {
        **kept,
        "OUT": str(folder / "out"),
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the processes told, by rank."""
    return {file.name: json.loads(file.read_text()) for file in (folder / "out").iterdir()}
