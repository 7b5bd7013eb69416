"""`notebook_launcher` and `debug_launcher`: who the workers are, and how their errors arrive."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from accelerate.core.errors import LaunchError
from accelerate.launch import functions
from accelerate.launchers import debug_launcher, notebook_launcher
from accelerate.runtime import state


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
