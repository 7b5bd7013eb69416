"""Fixtures of the crash tests."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from . import program
from .suite import fast_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: calls count here, not the disk."""
    with tempfile.TemporaryDirectory(dir=fast_folder()) as temporary:
        yield Path(temporary).resolve()


@pytest.fixture(scope="session")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything that a save needs is loaded once, and shared by the processes that are forked."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    program.warm(tmp_path_factory.mktemp("warm"))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
