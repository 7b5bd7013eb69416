"""Fixtures of all tests: nothing may leak from one test into the next."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

_NOT_OURS = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",  # torch sets it when its compiler is first loaded
}


# Torch's store looks up the name of each address that connects, in the domain name system, and has no answer until a
# lost packet has timed out: five seconds, twice.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# Relative folders mean others to the processes that tests start elsewhere, which would then test another installation.
if paths := os.environ.get("PYTHONPATH"):
    os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths.split(os.pathsep) if path)

# `nohup make test` and `make test &` set these off, for all processes that tests start too; tests are about those who
# hear them.
for _name in ("SIGINT", "SIGHUP", "SIGQUIT"):
    if (_number := getattr(signal, _name, None)) is not None and signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)

# Where it is set, each piece that a process prints is written alone, and pieces of two processes' lines mix.
os.environ.pop("PYTHONUNBUFFERED", None)

# The same examples in every run: a test that fails does so again. New ones: HYPOTHESIS_PROFILE=explore make test.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 4 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Keep the files of tests in memory where there is enough of it: waiting for a disk is half of the time otherwise."""
    if config.option.basetemp is None and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ENOUGH_BYTES:
        config.option.basetemp = tempfile.mkdtemp(prefix="accelerate-tests-", dir=_MEMORY)
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {devices}"))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves environment variables behind; forget process-wide state after each test."""
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    from accelerate.runtime import state
    from accelerate.runtime.accumulation import GradientState
    from accelerate.session.state import AcceleratorState

    AcceleratorState._reset_state()
    state.reset()
    GradientState._reset_state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if torch.are_deterministic_algorithms_enabled():  # asked first: switching loads torch's compiler
        torch.use_deterministic_algorithms(False)
    left = {k: v for k, v in os.environ.items() if environment.get(k) != v and k not in _NOT_OURS}
    os.environ.clear()
    os.environ.update(environment)
    assert not left, f"the test left variables in the environment: {left}"
