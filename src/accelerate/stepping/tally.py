"""What is known of one window of accumulation while it is open: its counter, and what its gradients are a sum over.

Owns how a batch is counted: by itself, by its samples or by its items. The arithmetic is in `stepping.window`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from operator import index
from typing import Any

import torch

from ..core.errors import SettingError, WrongTypeError, explain
from .calls import Calls
from .window import Place, Share, share_of

BATCHES, SAMPLES, ITEMS = "batches", "samples", "items"
_MEASURED_BY = {
    BATCHES: "backward(loss) without num_items",
    SAMPLES: "backward(loss) in a loop over a loader with a global batch size",
    ITEMS: "backward(loss, num_items=...)",
}


class Window:
    """The counter of one set of models, and what is known of the gradients they have accumulated."""

    def __init__(self, models: Iterable[Any] | None = None) -> None:
        self._models = None if models is None else [reference_to(model) for model in models]
        self.given: Callable[[], Any] = lambda: None
        """The model as it was passed to `accumulate` last, if it was one."""
        self.place = Place()
        self.is_moved = False
        """Whether other ranks began this window than go on with it."""
        self.calls = Calls()
        self.used = self.began = 0
        """When it had its last batch, and when its first, on a clock that all windows share."""
        self.restart()

    def restart(self) -> None:
        """Forget what the last window held; the counter goes on."""
        self.measure: str | None = None
        """What is counted: batches, samples or items."""
        self.reference: float | None = None
        """What the gradients are a sum over; see [Note: one sum over one number] in `stepping.window`."""
        self.own = 0
        """Items of this rank so far."""
        self.total = 0
        """Samples of all ranks so far, this batch's too; only with a global batch size."""
        self.batch: tuple[int, int, int] | None = None
        """With a global batch size: real samples of this rank's batch, samples of a full one, number of shards."""
        self.is_pending = False
        """Whether there are gradients of batches before this one that no optimizer has used."""

    @property
    def models(self) -> list[Any] | None:
        """The models without wrappers; `None` means all, an entry `None` one that is gone."""
        return None if self._models is None else [reference() for reference in self._models]

    def enter(self, measure: str) -> None:
        """Count as `measure` says from now on.

        Raises:
            SettingError: (a `ValueError`) if this window counts something else.
        """
        if self.measure not in (None, measure):
            raise SettingError(
                explain(
                    f"{_MEASURED_BY[measure]} was called in a window of accumulation that began with "
                    f"{_MEASURED_BY[self.measure or '']}: how much its batches count against each other is not known.",
                    accepted="one way in all batches of a window",
                    remedy="Pass num_items in all of them, or in none.",
                )
            )
        self.measure = measure

    def divisor(self) -> int | None:
        """Return by what to divide a loss, and count it, where batches count alike and their number is as expected.

        So it is in most batches; `None` means that `share` has to tell.
        """
        place = self.place
        length = place.length
        if self.batch is not None or (place.is_last and place.number != length):
            return None
        if self.measure is None:
            self.measure = BATCHES
        elif self.measure != BATCHES or self.reference != length:
            return None
        self.reference = length
        return length

    def share(self) -> Share:
        """Return how the loss of this batch joins, by itself or by its samples."""
        place = self.place
        if self.batch is None:
            self.enter(BATCHES)
            return share_of(1, self.reference, place.number if place.is_last else self.reference or place.length)
        self.enter(SAMPLES)
        own, full, shards = self.batch
        return share_of(
            own, self.reference, self.total / shards if place.is_last else self.reference or full * place.length
        )

    def share_of_steps(self, num_steps: int) -> Share:
        """Return how a loss joins where nobody says how many batches there will be: divided by the number of steps."""
        self.enter(BATCHES)
        return Share(num_steps, num_steps)


def reference_to(model: Any) -> Callable[[], Any]:
    """Return a weak reference, where the model's class allows one."""
    try:
        return weakref.ref(model)
    except TypeError:  # an object of a class with slots; there is nothing to reduce for it anyway
        return lambda: model


def count_items(num_items: Any) -> int:
    """Return a number of items as an integer.

    Raises:
        WrongTypeError: (a `TypeError`) for anything but an integer or a tensor that holds one.
        SettingError: (a `ValueError`) for a negative or a broken number.
    """
    value = num_items.item() if isinstance(num_items, torch.Tensor) and num_items.numel() == 1 else num_items
    if not isinstance(value, (bool, float)):
        try:
            value = index(value)  # an integer of numpy is one too
        except TypeError:
            value = None
    if value is None or isinstance(value, bool):
        raise WrongTypeError(
            explain(
                f"backward(num_items={num_items!r:.60}) has type {type(num_items).__name__}.",
                accepted="an integer, or a tensor of one element",
                remedy="Pass the number of items over which the loss of this rank's batch is a mean.",
            )
        )
    if value < 0 or value != int(value):
        raise SettingError(
            explain(
                f"backward(num_items={value!r}) is not a number of items.",
                accepted="an integer >= 0",
                remedy="Pass the number of items over which the loss of this rank's batch is a mean.",
            )
        )
    return int(value)
