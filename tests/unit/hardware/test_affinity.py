"""Cores near a device."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.core.errors import SettingError, UnsupportedCombination
from accelerate.hardware import affinity


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,8", {0, 1, 2, 3, 8}),
        ("5", {5}),
        ("0-1,4-5,9\n", {0, 1, 4, 5, 9}),
        ("", set()),
        ("\n", set()),
        ("0-0", {0}),
    ],
)
def test_the_kernels_notation(text, cpus):
    assert affinity.parse_cpu_list(text) == cpus


@given(st.sets(st.integers(0, 40)))
def test_any_set_of_cores_is_read_back(cpus):
    ranges = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    assert affinity.parse_cpu_list(text) == cpus


def device_folder(folder, text):
    (folder / "0000:3b:00.0").mkdir()
    (folder / "0000:3b:00.0" / "local_cpulist").write_text(text)


def test_cores_near_a_device(tmp_path):
    device_folder(tmp_path, "0-1,3\n")
    assert affinity.cpus_near("0000:3b:00.0", tmp_path) == {0, 1, 3}


def test_a_kernel_that_does_not_tell(tmp_path):
    with pytest.raises(SettingError, match="does not tell which cores are near 0000:3b:00.0") as caught:
        affinity.cpus_near("0000:3b:00.0", tmp_path)
    assert "Leave --enable_cpu_affinity (ACCELERATE_CPU_AFFINITY) out" in str(caught.value)
    device_folder(tmp_path, "garbage")
    with pytest.raises(SettingError, match="garbage"):
        affinity.cpus_near("0000:3b:00.0", tmp_path)


def test_without_a_device_nothing_is_bound(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedCombination, match="no CUDA device"):
        affinity.override_numa_affinity(0)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One CUDA device near cores 0 and 1; records what the process is bound to."""
    device_folder(tmp_path, "0-1")
    bound = []
    monkeypatch.setattr(affinity, "cpus_near", lambda address, near=affinity.cpus_near: near(address, tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    address = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: address)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append((pid, cpus)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return bound


def test_the_process_is_bound_to_cores_near_its_device(machine, caplog):
    with caplog.at_level(logging.INFO):
        affinity.override_numa_affinity(0, verbose=True)
    assert machine == [(0, {0, 1})]
    assert "process 0 runs on cores [0, 1], near 0000:3b:00.0" in caplog.text


def test_a_binding_of_an_administrator_is_respected(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    affinity.set_numa_affinity(0)
    assert machine == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    affinity.set_numa_affinity(0)
    assert machine == [(0, {0, 1})]
