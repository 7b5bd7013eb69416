"""Debug mode: before ranks talk, compare what they bring.

A mismatch of shapes would otherwise hang, or give wrong numbers. Costs one exchange of objects for each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.errors import DistributedOperationException, explain
from ..core.tree import tree_map
from .base import Collectives, Guard, Line


class CheckedCollectives(Collectives):
    """Wraps any other collectives, and refuses operations that do not fit together."""

    def __init__(self, inner: Collectives) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size

    @property
    def guard(self) -> Guard | None:
        return self.inner.guard

    @guard.setter
    def guard(self, guard: Guard | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner.guard = guard

    def check(self, operation: str, data: Any, *, ranks: Sequence[int] | None = None) -> None:
        """Raise on every rank unless all came with the same operation, structure, shapes and dtypes.

        Raises:
            DistributedOperationException: With the operation and shapes of each rank.
        """
        self.inner.check(operation, data, ranks=ranks)
        mine = operation, repr(tree_map(_describe, data))
        brought = self.inner.all_gather_object(mine) if ranks is None else self.inner.gather_object_among(mine, ranks)
        if all(item == brought[0] for item in brought):
            return
        table = "\n".join(
            f"  - Process {rank}: {name} of {shape}"
            for rank, (name, shape) in zip(range(len(brought)) if ranks is None else ranks, brought, strict=True)
        )
        raise DistributedOperationException(
            explain(
                f"Cannot {operation}: the processes came with different operations or shapes.\n{table}",
                accepted="the same operation, structure, shapes and dtypes on all processes",
                remedy="Pad first with pad_across_processes, or look why these processes went different ways.",
            )
        )

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.inner.all_gather(tensor)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return self.inner.broadcast(tensor, src)

    def all_reduce(self, tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        return self.inner.all_reduce(tensor, mean)

    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor] | None, src: int = 0) -> torch.Tensor:
        return self.inner.scatter(output, inputs, src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        return self.inner.all_gather_object(obj)

    def gather_among(self, tensor: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        return self.inner.gather_among(tensor, ranks)

    def gather_numbers_among(self, numbers: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
        return self.inner.gather_numbers_among(numbers, ranks)

    def gather_object_among(self, obj: Any, ranks: Sequence[int]) -> list[Any]:
        return self.inner.gather_object_among(obj, ranks)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return self.inner.broadcast_object(obj, src)

    def barrier(self) -> None:
        self.inner.barrier()

    def second_line(self) -> Line:
        return self.inner.second_line()


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))
    return type(leaf).__name__
