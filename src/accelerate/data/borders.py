"""The places in loops over prepared loaders at which a run can be saved and goes on exactly.

Owns which ones they are; what happens there is up to `runtime.preemption`.

[Note: where a run can be saved] A resumed script begins its loops anew, and loaders continue behind the batch that they
gave last. So the body of that batch must be done, and nothing else be under way that the script would not repeat:

- between two batches of a loop that trains, which is when the second one is asked for: not after the last one, since
  what the script does at the end of an epoch (a schedule, an evaluation) is still to come;
- before the first batch of a loop that is known to train;
- not inside another loop, whose body would be left half done. Of loops side by side, as in `zip(a, b)`, it is the one
  that gives its batch first: nothing has been trained since when the others are asked;
- not in an evaluation: the run goes on to the next place in training.

A loop trains if gradients are computed or an optimizer steps in it. In a run without optimizers no loop does, and
each place between two batches counts, in a loop that is alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..runtime import preemption, resuming
from ..runtime.accumulation import GradientState
from ..runtime.preemption import Watch


def before_pass(loader: Any) -> Watch | None:
    """Note that a pass over `loader` is to begin. Called before anything of it is read, or any place taken.

    Returns:
        What to tell of the batches; `None` if the run does not save itself on signals.
    """
    resuming.check("A loop over a prepared loader began")
    watch, mark = preemption.current, loader._mark
    if watch is None:
        return None
    if mark.trains and not _running_beside(loader):
        # Passes that were broken off, this one's or those beside it as `zip` does, begin anew in a run that goes on.
        broken_off = {other: other.place for other in (mark, *_left_beside(loader)) if other.pending is None}
        for other in broken_off:
            other.place = None
        watch.reach()
        for other, place in broken_off.items():
            other.place = place
    mark.work = mark.work_before = watch.work
    mark.left_idle = False
    return watch


def give(loader: Any, watch: Watch) -> None:
    """Note that `loader` gives a batch now."""
    mark = loader._mark
    mark.work = watch.work
    if mark.finished and mark.trains:
        watch.near_end()


def after_body(loader: Any, watch: Watch) -> None:
    """Note that the body of the batch given last is done. The run may stop here."""
    mark = loader._mark
    trained = watch.work != mark.work
    if mark.finished or not (trained or not watch.trains()):
        mark.trains = mark.trains or trained
        return
    if len(loader.gradient_state._loaders) == 2 or _is_first(loader, watch):  # after a leading None
        mark.trains = True
        if not _ends_beside(loader):
            watch.reach()


def end(loader: Any, watch: Watch) -> None:
    """Note that the loop over `loader` has ended, or was broken off."""
    mark = loader._mark
    mark.left_idle = mark.work_before == watch.work
    if mark.trains and watch is preemption.current:
        watch.end()


def is_inside_a_step(watch: Watch) -> bool:
    """Tell whether a loop that trains has given a batch that nothing was trained on since.

    A run that is saved here would leave it out. A loop that continues where it was saved counts as one that trains.
    """
    return watch.trains() and any(
        (loader._mark.trains or loader._mark.continues) and loader._mark.work == watch.work
        for loader in _prepared(GradientState().dataloader_references)
        if not loader._left_early
    )


def forget_evaluations(loaders: Iterable[Any], watch: Watch) -> None:
    """Let loops in which nothing was trained begin at their start after a resume, as they do in a run that goes on."""
    for loader in loaders:
        mark = getattr(loader, "_mark", None)
        if mark is not None and (mark.left_idle or mark.work_before == watch.work):
            mark.place = None


def _is_first(loader: Any, watch: Watch) -> bool:
    return watch.trains() and all(
        not loader.is_inside(other) and other._mark.work != watch.work for other in _running_beside(loader)
    )


def _ends_beside(loader: Any) -> bool:
    """Tell whether a loader has given its last batch along with this one's: the loop over both is at its end."""
    return any(other._mark.finished and other._mark.work == loader._mark.work for other in _running_beside(loader))


def _running_beside(loader: Any) -> list[Any]:
    return [other for other in _others(loader) if not other._left_early]


def _left_beside(loader: Any) -> list[Any]:
    return [other._mark for other in _others(loader) if other._left_early]


def _others(loader: Any) -> list[Any]:
    return [other for other in _prepared(loader.gradient_state.dataloader_references) if other is not loader]


def _prepared(loaders: Iterable[Any]) -> list[Any]:
    return [loader for loader in loaders if hasattr(loader, "_mark")]
