"""`notebook_launcher` and `debug_launcher`: who the workers are, and how their errors arrive."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import LaunchError
from accelerate.launch import functions
from accelerate.launch.report import RunPreempted
from accelerate.launchers import debug_launcher, notebook_launcher
from accelerate.runtime import state
from accelerate.utils import ProjectConfiguration


def note(folder: Path) -> None:
    """Join the others, and leave a file that says who this worker is."""
    runtime = state.start(state.ProcessSettings())
    ranks = runtime.collectives.all_gather_object(runtime.process.rank)
    names = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "FORK_LAUNCHED", "LOCAL_WORLD_SIZE")
    words = [str(ranks), runtime.backend, str(runtime.device), *(os.environ.get(name) for name in names)]
    (folder / str(runtime.process.rank)).write_text(" ".join(map(str, words)))


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("boom")
    time.sleep(30)


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(30)


def train_until_asked_to_stop(folder: Path, name: str) -> None:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=(name,))
    accelerator = Accelerator(cpu=True, project_config=project)
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.ones(8, 1))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for step, batch in enumerate(loader):
        if step == 1 and accelerator.process_index == 1:
            signal.raise_signal(signal.Signals[name])
        accelerator.backward(model(batch).sum())
        optimizer.step()
    raise AssertionError("nobody stopped")


def say_handlers(folder: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    (folder / os.environ["RANK"]).write_text(f"{handlers[0] == handlers[2] == signal.SIG_DFL} {handlers[1].__name__}")


def own_handler(*_: object) -> None: ...


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_debug_launcher_starts_gloo_workers_on_the_cpu(tmp_path):
    assert debug_launcher(note, (tmp_path,), num_processes=3) is None

    assert read(tmp_path) == {str(rank): "[0, 1, 2] gloo cpu:0 no true 1 3" for rank in range(3)}


def test_notebook_launcher_gives_two_workers_on_a_machine_without_devices_and_the_precision_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert notebook_launcher(note, (tmp_path,), num_processes=2, mixed_precision="bf16") is None

    assert read(tmp_path) == {str(rank): "[0, 1] gloo cpu:0 bf16 true 1 2" for rank in range(2)}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_workers_save_themselves_on_a_signal(tmp_path, name):
    with pytest.raises(RunPreempted, match=f"rank 1 received {name}: the run saved itself in .*checkpoint_0") as raised:
        notebook_launcher(train_until_asked_to_stop, (tmp_path, name), num_processes=2)
    assert raised.value.status == 75
    assert (tmp_path / "checkpoints" / "checkpoint_0" / "accelerate_manifest.json").exists()


def test_workers_handle_signals_as_the_notebook_does_and_not_as_its_launcher(tmp_path):
    before = signal.signal(signal.SIGUSR1, own_handler)
    try:
        notebook_launcher(say_handlers, (tmp_path,), num_processes=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read(tmp_path) == dict.fromkeys("01", "True own_handler")


def test_notebook_launcher_runs_one_process_right_here_with_the_precision_asked_for():
    seen = []

    assert notebook_launcher(lambda: seen.append(os.environ["ACCELERATE_MIXED_PRECISION"]), (), 1, "FP16") is None

    assert seen == ["fp16"]
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
@pytest.mark.parametrize(
    ("function", "expected"),
    [(fail_on_rank_1, "exited with code 1: ValueError: boom"), (die_on_rank_1, "exited with code 7")],
)
def test_a_workers_error_arrives_with_its_rank_and_traceback(launcher, function, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    began = time.monotonic()

    with pytest.raises(LaunchError) as caught:
        launcher(function, num_processes=2)

    last = str(caught.value).splitlines()[-1]
    assert last.startswith("accelerate: rank 1 of 2 (pid ")
    assert expected in last
    assert ("fail_on_rank_1" in str(caught.value)) == (function is fail_on_rank_1), "the traceback names the function"
    assert time.monotonic() - began < 15, "the other worker was ended"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "num_processes=None"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"num_processes": 2, "node_rank": 1}, "node_rank=1"),
        ({"num_processes": 2, "mixed_precision": "fp32"}, "mixed_precision='fp32'"),
        ({"num_processes": 1, "mixed_precision": "fp32"}, "mixed_precision='fp32'"),
    ],
)
def test_wrong_arguments_are_value_errors(options, expected):
    with pytest.raises(ValueError, match=expected):
        notebook_launcher(lambda: None, (), **options)


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
def test_workers_are_not_started_beside_an_existing_state(launcher):
    state.start(state.ProcessSettings(cpu=True))

    with pytest.raises(ValueError, match="an Accelerator or PartialState exists"):
        launcher(lambda: None, num_processes=2)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_device_in_use_is_refused_and_so_are_more_processes_than_devices(monkeypatch, processes):
    class Family:
        is_initialized = staticmethod(lambda: True)

    monkeypatch.setattr(functions.devices, "find", lambda environ: functions.devices.Devices(2, "cuda"))
    monkeypatch.setattr("accelerate.hardware.named", lambda name: Family)

    with pytest.raises(ValueError, match="already uses cuda" if processes == 2 else "at most 2, the cuda devices"):
        notebook_launcher(lambda: None, num_processes=processes)


def test_a_port_of_ones_own_is_used_when_it_is_free():
    assert functions._meeting("static", "", None, "127.0.0.1", 29500, 1).endpoint == "localhost:0"
    assert functions._meeting("static", "", None, "127.0.0.1", 41234, 1).endpoint == "127.0.0.1:41234"
    assert functions._meeting("static", "", None, "10.0.0.1", 29500, 2).endpoint == "10.0.0.1:29500"
    assert functions._meeting("c10d", "host:1", {"a": 1}, "x", 2, 2).options == {"a": 1}
