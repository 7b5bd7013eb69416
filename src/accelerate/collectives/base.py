"""What every way of talking between ranks offers.

Leaf operations only: nested containers are walked above, in `runtime.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Guard = Callable[[str, Sequence[int] | None], None]
"""Raises to refuse an operation: which, and who takes part, `None` for all ranks."""


class Exchange(Protocol):
    """The little that ranks need to agree on something."""

    rank: int
    world_size: int

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, in order of rank. They travel pickled, among trusted ranks."""
        ...


class Line(Exchange, Protocol):
    """An exchange of its own, beside the operations of the main thread."""

    def is_open(self) -> bool:
        """Tell whether it still works; the same on all ranks. It does not when the ranks have met anew."""
        ...


class Collectives(ABC):
    """Operations that all ranks call together. Each blocks until the others have come."""

    rank: int = 0
    world_size: int = 1
    guard: Guard | None = None
    """Asked before ranks talk."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, joined along dimension 0 in order of rank.

        Args:
            tensor: Of the same shape and dtype on all ranks; without dimensions it counts as one row.
        """

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `src`, and return it."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, mean: bool = False) -> torch.Tensor:
        """Overwrite `tensor` with the sum over all ranks, or the mean, and return it."""

    @abstractmethod
    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor] | None, src: int = 0) -> torch.Tensor:
        """Fill `output` with this rank's element of the list that rank `src` holds, and return it.

        Args:
            output: Where to receive, of the same shape and dtype on all ranks.
            inputs: One tensor per rank, on rank `src`; `None` elsewhere.
        """

    @abstractmethod
    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, in order of rank. They travel pickled, among trusted ranks."""

    @abstractmethod
    def gather_among(self, tensor: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        """Return the tensors of some ranks, joined along dimension 0 in order of rank.

        Called on these ranks only: the others may be anywhere, in another collective too.

        Args:
            tensor: Of the same shape and dtype on these ranks; without dimensions it counts as one row.
            ranks: Who takes part, in ascending order; the same on all of them.
        """

    @abstractmethod
    def gather_numbers_among(self, numbers: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
        """Return the numbers of some ranks, as many on each, in order of rank. Called on these ranks only.

        They travel between CPUs where the group can: no device is waited for.
        """

    @abstractmethod
    def gather_object_among(self, obj: Any, ranks: Sequence[int]) -> list[Any]:
        """Return the objects of some ranks, in order of rank. Called on these ranks only, as `gather_among` is."""

    @abstractmethod
    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`. It travels pickled, among trusted ranks."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has come."""

    @abstractmethod
    def second_line(self) -> Line:
        """Return another way to talk between all ranks, which one other thread may use at the same time.

        Called on all ranks; collective. Goes with the process group.
        """

    def check(self, operation: str, data: Any, *, ranks: Sequence[int] | None = None) -> None:
        """Ask the guard, and in debug mode compare `data` over the ranks, before `operation`.

        Args:
            operation: What follows, for the message.
            data: What this rank brings.
            ranks: Who takes part, if not all do.
        """
        self._ask(operation, ranks)

    def _ask(self, operation: str, ranks: Sequence[int] | None = None) -> None:
        if self.guard is not None:
            self.guard(operation, ranks)
