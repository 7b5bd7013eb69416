"""Option classes whose engine this version does not have.

Owns their names, so that scripts that import them load, and the message that says what is missing. A class moves
to a file of its own when its engine arrives.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ...core import engines
from ...core.errors import UnsupportedCombination, explain


def refuse(setting: str, engine: str) -> NoReturn:
    """Raise the error for a setting whose engine is missing.

    Args:
        setting: The setting as the user wrote it.
        engine: What would be needed, in words.
    """
    raise UnsupportedCombination(
        explain(
            f"{setting} needs {engine}, which accelerate 2.0 does not have yet.",
            accepted="one process, or data parallelism (DistributedDataParallel), in fp32, bf16 or fp16",
            remedy="Leave the setting out, or stay on accelerate 1.x for this run.",
        )
    )


class _Absent:
    engine = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse(type(self).__name__, self.engine)


class FullyShardedDataParallelPlugin(_Absent):
    """Options of fully sharded data parallelism."""

    engine = engines.FSDP


class DeepSpeedPlugin(_Absent):
    """Options of DeepSpeed."""

    engine = engines.DEEPSPEED


class MegatronLMPlugin(_Absent):
    """Options of Megatron-LM."""

    engine = engines.MEGATRON


class TorchTensorParallelPlugin(_Absent):
    """Options of tensor parallelism."""

    engine = engines.TENSOR_PARALLEL


class ParallelismConfig(_Absent):
    """Sizes of the axes of a device mesh."""

    engine = engines.MESH


class FP8RecipeKwargs(_Absent):
    """Options of training in eight bits."""

    engine = engines.FP8


class TERecipeKwargs(_Absent):
    """Options of Transformer Engine."""

    engine = "the Transformer Engine back-end of fp8"


class MSAMPRecipeKwargs(_Absent):
    """Options of MS-AMP."""

    engine = "the MS-AMP back-end of fp8"


class AORecipeKwargs(_Absent):
    """Options of torchao's float8 training."""

    engine = "the torchao back-end of fp8"
