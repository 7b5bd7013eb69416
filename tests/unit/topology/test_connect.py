"""Choosing a backend, and what other libraries are told before joining."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest

from accelerate.core.errors import SettingError
from accelerate.settings import env
from accelerate.topology import Process, connect

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("requested", "device", "own", "backend"),
    [
        (None, "cpu", "gloo", "gloo"),
        ("gloo", "cpu", "gloo", "gloo"),
        ("mpi", "cpu", "gloo", "mpi"),
        (None, "cuda", "nccl", "cpu:gloo,cuda:nccl"),
        ("nccl", "cuda", "nccl", "cpu:gloo,cuda:nccl"),
        ("gloo", "cuda", "nccl", "gloo"),
        ("ucc", "cuda", "nccl", "ucc"),
        ("cpu:gloo,cuda:ucc", "cuda", "nccl", "cpu:gloo,cuda:ucc"),
        (None, "npu", "hccl", "cpu:gloo,npu:hccl"),
        (None, "xpu", "xccl", "cpu:gloo,xpu:xccl"),
        (None, "mps", None, "gloo"),
        ("cpu:gloo", "cpu", "gloo", "cpu:gloo"),
    ],
)
def test_choose_backend(requested, device, own, backend):
    assert connect.choose_backend(requested, device, own) == backend


def test_a_device_for_which_torch_knows_no_backend_is_refused():
    with pytest.raises(SettingError, match="knows no backend for several processes on 'newdevice' devices"):
        connect.choose_backend(None, "newdevice", None)


@pytest.mark.parametrize("backend", ["nccl", "hccl", "zz"])
def test_a_backend_that_moves_no_cpu_memory_is_refused(backend):
    with pytest.raises(SettingError, match=f"backend='{backend}' cannot serve processes on the CPU") as caught:
        connect.choose_backend(backend, "cpu", "gloo")
    assert "'gloo', 'mpi'" in str(caught.value)


class Recorder:
    distributed_c10d = SimpleNamespace(default_pg_timeout=timedelta(seconds=1800))

    def __init__(self):
        self.calls = []
        self.looked = []
        self.environ = {}

    def init_process_group(self, **options):
        self.calls.append(options)
        self.environ = {name: env.get(name) for name in TOLD}


@pytest.fixture
def dist(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(connect, "dist", recorder)
    for name in ("wait_until_own", "wait_until_reachable"):

        def look(*words, name=name, **options):
            recorder.looked.append((name, *words, options))

        monkeypatch.setattr(connect.network, name, look)
    monkeypatch.setattr(connect.network, "route_to", lambda host, port: None)
    with env.applied(dict.fromkeys([*TOLD, "TORCHELASTIC_USE_AGENT_STORE"])):
        yield recorder


def test_an_mpi_process_tells_torch_its_place(dist):
    process = Process(rank=3, world_size=4, local_rank=1, local_world_size=2, source="mpi", address="node-a:29600")
    connect.connect(process, backend="gloo", timeout=timedelta(seconds=5))
    assert dist.calls == [{"backend": "gloo", "timeout": timedelta(seconds=5)}]
    assert dist.environ == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": "29600",
    }


def test_an_ipv6_address_keeps_its_colons(dist):
    connect.connect(Process(source="torchrun", address="fe80::1:29500"), backend="gloo")
    assert dist.environ["MASTER_ADDR"] == "fe80::1"
    assert dist.environ["MASTER_PORT"] == "29500"


def test_with_a_meeting_place_of_ones_own_nothing_is_announced(dist):
    process = Process(rank=1, world_size=2, source="torchrun", address="a:1")
    connect.connect(process, backend="gloo", init_method="file:///tmp/x")
    assert dist.calls == [{"backend": "gloo", "init_method": "file:///tmp/x", "rank": 1, "world_size": 2}]
    assert set(dist.environ.values()) == {None}


PLACED = Process(rank=3, world_size=4, local_rank=1, local_world_size=2, source="slurm", address="node-a:29600")


def test_the_first_rank_is_looked_for_before_torch_looks(dist):
    connect.connect(PLACED, backend="gloo", timeout=timedelta(seconds=5))
    with env.applied({"MASTER_ADDR": "node-b"}):
        connect.connect(replace(PLACED, rank=0), backend="gloo")
        connect.connect(replace(PLACED, rank=2, local_rank=0), backend="gloo")
        connect.connect(replace(PLACED, rank=1), backend="gloo")

    slurm, named = (
        "The address comes from the variables of slurm",
        "The address comes from MASTER_ADDR in the environment",
    )
    assert dist.looked == [
        ("wait_until_reachable", "node-a", 29600, slurm, 5.0, {"speaker": ""}),
        ("wait_until_own", "node-a", 29600, named, {"may_be_served": True}),
        ("wait_until_reachable", "node-a", 29600, named, 1800.0, {"speaker": "accelerate, rank 2"}),
        ("wait_until_reachable", "node-a", 29600, named, 1800.0, {"speaker": "accelerate, rank 1"}),
    ]


def test_nobody_is_looked_for_where_others_do_or_none_serves(dist):
    connect.connect(PLACED, backend="mpi")
    connect.connect(PLACED, backend="gloo", init_method="file:///tmp/x")
    connect.connect(Process(source="torchrun", address="127.0.0.1:0"), backend="gloo")
    with env.applied({"TORCHELASTIC_USE_AGENT_STORE": "True"}):
        connect.connect(PLACED, backend="gloo")

    assert len(dist.calls) == 4
    assert dist.looked == []


def test_an_existing_group_is_not_joined_again(dist):
    connect.connect(Process(rank=1, world_size=2, source="attached"), backend="gloo")
    assert dist.calls == []


def test_without_a_group_there_is_nothing_to_leave():
    assert connect.existing_group() is None
    connect.disconnect()
