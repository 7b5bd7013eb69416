"""One process: nobody to talk to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Collectives, Line


class SingleProcess(Collectives):
    """Every operation returns what it was given."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return tensor

    def all_reduce(self, tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        return tensor

    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor] | None, src: int = 0) -> torch.Tensor:
        return output if inputs is None else output.copy_(inputs[0])

    def all_gather_object(self, obj: Any) -> list[Any]:
        return [obj]

    def gather_among(self, tensor: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        return tensor

    def gather_numbers_among(self, numbers: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def gather_object_among(self, obj: Any, ranks: Sequence[int]) -> list[Any]:
        return [obj]

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return obj

    def barrier(self) -> None:
        return None

    def second_line(self) -> Line:
        return self

    def is_open(self) -> bool:
        return True
