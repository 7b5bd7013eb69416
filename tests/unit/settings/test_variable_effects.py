"""What each variable of the environment changes: none of those that we say we obey is only on a list."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import accelerate
from accelerate import Accelerator, PartialState
from accelerate.core.errors import UnsupportedCombination
from accelerate.hardware.families import FAMILIES
from accelerate.launch import functions
from accelerate.launch.devices import Devices, visible_count
from accelerate.launch.machine import Machine, survey
from accelerate.launch.plan import plan
from accelerate.launch.request import FIELD_OF, LaunchRequest
from accelerate.logging import get_logger
from accelerate.parallel import ddp
from accelerate.settings import config_file, env, preemption, variables
from accelerate.state import AcceleratorState
from accelerate.topology import detect
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin

NAMES = json.loads((Path(__file__).parents[2] / "data" / "command_line.json").read_text(encoding="utf-8"))["variables"]

Look = Callable[[Mapping[str, str]], Any]


def launched(environ: Mapping[str, str]) -> Any:
    """Return what a launcher would do."""
    request = LaunchRequest.merge({}, None, environ, script="s.py")
    return asdict(plan(request, Machine("python", Devices(0), cores=4)))


def started(environ: Mapping[str, str]) -> Any:
    """Return what a script finds that was started without a launcher."""
    AcceleratorState._reset_state(True)
    with env.applied({name: environ.get(name) for name in variables.OBEYED}), env.applied(dict(environ)):
        found, here = Accelerator(), PartialState()
        compiled = asdict(TorchDynamoPlugin())
    facts = (here.debug, here.fork_launched, found.mixed_precision, found.gradient_accumulation_steps)
    return str(here.device), facts, compiled


def applied(look: Callable[[], Any]) -> Look:
    """Return what looks at the environment itself."""

    def in_environment(environ: Mapping[str, str]) -> Any:
        with env.applied(dict(environ)):
            return look()

    return in_environment


def level() -> int:
    before = logging.root.level
    try:
        return get_logger("accelerate.tests.variables").logger.level
    finally:
        logging.root.setLevel(before)
        logging.getLogger("accelerate.tests.variables").setLevel(logging.NOTSET)


def spread_model() -> None:
    model = torch.nn.Linear(1, 1)
    model.hf_device_map = {"a": 0, "b": 1}
    ddp._refuse_spread(model)


def survey_of_two(environ: Mapping[str, str]) -> Any:
    return survey(LaunchRequest(script="s.py", cpu=True, num_processes=2), environ)


LAUNCH = {
    "ACCELERATE_CPU_AFFINITY": "1", "ACCELERATE_DEBUG_MODE": "1", "ACCELERATE_DYNAMO_BACKEND": "eager",
    "ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_DYNAMIC": "1",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "1", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "1",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3", "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_NUM_PROCESSES": "2", "ACCELERATE_RESUME": "auto", "ACCELERATE_SAVE_ON_SIGNALS": "SIGTERM",
    "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "3",
}  # fmt: skip
"""Settings of a launch, with a value that changes something."""
OF_THE_LAUNCHER = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_NUM_PROCESSES", "ACCELERATE_RESUME", "ACCELERATE_SAVE_ON_SIGNALS",
                   "ACCELERATE_USE_CPU", "OMP_NUM_THREADS")  # fmt: skip
"""Those of which a script without a launcher shows nothing here."""


def ranks(prefix: str, names: tuple[str, str, str, str]) -> dict[str, str]:
    """Return the environment of rank 0 of 4, with 2 on each machine."""
    return {f"{prefix}{name}": value for name, value in zip(names, ("0", "4", "0", "2"), strict=True)}


USUAL = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
PLACES = (
    ranks("", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) | {"MASTER_ADDR": "a", "MASTER_PORT": "7"},
    ranks("OMPI_COMM_WORLD_", USUAL) | {"MASTER_ADDR": "a"},
    ranks("MV2_COMM_WORLD_", USUAL) | {"MASTER_ADDR": "a"},
    ranks("", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")) | {"MASTER_ADDR": "a"},
    {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "NODE_RANK": "0"},
)
"""Environments of one process of several, each variable of which says who it is."""
OTHERWISE = {"0": "1", "1": "2", "4": "8", "2": "4", "a": "b", "7": "8"}

EFFECTS: list[tuple[str, Mapping[str, str], str, Look]] = [
    *((name, {}, value, launched) for name, value in LAUNCH.items()),
    *((name, {}, value, started) for name, value in LAUNCH.items() if name not in OF_THE_LAUNCHER),
    *((name, place, OTHERWISE[value], detect) for place in PLACES for name, value in place.items()),
    ("ACCELERATE_RESUME", {}, "auto", preemption.resume_from),
    ("ACCELERATE_SAVE_ON_SIGNALS", {}, "TERM", lambda environ: preemption.signals_from(SAVED, environ)),
    ("ACCELERATE_USE_CPU", {"ACCELERATE_TORCH_DEVICE": "cpu:0"}, "1", started),
    ("ACCELERATE_TORCH_DEVICE", {}, "cpu:0", started),
    ("ACCELERATE_LOG_LEVEL", {}, "ERROR", applied(level)),
    ("ACCELERATE_BYPASS_DEVICE_MAP", {}, "true", applied(spread_model)),
    ("FORK_LAUNCHED", {}, "1", started),
    ("HF_HOME", {}, "/a", applied(config_file.default_file)),
    ("XDG_CACHE_HOME", {}, "/a", applied(config_file.default_file)),
    ("GLOO_SOCKET_IFNAME", {}, "eth0", survey_of_two),
    ("CUDA_VISIBLE_DEVICES", {}, "0,1", lambda environ: visible_count(4, environ.get("CUDA_VISIBLE_DEVICES"))),
    ("PJRT_DEVICE", {}, "TPU", applied(functions._refuse_tpu)),
    ("TPU_NAME", {}, "local", applied(functions._refuse_tpu)),
]  # fmt: skip
SAVED = ProjectConfiguration(automatic_checkpoint_naming=True)


@pytest.mark.parametrize(
    ("name", "beside", "value", "look"), EFFECTS, ids=[f"{index}-{row[0]}" for index, row in enumerate(EFFECTS)]
)
def test_a_variable_that_we_obey_changes_what_is_done(monkeypatch, name, beside, value, look):
    monkeypatch.delenv(name, raising=False)

    def seen(environ: Mapping[str, str]) -> Any:
        try:
            return look(environ)
        except ValueError as error:
            return str(error)

    assert seen({**beside, name: value}) != seen(beside)


def test_no_variable_that_we_obey_is_left_out_here():
    tried = {name for name, *_ in EFFECTS}

    assert set(variables.OBEYED) | set(FIELD_OF) <= tried


SOURCE = "".join(
    file.read_text(encoding="utf-8")
    for file in Path(accelerate.__file__).parent.rglob("*.py")
    if file.name != "variables.py"
)
DEVICE_LISTS = {family.visible_devices for family in FAMILIES.values() if family.visible_devices}


@pytest.mark.parametrize("name", [name for name in NAMES if name in DEVICE_LISTS])
def test_the_devices_of_workers_are_chosen_by_the_variable_of_their_kind(name):
    request = LaunchRequest.merge({"gpu_ids": "1,2"}, None, {}, script="s.py")

    assert plan(request, Machine("python", Devices(4, "theirs", name))).env[name] == "1,2"


OF_OTHERS = re.compile(
    "AWS_|CLEARML_|MLFLOW_|KMP_|XLA_|USE_TORCH_XLA$|PT_HPU_|DEEPSPEED_USE_HPU$|PYTORCH_CNDEV_|KAGGLE|NPROC$|PYTHONPATH$"
    "|RUN_SLOW$|PYTEST_XDIST_WORKER$|TRANSFORMERS_NO_ADVISORY_WARNINGS$"
)
"""Names on the list that speak to other programs: to trackers, libraries, notebooks and tests."""
SET_BY_US = ("PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_NVML_BASED_CUDA_CHECK")
"""Names that we set for torch, and never read."""
NAMED_BY_US = ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE")
"""Names that we tell people to set for NCCL."""


@pytest.mark.parametrize("name", NAMES)
def test_every_known_variable_is_obeyed_refused_told_or_somebody_elses(name):
    if name in {row[0] for row in EFFECTS} | DEVICE_LISTS:
        return
    if name in variables.LATER:
        assert name in variables.about_ignored({name: "1"})[0]
        return
    if OF_OTHERS.match(name) or name in (*SET_BY_US, *NAMED_BY_US):
        assert (f'"{name}"' in SOURCE) == (name in SET_BY_US), "whether our code has to do with it"
        variables.refuse_absent({name: "true"})
        return
    name = name.replace("*", "TP_SIZE")

    with pytest.raises(UnsupportedCombination) as caught:
        LaunchRequest.merge({}, None, {name: "true"}, script="s.py")

    assert f"{name}=true (in the environment) needs " in str(caught.value)
