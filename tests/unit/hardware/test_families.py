"""The contract of a family of devices, run over every row with a device module that only records."""

from __future__ import annotations

import types

import pytest
import torch

from accelerate import hardware
from accelerate.core.enums import DistributedType, RNGType
from accelerate.core.errors import SettingError
from accelerate.hardware import CPU, FAMILIES, Hardware
from tests.support.ranks import run_on_ranks

DEVICES = [name for name in FAMILIES if name != "cpu"]
KNOWN_TO_TORCH = ("cuda", "xpu", "hpu", "mps")


class FakeModule(types.ModuleType):
    """Three devices that remember what was asked of them."""

    def __init__(self, name):
        super().__init__(f"torch.{name}")
        self.calls = []
        self.states = [torch.tensor([1]), torch.tensor([2]), torch.tensor([3])]

    def device_count(self):
        return 3

    def current_device(self):
        return 2

    def set_device(self, device):
        self.calls.append(("set_device", device))

    def synchronize(self, *device):
        self.calls.append(("synchronize", *device))

    def empty_cache(self):
        self.calls.append(("empty_cache",))

    def manual_seed_all(self, seed):
        self.calls.append(("manual_seed_all", seed))

    def get_rng_state_all(self):
        return list(self.states)

    def set_rng_state_all(self, states):
        self.states = list(states)

    def get_rng_state(self):
        return self.states[2]

    def set_rng_state(self, state):
        self.states[2] = state

    def is_bf16_supported(self):
        return False


def contract(name: str) -> bool:
    """Hold a family to what it promises; in a process of its own, since torch takes one foreign device only."""
    family = FAMILIES[name]
    fake = FakeModule(name)
    if name in KNOWN_TO_TORCH:
        setattr(torch, name, fake)
    else:
        torch.utils.rename_privateuse1_backend(name)
        torch._register_device_module(name, fake)
    assert family.module is fake
    assert family.count() == 3
    assert family.device(1) == torch.device(name, 1)
    assert family.device() == torch.device(name, 2)
    try:
        family.device(3)
    except SettingError as error:
        text = str(error)
    assert f"Local process 3 has no {name} device of its own: 3 visible here." in text
    assert family.visible_devices is None or f"with {family.visible_devices}." in text
    family.select(family.device(1))
    family.synchronize()
    family.synchronize(family.device(2))
    family.synchronize(torch.device("cpu"))
    family.empty_cache()
    family.manual_seed_all(7)
    assert fake.calls == [
        ("set_device", torch.device(name, 1)),
        ("synchronize",),
        ("synchronize", torch.device(name, 2)),
        ("empty_cache",),
        ("manual_seed_all", 7),
    ]
    saved = family.get_rng_state()
    family.set_generator_state(torch.tensor([9]))
    assert family.get_generator_state().item() == 9
    family.set_rng_state(saved)
    assert family.get_generator_state().item() == 3
    assert not family.supports_bf16()
    assert family.needs_placement
    assert hardware.of(f"{name}:1", "here") is family
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device(name)
    assert hardware.detect() is family
    return True


@pytest.mark.parametrize("name", DEVICES)
def test_each_family_keeps_the_contract(name):
    assert run_on_ranks(contract, 1, name) == [True]


def foreign() -> tuple[str, str, str | None, str]:
    """A device this library has no row for, as a plugin of torch would add it."""
    fake = FakeModule("newdevice")
    torch.utils.rename_privateuse1_backend("newdevice")
    torch._register_device_module("newdevice", fake)
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("newdevice")
    family = hardware.detect()
    family.select(family.device(0))
    assert fake.calls == [("set_device", torch.device("newdevice", 0))]
    return family.name, family.label.value, family.backend, family.rng_key


def test_a_device_without_a_row_works():
    assert run_on_ranks(foreign, 1) == [("newdevice", "MULTI_GPU", None, "torch_newdevice_manual_seed")]


@pytest.mark.parametrize("name", DEVICES)
def test_a_module_that_offers_nothing_is_enough(name, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: types.ModuleType("bare"))
    family = FAMILIES[name]
    assert family.count() == 1
    family.select(torch.device("cpu"))
    family.synchronize()
    family.empty_cache()
    family.manual_seed_all(1)
    family.set_rng_state(None)
    assert family.get_rng_state() is None
    assert family.supports_bf16()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_complete(name):
    family = FAMILIES[name]
    assert family.name == name
    assert isinstance(family.label, DistributedType)
    assert family.rng_key == ("torch_manual_seed" if name == "cpu" else f"torch_{name}_manual_seed")
    if f"MULTI_{name.upper()}" in DistributedType.__members__:
        assert family.label == f"MULTI_{name.upper()}"
    else:
        assert family.label is DistributedType.MULTI_GPU
    assert name in RNGType or name in ("cpu", "mps"), "ranks could not synchronise its generator"


def test_no_two_rows_restrict_devices_by_one_variable():
    named = [family.visible_devices for family in FAMILIES.values() if family.visible_devices]
    assert len(named) == len(set(named))


def test_every_label_for_several_devices_has_a_row():
    labels = {kind for kind in DistributedType if kind.value.startswith("MULTI_")}
    assert {family.label for family in FAMILIES.values()} == labels


# The CPU -------------------------------------------------------------------------------------------------------------


def test_the_cpu_is_one_device_whose_index_tells_processes_apart():
    assert CPU.count() == 1
    assert CPU.device() == torch.device("cpu")
    assert str(CPU.device(0)) == str(CPU.device(5)) == "cpu:0"
    CPU.select(torch.device("cpu", 0))
    CPU.synchronize()
    CPU.empty_cache()
    assert CPU.supports_bf16()
    assert not CPU.needs_placement


def test_the_cpus_generator_is_torchs_own():
    before = CPU.get_generator_state()
    drawn = torch.rand(1)
    CPU.set_generator_state(before)
    assert torch.equal(torch.rand(1), drawn)
    assert CPU.get_rng_state() is None
    CPU.set_rng_state(None)
    CPU.manual_seed_all(3)
    assert not torch.equal(torch.rand(1), drawn)


def test_the_cpu_makes_a_scaler_that_works():
    scaler = CPU.grad_scaler(init_scale=4.0)
    assert scaler.is_enabled()
    assert scaler.scale(torch.tensor(2.0)).item() == 8.0


# Asking --------------------------------------------------------------------------------------------------------------


def test_a_device_torch_does_not_know_is_refused_with_its_origin():
    with pytest.raises(
        SettingError, match=r"device 'gpu' is not known to torch \(from ACCELERATE_TORCH_DEVICE\)"
    ) as caught:
        hardware.of("gpu", "from ACCELERATE_TORCH_DEVICE")
    assert "Accepted: " in str(caught.value)


def test_a_device_without_a_module_has_none():
    family = hardware.of("meta", "here")
    assert isinstance(family, Hardware)
    assert family.module is None
    assert family.device() == torch.device("meta", 0)


def test_questions_of_the_historical_interface(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    assert hardware.is_xpu_available()
    assert hardware.is_xpu_available(check_device=True)
    for name in ("mps", "npu", "mlu", "musa", "sdaa", "hpu", "neuron"):
        assert not getattr(hardware, f"is_{name}_available")()
    assert not hardware.is_torch_xla_available(check_is_tpu=True)
    assert hardware.is_fp16_available()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RuntimeError("CUDA out of memory."), True),
        (RuntimeError("x out of memory. y"), True),
        (RuntimeError("XPU out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("boom"), False),
        (RuntimeError("out of memory.", "two arguments"), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, answer):
    assert CPU.is_out_of_memory(error) is answer
