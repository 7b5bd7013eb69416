"""How often a loop counts one batch of a loader, and which of these times is the last.

Owns that number for one window. Never touches loaders.

[Note: the last call in the last batch]
The last batch of a loader ends a window early. A loop may call `accumulate` several times in each batch, for parts of
it or to train a model several times, and only the last of them may end the window. Which one that is nobody says, so
it is as many as in the batch before. Where that was wrong the window has ended too early or not at all, and both are
told.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..core.errors import SettingError, explain

_REMEDY = (
    "Call it as often in each batch, or once with several backward() inside; or let windows go on over the end of the "
    "loader with GradientAccumulationPlugin(num_steps={}, sync_with_dataloader=False)."
)


class Calls:
    """The calls for one window in the current batch of a loader, and in the batch it gave before.

    Args:
        before: What to take for the latter at first, as a checkpoint tells.
    """

    __slots__ = ("_batch", "_by_loader", "_due", "_restored", "before", "is_cut", "number")

    def __init__(self, before: int | None = None) -> None:
        self.before: int | None = None
        """Calls in the batch before; `None` if there was none."""
        self.number = 0
        """Calls in this batch so far."""
        self.is_cut = False
        """Whether the call that was counted last has ended a window before it was full."""
        self._restored = before
        self._by_loader: dict[Any, int] = {}
        self._batch: tuple[Any, int] | None = None
        self._due = 0
        """How many calls the last batch of a loader was to have, while it has fewer."""

    @property
    def usual(self) -> int:
        """How many calls a batch has, as far as is known."""
        return max(self.before or self._restored or 1, self.number)

    def count(self, batch: tuple[Any, int] | None) -> bool:
        """Count a call; return whether it is the first in this batch.

        Args:
            batch: A reference to the loader and the number of its batch; `None` is always another one.
        """
        if batch is None and self._batch is None and self._restored is None:
            self.before, self.number = None, 1
            return True
        if batch is not None and batch == self._batch:
            self.number += 1
            return False
        if self._batch is not None:
            self._by_loader[self._batch[0]] = self.number
        self.before = self._restored if batch is None else self._by_loader.get(batch[0], self._restored)
        self._batch, self.number, self._restored = batch, 1, None
        return True

    def ends(self, is_first: bool, is_open: bool, at_end: bool, num_steps: int) -> bool:
        """Return whether the call that was counted last ends a window early.

        Args:
            is_first: Whether it is the first in its batch.
            is_open: Whether there is an open window, which began before.
            at_end: Whether the loader has just given its last batch.
            num_steps: Length of a window.

        Raises:
            SettingError: (a `ValueError`) if a call before it in the same batch had cut a window short.
        """
        if is_first and self._due and is_open:
            warnings.warn(
                f"The last batch of a loader had fewer calls of accumulate() than the {self._due} of the one before, so "
                f"it did not end the window: it goes on into the next pass. {_REMEDY.format(num_steps)}",
                stacklevel=4,
            )
        if self.is_cut and not is_first:
            raise SettingError(
                explain(
                    f"accumulate() was called for the same models {self.number} times in the last batch of a loader, and "
                    f"the call before this one had ended the window, short of {num_steps} batches: the batch before had "
                    f"{self.before or 'none'}.",
                    accepted="as many calls in each batch of a loader",
                    remedy=_REMEDY.format(num_steps),
                )
            )
        expected = self.before or 1
        self._due = expected if at_end and self.number < expected else 0
        return at_end and self.number == expected

    def ahead(self, batches: int | None) -> int | None:
        """Return how many calls follow in a pass, of whose batches so many follow."""
        if batches is None:
            return None
        return batches * self.usual + max((self.before or 1) - self.number, 0)
