"""The families of devices, one row each.

A device without a row works too: it gets the generic family. To give one its own label, variable and checkpoint
key, add a row here and a member of `DistributedType`.
"""

from __future__ import annotations

from ..core.enums import DistributedType
from .base import Cpu, Hardware

FAMILIES: dict[str, Hardware] = {
    family.name: family
    for family in (
        Cpu("cpu", DistributedType.MULTI_CPU, "gloo", None, "torch_manual_seed"),
        Hardware(
            "cuda",
            DistributedType.MULTI_GPU,
            "nccl",
            "CUDA_VISIBLE_DEVICES",
            "torch_cuda_manual_seed",
            copies_ahead=True,
        ),
        Hardware(
            "xpu",
            DistributedType.MULTI_XPU,
            "xccl",
            "ZE_AFFINITY_MASK",
            "torch_xpu_manual_seed",
        ),
        Hardware(
            "npu",
            DistributedType.MULTI_NPU,
            "hccl",
            "ASCEND_RT_VISIBLE_DEVICES",
            "torch_npu_manual_seed",
        ),
        Hardware(
            "mlu",
            DistributedType.MULTI_MLU,
            "cncl",
            "MLU_VISIBLE_DEVICES",
            "torch_mlu_manual_seed",
        ),
        Hardware(
            "sdaa",
            DistributedType.MULTI_SDAA,
            "tccl",
            "SDAA_VISIBLE_DEVICES",
            "torch_sdaa_manual_seed",
        ),
        Hardware(
            "musa",
            DistributedType.MULTI_MUSA,
            "mccl",
            "MUSA_VISIBLE_DEVICES",
            "torch_musa_manual_seed",
        ),
        Hardware(
            "hpu",
            DistributedType.MULTI_HPU,
            "hccl",
            "HABANA_VISIBLE_MODULES",
            "torch_hpu_manual_seed",
        ),
        Hardware(
            "neuron",
            DistributedType.MULTI_NEURON,
            "neuron",
            "NEURON_RT_VISIBLE_CORES",
            "torch_neuron_manual_seed",
        ),
        Hardware("mps", DistributedType.MULTI_GPU, None, None, "torch_mps_manual_seed"),
    )
}
