"""The loop over a prepared loader, as accumulation, metrics and checkpoints see it.

Owns which loops run, in which other loops they are, and what is known of the batch given last. Never reads a sample: the
loaders do, and say here what they gave.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..core.errors import CheckpointError, explain
from ..runtime import resuming
from ..runtime.accumulation import GradientState
from .position import Bookmark, Place, Position
from .reader import Reader
from .shards import Padding


class DataLoaderStateMixin:
    """What accumulation, metrics and checkpoints read from the loader a loop runs over.

    `end_of_dataloader` is true during the last batch. `remainder` is the number of real samples in the last global
    batch: 0 when it is full, -1 when that is not known.
    """

    end_of_dataloader = False
    remainder = -1
    gradient_state: GradientState
    global_batch: Any = None
    """How batches make up global ones, where their size is set."""
    lacks_global_batch: int | None = None
    """The global batch size that is set, where this loader's batches cannot make it up."""
    shard_index = 0
    """Which data shard this process reads."""
    shard_count = 1
    looks_ahead = False
    """Whether it finds out by itself which batch is the last."""
    reads_per_step = 1
    """How many batches are read for one step."""
    _mark: Bookmark
    _reader: Reader
    _left_early = 0
    _loops_around: dict[int, int]
    """How many batches each loader that was iterated had given when `iter` was called for this pass, by identity."""
    _loops_beside: dict[int, int]
    """The loaders that went on during this loader's last pass, by identity, with the beginning of their pass then."""
    _began_alone = True
    """Whether no other loop ran when the last pass began."""
    pass_began = 0
    """How many batches the loader had given in all when its pass began."""

    @property
    def iteration(self) -> int:
        """The number of the pass that runs, or comes next. Loaders that `skip_first_batches` returns share it."""
        return self._mark.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._mark.iteration = value

    @property
    def padding(self) -> Padding | None:
        """What each data shard got in the step of the last batch, where that was not the same for all."""
        return self._mark.padding

    @padding.setter
    def padding(self, value: Padding | None) -> None:
        self._mark.padding = value

    @property
    def steps_given(self) -> int:
        """How many batches the loader has given in all its passes."""
        return self._mark.steps_given

    @steps_given.setter
    def steps_given(self, value: int) -> None:
        self._mark.steps_given = value

    @property
    def position(self) -> Position:
        """Where outer loops start: after `load_state` where the run was, else where the loader is."""
        resuming.check("The position of a loader was read")
        epoch, place, done = self._mark.now()
        return Position(epoch, *((0, 0) if place is None else self._reader.progress(place, done)))

    def steps_of(self, batches: int) -> int:
        """Return how many steps are made of so many batches of the source."""
        return batches

    def batches_ahead(self) -> int | None:
        """Return how many batches of the pass follow the one given last; `None` if that is not known."""
        return 0 if self.end_of_dataloader else None

    def reset(self) -> None:
        """Forget what is known of the last batch."""
        self.end_of_dataloader = False
        self.remainder = -1
        self._mark.padding = None

    def look_around(self) -> None:
        """Take note, when `iter` is called, in which loops this is; one beside it before in its pass is not among them.

        `zip(first, second)` calls it for both before either has given a batch, a loop inside a loop after the outer one
        has given one, which stays its last while the inner goes on.
        """
        self._loops_around = {
            id(loader): getattr(loader, "steps_given", 0)
            for loader in self.gradient_state.dataloader_references
            if loader not in (None, self) and self._loops_beside.get(id(loader), -1) != getattr(loader, "pass_began", 0)
        }

    def is_inside(self, loader: Any) -> bool:
        """Tell whether this pass was begun inside the loop over `loader`, in its present step."""
        return self._loops_around.get(id(loader)) == getattr(loader, "steps_given", 0)

    def begin(self) -> None:
        """Start a pass: this is the innermost loader now."""
        for _ in range(self._left_early):  # a pass that was broken off left it among the active ones
            self.gradient_state._remove_dataloader(self)
        self._left_early = 0
        self.reset()
        self.remainder = self._expected_remainder()
        self.pass_began = self.steps_given
        running = [loader for loader in self.gradient_state.dataloader_references if loader not in (None, self)]
        self._began_alone = all(getattr(loader, "_left_early", 0) for loader in running)
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """End a pass: the loader around this one, if any, is the innermost again."""
        self.gradient_state._remove_dataloader(self)
        self._loops_beside = {
            id(loader): getattr(loader, "pass_began", 0)
            for loader in self.gradient_state.dataloader_references
            if loader is not None and loader is not self and not self.is_inside(loader)
        }
        self.reset()

    def leave(self) -> None:
        """Take note that the loop was broken off; it stays among the active loaders until it begins again.

        A loop inside another one, such as an evaluation of some batches, begins anew after a resume as it does in this
        run; any other goes on where it was.
        """
        around = [loader for loader in self.gradient_state.dataloader_references if loader not in (None, self)]
        if any(self.is_inside(loader) and not getattr(loader, "_left_early", 0) for loader in around):
            self._mark.place = None
        self._left_early += 1
        self.end_of_dataloader = False
        self._mark.padding = None

    def _take_pending(self) -> tuple[Place | None, int]:
        """Return where the pass that begins now continues, and how often places were restored until then."""
        mark = self._mark
        if mark.pending is None and mark.place is not None and mark.continues and mark.given == 1 and self._began_alone:
            warnings.warn(
                f"{type(self).__name__} begins epoch {mark.iteration} anew, and was to continue in the middle of it: a "
                "loop that began where load_state left it was left after one batch. To look at a batch without using "
                "up the place, do it before load_state.",
                stacklevel=4,
            )
        pending, mark.pending = mark.pending, None
        mark.continues = pending is not None
        return pending, mark.loads

    def _check_loads(self, loads: int) -> None:
        if self._mark.loads != loads:
            raise CheckpointError(
                explain(
                    "load_state was called inside a loop over a loader that it put back: this loop would go on where it "
                    "was, and the samples that were put back would be left out.",
                    accepted="load_state outside of loops over prepared loaders, or followed by leaving the loop",
                    remedy="Break out of the loop after load_state, and begin it again.",
                )
            )

    def _expected_remainder(self) -> int:
        return -1
