"""Collectives over the default group of `torch.distributed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .base import Collectives

# Torch 2.13 renames the call; the old name warns there, the new one is absent before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchCollectives(Collectives):
    """The default process group, whatever its backend."""

    def __init__(self, device: torch.device) -> None:
        """Take rank and size from the group, which must exist.

        Args:
            device: This process's device, on which barriers run where the backend needs one.
        """
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._barrier_options: dict[str, Any] = {"device_ids": [device.index]} if dist.get_backend() == "nccl" else {}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach() if tensor.dim() else tensor.detach()[None]
        tensor = tensor.contiguous()
        joined = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather_single(joined, tensor)
        return joined

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        dist.broadcast(tensor, src)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        dist.all_reduce(tensor)
        if mean:
            return (
                tensor.div_(self.world_size)
                if tensor.is_floating_point() or tensor.is_complex()
                else (tensor / self.world_size)
            )
        return tensor

    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor] | None, src: int = 0) -> torch.Tensor:
        dist.scatter(output, None if inputs is None else list(inputs), src)
        return output

    def all_gather_object(self, obj: Any) -> list[Any]:
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj)
        return objects

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(**self._barrier_options)
