"""Facts about the machine: counting devices without torch, and ports."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from accelerate.core.errors import LaunchError, SettingError
from accelerate.launch import devices, machine, mpirun
from accelerate.launch.request import LaunchRequest


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, 4), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("2, 3", 2), ("0,9,1", 1), ("0,0", 0), ("NoDevFiles", 0),
        ("GPU-a,GPU-b", 2), ("MIG-a,MIG-b", 1), ("0,1,2,3,4", 4),
    ],
)  # fmt: skip
def test_counting_what_the_variable_leaves_visible(variable, expected):
    assert devices.visible_count(4, variable) == expected


def test_without_devices_nothing_is_visible():
    assert devices.visible_count(0, "0,1") == 0


def test_the_build_of_torch_is_read_without_importing_it():
    build = devices.torch_build()

    assert build["__version__"] == torch.__version__
    assert build["cuda"] == torch.version.cuda


@pytest.mark.parametrize(("status", "expected"), [(0, 3), (999, 0)])
def test_the_driver_is_asked_through_its_management_library(monkeypatch, status, expected):
    class Library:
        """A driver with three devices, or one that answers every question with an error."""

        def __init__(self, name: str) -> None:
            assert name == "libnvidia-ml.so.1"

        nvmlInit_v2 = staticmethod(lambda: 0)
        nvmlShutdown = staticmethod(lambda: 0)

        @staticmethod
        def nvmlDeviceGetCount_v2(reference) -> int:
            reference._obj.value = 3
            return status

    monkeypatch.setattr(devices.ctypes, "CDLL", Library)
    assert devices.nvidia_count() == expected
    monkeypatch.setattr(devices, "torch_build", lambda: {"cuda": "13.0", "hip": None})
    found = devices.find({"CUDA_VISIBLE_DEVICES": "0,1"})
    label = "MULTI_GPU" if expected else ""
    assert found == devices.Devices(min(expected, 2), "cuda", "CUDA_VISIBLE_DEVICES", label=label)
    all_of_them = devices.Devices(expected, "cuda", "CUDA_VISIBLE_DEVICES", is_all=True, label=label)
    assert devices.find({}) == all_of_them


@pytest.mark.parametrize(
    ("flags", "expected"), [({"gpu_ids": "0,1,2"}, (3, None)), ({"multi_gpu": True}, (0, ""))], ids=["named", "counted"]
)
def test_devices_that_a_flag_names_are_looked_for_beside_those_that_the_environment_shows(monkeypatch, flags, expected):
    monkeypatch.setattr(devices, "torch_build", lambda: {"cuda": "13.0"})
    monkeypatch.setattr(devices, "nvidia_count", lambda: 3)
    request = LaunchRequest.merge(flags, None, {}, script="s")

    found = machine.survey(request, {"CUDA_VISIBLE_DEVICES": ""})

    assert found.devices is not None
    assert (found.devices.count, found.visible) == expected


def test_a_build_for_other_devices_is_asked_through_torch(monkeypatch):
    asked = devices.Devices(2, "xpu", "ZE_AFFINITY_MASK")
    monkeypatch.setattr(devices, "_ask_torch", lambda: asked)
    for build in ({"cuda": None, "xpu": "2025"}, {"cuda": "6", "hip": None, "mps": "yes"}, {}):
        monkeypatch.setattr(devices, "torch_build", lambda build=build: build)
        assert (devices.find({}) == asked) == (not build.get("cuda"))


def test_the_count_agrees_with_torch():
    assert devices.find({}).count == torch.accelerator.device_count() or not torch.accelerator.is_available()


def test_a_port_that_this_user_may_not_use_is_not_called_taken(monkeypatch):
    def refuse(_probe, _address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)

    with pytest.raises(SettingError, match="main_process_port=80 .* is a port on which this user may not listen"):
        machine.survey(LaunchRequest.merge({"main_process_port": 80, "cpu": True}, None, {}, script="s"), {})


def test_a_port_is_taken_while_somebody_listens():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not machine.is_port_free(port)
        request = LaunchRequest.merge({"main_process_port": port, "cpu": True}, None, {}, script="s")
        assert machine.survey(request, {}).port_is_taken
    assert machine.is_port_free(port)


def test_a_plain_launch_asks_the_machine_nothing(monkeypatch):
    monkeypatch.setattr(devices, "find", lambda environ: pytest.fail("the devices were counted"))
    request = LaunchRequest.merge({"num_processes": 1}, None, {}, script="s")

    assert machine.survey(request, {}).devices is None


def test_cores_are_at_least_one_and_at_most_what_is_allowed():
    assert 1 <= machine.physical_cores()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ()),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "PATH": "/"}, ("RANK", "WORLD_SIZE", "MASTER_ADDR")),
    ],
)
def test_the_variables_of_a_rank_are_those_of_torchrun_not_of_mpi(environ, expected):
    assert machine.survey(LaunchRequest(script="s.py", cpu=True), environ).rank_variables == expected


@pytest.mark.skipif(os.name != "posix", reason="a program of a kind that others do not have")
def test_an_mpirun_that_does_not_answer_is_told_and_gets_no_terminal(tmp_path, monkeypatch):
    program, hosts = tmp_path / "mpirun", tmp_path / "hosts"
    program.write_text(f"#!/bin/sh\nread line || touch {tmp_path}/end-of-input; exec sleep 600\n")
    program.chmod(0o755)
    hosts.write_text("a\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(mpirun, "_VERSION_SECONDS", 2)
    reading, writing = os.pipe()  # a terminal at which nobody types
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        with pytest.raises(LaunchError, match="mpirun, which cannot be run: no answer within 2 s"):
            mpirun.find(str(hosts), "mpirun_hostfile=hosts (from --mpirun_hostfile)")
    finally:
        os.dup2(before, 0)
        for number in (reading, writing, before):
            os.close(number)
    assert (tmp_path / "end-of-input").exists()
