"""When gradients are synchronised.

Owns the state that accumulation, loaders, optimizers and schedulers share, and the decision whether a batch ends
a window of accumulation.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from ..settings.options.accumulation import GradientAccumulationPlugin


def plan_sync(step: int, num_steps: int, *, end_of_dataloader: bool) -> tuple[int, bool]:
    """Decide whether the batch that begins now ends a window of accumulation.

    Args:
        step: Number of batches of the window that came before.
        num_steps: Length of a window.
        end_of_dataloader: Whether this batch is a loader's last and ends the window early.

    Returns:
        The counter after this batch, and whether gradients are synchronised.
    """
    if end_of_dataloader:
        return 0, True
    step += 1
    return step, step % num_steps == 0


class GradientState:
    """What loaders, optimizers and schedulers know of accumulation. All instances share their state."""

    _shared_state: ClassVar[dict[str, Any]] = {}

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = GradientState._shared_state
        if not self.initialized:
            self.sync_gradients = True
            self.plugin_kwargs: dict[str, Any] = {}
            self._loaders: list[weakref.ReferenceType[Any] | None] = [None]
            self._is_xla_gradients_synced = False
            self.window: tuple[int, int] | None = None
            """Number of the last batch of `accumulate` in its window, and length of a full window."""
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    def __reduce__(self) -> tuple[type[GradientState], tuple[()]]:
        # A copy shares the state too, also one that was pickled: what the state holds belongs to this process.
        return type(self), ()

    @property
    def initialized(self) -> bool:
        """Whether the state exists."""
        return "sync_gradients" in GradientState._shared_state

    @property
    def num_steps(self) -> int:
        """Number of batches in a window of accumulation; where a loader keeps a global batch size, it decides."""
        plan = getattr(self.active_dataloader, "global_batch", None)
        if plan is not None:
            return plan.accumulation
        return self.plugin_kwargs.get("num_steps", 1)

    @property
    def adjust_scheduler(self) -> bool:
        """Kept for compatibility: `False`, since prepared schedulers count optimizer steps with either value."""
        return self.plugin_kwargs.get("adjust_scheduler", False)

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether a loader's last batch ends the window."""
        return self.plugin_kwargs.get("sync_with_dataloader", True)

    @property
    def sync_each_batch(self) -> bool:
        """Whether gradients are reduced after every batch."""
        return self.plugin_kwargs.get("sync_each_batch", False)

    @property
    def is_xla_gradients_synced(self) -> bool:
        """Whether gradients were reduced by an XLA step already."""
        return self._is_xla_gradients_synced

    @is_xla_gradients_synced.setter
    def is_xla_gradients_synced(self, value: bool) -> None:
        self._is_xla_gradients_synced = value

    @property
    def dataloader_references(self) -> list[Any]:
        """The prepared loaders being iterated, outermost first, after a leading `None`."""
        return [None if reference is None else reference() for reference in self._loaders]

    @dataloader_references.setter
    def dataloader_references(self, references: list[Any]) -> None:
        self._loaders = [None if loader is None else weakref.ref(loader) for loader in references]

    @property
    def active_dataloader(self) -> Any:
        """The innermost prepared loader being iterated; if none is, one whose loop was broken off last; or `None`."""
        reference = self._loaders[-1]
        loader = None if reference is None else reference()
        if loader is None or not _is_left(loader):
            return loader
        running = (item for item in reversed(self.dataloader_references) if item is not None and not _is_left(item))
        return next(running, loader)

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def is_in_loop(self) -> bool:
        """Whether a loop over a prepared loader runs, and was not broken off."""
        loader = self.active_dataloader
        return loader is not None and not _is_left(loader)

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the innermost loader has just given its last batch."""
        loader = self.active_dataloader
        return False if loader is None else loader.end_of_dataloader

    @property
    def batches_ahead(self) -> int | None:
        """How many batches the innermost loader gives after this one; `None` if unknown."""
        ask = getattr(self.active_dataloader, "batches_ahead", None)  # clients register loaders of their own too
        return None if ask is None else ask()

    @property
    def remainder(self) -> int:
        """Number of real samples in the last global batch when it is short; -1 when unknown, 0 when it is full."""
        loader = self.active_dataloader
        return -1 if loader is None else loader.remainder

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        self.sync_gradients = sync_gradients

    def _add_dataloader(self, dataloader: Any) -> None:
        self._loaders.append(weakref.ref(dataloader))

    def _remove_dataloader(self, dataloader: Any) -> None:
        # From the innermost on: the same loader may be iterated twice, nested.
        for place in range(len(self._loaders) - 1, 0, -1):
            reference = self._loaders[place]
            if reference is not None and reference() in (dataloader, None):
                del self._loaders[place]
                if reference() is dataloader:
                    return

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Forget everything; instances share this dictionary, so it is emptied in place."""
        GradientState._shared_state.clear()


def _is_left(loader: Any) -> bool:
    """Tell whether the loop over a loader was broken off; it stays among the active ones until it begins again."""
    return bool(getattr(loader, "_left_early", 0))  # clients register loaders of their own too
