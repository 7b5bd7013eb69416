"""Collectives over the default group of `torch.distributed`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..topology import connect
from .base import Collectives, Line

# Torch 2.13 renames the call; the old name warns there, the new one is absent before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Where torch has this, NCCL needs no communicator for each pair of ranks that sends.
_IN_BATCHES: dict[str, Any] = {"use_batch": True} if "use_batch" in signature(dist.send_object_list).parameters else {}

_TAG = 0x6163
"""Keeps our messages apart from those that a program sends itself, where the backend has tags."""

_FEW_RANKS, _SMALL_BYTES = 8, 2**20
"""Where gloo gathers faster by sending directly: 0.13 ms in place of 0.4 for a few bytes between 2 ranks."""


class TorchCollectives(Collectives):
    """The default process group, whatever its backend."""

    def __init__(self, device: torch.device) -> None:
        """Take rank and size from the group, which must exist.

        Args:
            device: This process's device, on which barriers run where the backend needs one.
        """
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._sends_directly = dist.get_backend() == "gloo"
        self._number_device = torch.device("cpu") if "gloo" in connect.group_backend() else device
        self._barrier_options: dict[str, Any] = {"device_ids": [device.index]} if dist.get_backend() == "nccl" else {}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._ask("all_gather")
        tensor = _as_rows(tensor)
        joined = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather_single(joined, tensor)
        return joined

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        self._ask("broadcast")
        dist.broadcast(tensor, src)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        self._ask("all_reduce")
        dist.all_reduce(tensor)
        if mean:
            return (
                tensor.div_(self.world_size)
                if tensor.is_floating_point() or tensor.is_complex()
                else (tensor / self.world_size)
            )
        return tensor

    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor] | None, src: int = 0) -> torch.Tensor:
        self._ask("scatter")
        dist.scatter(output, None if inputs is None else list(inputs), src)
        return output

    def all_gather_object(self, obj: Any) -> list[Any]:
        self._ask("all_gather_object")
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj)
        return objects

    def gather_among(self, tensor: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        self._ask("gather_among", ranks)
        tensor = _as_rows(tensor)
        if len(ranks) == self.world_size and not (
            self._sends_directly and len(ranks) <= _FEW_RANKS and tensor.nbytes <= _SMALL_BYTES
        ):
            return self.all_gather(tensor)
        # Point to point: making a group would need the other ranks, which are elsewhere.
        parts = tensor.new_empty((len(ranks), *tensor.shape))
        transfers = []
        for part, rank in zip(parts, ranks, strict=True):
            if rank == self.rank:
                part.copy_(tensor)
            elif tensor.numel():
                transfers += [
                    dist.P2POp(dist.isend, _bytes(tensor), rank, tag=_TAG),
                    dist.P2POp(dist.irecv, _bytes(part), rank, tag=_TAG),
                ]
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        return parts.flatten(0, 1)

    def gather_numbers_among(self, numbers: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor([numbers], device=self._number_device)
        return self.gather_among(mine, ranks).tolist()

    def gather_object_among(self, obj: Any, ranks: Sequence[int]) -> list[Any]:
        self._ask("gather_object_among", ranks)
        if len(ranks) == self.world_size:
            return self.all_gather_object(obj)
        first, *others = ranks
        if self.rank != first:
            dist.send_object_list([obj], dst=first, **_IN_BATCHES)
            box: list[Any] = [None] * len(ranks)
            dist.recv_object_list(box, src=first, **_IN_BATCHES)
            return box
        objects = [obj]
        for rank in others:
            box = [None]
            dist.recv_object_list(box, src=rank, **_IN_BATCHES)
            objects += box
        for rank in others:
            dist.send_object_list(objects, dst=rank, **_IN_BATCHES)
        return objects

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        self._ask("broadcast_object")
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def barrier(self) -> None:
        self._ask("barrier")
        dist.barrier(**self._barrier_options)

    def second_line(self) -> Line:
        return _SecondLine()


_CONNECTING = dt.timedelta(seconds=10)  # gloo tries up to five times


class _SecondLine:
    """A group of its own between CPUs: what runs on it never meets the operations of the main thread."""

    def __init__(self) -> None:
        # A rank that ends while others connect to it would keep them for as long as operations may take.
        group: Any = dist.new_group(backend="gloo", timeout=_CONNECTING)
        distributed_c10d._set_pg_timeout(connect.group_timeout(), group)
        self._group = group
        self._under = dist.group.WORLD
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def all_gather_object(self, obj: Any) -> list[Any]:
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self._group)
        return objects

    def is_open(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self._under


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.detach() if tensor.dim() else tensor.detach()[None]).contiguous()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Not every backend sends every dtype. A single row may have any stride, with which torch refuses the view.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
