"""Bind a process to the cores near its device.

Source: the kernel's list of a PCI device's local CPUs, Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from ..core.errors import SettingError, UnsupportedCombination, explain

logger = logging.getLogger(__name__)

PCI_DEVICES = Path("/sys/bus/pci/devices")


def parse_cpu_list(text: str) -> set[int]:
    """Read the kernel's notation: `"0-3,8"` is {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cpus_near(pci_address: str, devices: Path = PCI_DEVICES) -> set[int]:
    """Return the CPUs local to the PCI device at an address such as `"0000:3b:00.0"`.

    Raises:
        SettingError: (a `ValueError`) if the kernel does not tell.
    """
    file = devices / pci_address / "local_cpulist"
    try:
        return parse_cpu_list(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingError(
            explain(
                f"CPU affinity was asked for, and the kernel does not tell which cores are near {pci_address}: {error}.",
                remedy="Leave --enable_cpu_affinity (ACCELERATE_CPU_AFFINITY) out on this machine.",
            )
        ) from error


def override_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Bind this process to the cores near the CUDA device of this index.

    Args:
        local_process_index: The rank on this machine, which is the index of its device.
        verbose: Log the cores; `None` means no.

    Raises:
        UnsupportedCombination: (a `ValueError`) without CUDA devices.
    """
    if not torch.cuda.is_available():
        raise UnsupportedCombination(
            explain(
                "CPU affinity was asked for, and this machine has no CUDA device whose cores could be found.",
                remedy="Leave --enable_cpu_affinity (ACCELERATE_CPU_AFFINITY) out on this machine.",
            )
        )
    device = torch.cuda.get_device_properties(local_process_index)
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    cpus = cpus_near(address)
    os.sched_setaffinity(0, cpus)
    if verbose:
        logger.info(
            "process %d runs on cores %s, near %s",
            local_process_index,
            sorted(cpus),
            address,
        )


def set_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """The same as `override_numa_affinity`, unless an administrator's binding is in place already."""
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        override_numa_affinity(local_process_index, verbose=verbose)
