"""The windows of accumulation of a run: one for each set of models, each with a counter of its own.

Owns which window a batch belongs to, and brings its loss into the gradients with the weight that `stepping.window`
works out. When gradients are reduced is the strategy's business; when optimizers step, the optimizers'.

[Note: outside a region]
Code that sets `sync_gradients` by hand calls `backward` outside of `accumulate`. How many batches its windows will have
nobody says, so its losses are divided by the number of steps, as ever; with `num_items`, or over a loader with a global
batch size, they are weighted as in a region. A window goes on until a `backward` while gradients synchronise; where they
always do, each `backward` is a window.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from ..core.errors import SettingError, explain
from ..runtime import preemption
from ..runtime.accumulation import GradientState
from ..runtime.state import Runtime
from ..settings.arguments import whole_number
from .calls import Calls
from .gradients import left_out, pack, put_back, rescale
from .reach import everything, reached
from .samples import batch_of, refuse_loop, refuse_parts, samples_of_step
from .scaling import LossScaling
from .tally import ITEMS, Window, count_items, reference_to
from .window import Place, Share, next_place, share_of


class Region:
    """What `accumulate` returns: one batch of a window."""

    __slots__ = ("_before", "_inner", "_window", "_windows")

    def __init__(self, windows: Windows, window: Window, inner: AbstractContextManager[Any] | None) -> None:
        self._windows = windows
        self._window = window
        self._inner = inner
        self._before: Window | None = None

    def __enter__(self) -> None:
        before = self._windows.current
        if before is not None:
            _check_nested(before, self._window)
        self._before, self._windows.current = before, self._window
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._windows.current = self._before
        if self._inner is not None:
            self._inner.__exit__(kind, error, traceback)


class Windows:
    """All windows of a run.

    Args:
        runtime: Ranks and device.
        models: The prepared models without wrappers, a live list.
        optimizers: The prepared optimizers, a live list.
        scaling: The loss scaling of fp16.
        no_sync: Returns a region in which backward keeps gradients on this rank; refuses models that were not prepared.
        inner: Returns the model inside of wrappers.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        scaling: LossScaling | None,
        *,
        no_sync: Callable[[tuple[Any, ...]], AbstractContextManager[Any]],
        inner: Callable[[Any], Any],
    ) -> None:
        self._runtime = runtime
        self._models = models
        self._optimizers = optimizers
        self._scaling = scaling
        self._no_sync = no_sync
        self._inner = inner
        self._alone = runtime.process.world_size == 1
        self._state = GradientState()
        self.forget()
        if scaling is not None:
            scaling.pending = self._pending_parameters

    def forget(self) -> None:
        """Begin anew."""
        self._windows: dict[frozenset[int], Window] = {}
        self._outside = Window()
        self._last: Window | None = None
        self._first_step = 0
        self._clock = 0
        self.current: Window | None = None
        """The window of the region that runs."""

    @property
    def step(self) -> int:
        """The counter of the window that had a batch last."""
        return self._first_step if self._last is None else self._last.place.step

    @step.setter
    def step(self, step: int) -> None:
        if self._last is None:
            self._first_step = step
        else:
            place = self._last.place
            self._last.place = Place(step, place.number, place.length, place.is_last)

    # Batches -----------------------------------------------------------------------------------------------------

    def begin(self, models: tuple[Any, ...], num_steps: int | None = None) -> Region:
        """Count a batch of these models' window; return the region for it.

        Args:
            models: The models trained in the region, as `prepare` returned them.
            num_steps: Length of their windows; `None` means the run's.
        """
        # What is asked of each batch stands here in one piece: each call of a function costs as much as all it does.
        state, window = self._state, self._last
        loader, plan, batch = state.active_dataloader, None, None
        if loader is not None:
            plan = getattr(loader, "global_batch", None)  # loaders of others may be among the active ones
            if plan is None:
                _check_trains(loader)
            batch = batch_of(loader)
        if num_steps is not None:
            steps = whole_number(num_steps, "num_steps (in accumulate)")
        else:
            steps = state.plugin_kwargs.get("num_steps", 1) if plan is None else plan.accumulation
        if window is None or len(models) != 1 or window.given() is not models[0]:
            window = self._find(models)
        before = window.place
        self._clock = window.used = self._clock + 1
        if before.is_last:
            window.restart()
            window.began = window.used
        if plan is not None or window.is_moved:
            before = self._place_before(window, plan, steps)
        calls = window.calls
        is_first = calls.count(batch)
        if plan is not None and num_steps is None and steps > 1 and not is_first:
            refuse_parts(plan)
        ends, ahead = False, None
        if loader is not None and state.sync_with_dataloader:
            ends = calls.ends(is_first, not before.is_last, self._is_at_end(loader), steps)
            if before.is_last and steps > 1:  # where a longer window begins only: a loader may have to look it up
                ahead = calls.ahead(state.batches_ahead)
        calls.is_cut = ends and (before.step + 1) % steps != 0
        place = next_place(before, steps, ends=ends, ahead=ahead)
        local = None if self._alone or place.is_last or state.sync_each_batch else self._no_sync(models)
        if plan is None:
            window.batch = None
        else:
            self._count_samples(window, loader, plan)
        window.place, self._last = place, window
        state.window, state.sync_gradients = (place.number, steps), place.is_last
        return Region(self, window, local)

    def _use(self, window: Window, *, anew: bool) -> None:
        self._clock += 1
        if anew:
            window.restart()
            window.began = self._clock
        window.used = self._clock

    def _is_at_end(self, loader: Any) -> bool:
        # Ranks that are done contribute nothing more, so what they have has to go with this step.
        return loader.end_of_dataloader or getattr(loader, "is_last_for_some", False)

    def _place_before(self, window: Window, plan: Any, steps: int) -> Place:
        """Return where a window stands before the batch that comes now."""
        is_moved, window.is_moved = window.is_moved, False
        if plan is None:
            return window.place
        if window.place.is_last:
            return Place()  # the loader says how long a window is: what was counted in windows of another is no help
        return self._place_among_samples(window, plan, steps) if is_moved else window.place

    def _count_samples(self, window: Window, loader: Any, plan: Any) -> None:
        if plan is None:
            window.batch = None
            return
        own, everyone = samples_of_step(loader, plan.batch_size, plan.count)
        window.batch = own, plan.batch_size, plan.count
        window.total += everyone

    def _place_among_samples(self, window: Window, plan: Any, steps: int) -> Place:
        """Return where a window stands that other ranks began with batches of another size."""
        done, rest = divmod(window.total, plan.batch_size * plan.count)
        if rest and self._runtime.process.rank == 0:
            warnings.warn(
                f"The checkpoint was saved {window.total} samples into a global batch of {plan.size}, and {plan.count} "
                f"processes with batches of {plan.batch_size} cannot complete that exactly: the first optimizer step takes "
                f"{window.total + (steps - done) * plan.batch_size * plan.count} samples. Each counts alike.",
                stacklevel=6,
            )
        return Place(done, done, steps, is_last=False)

    def _find(self, models: tuple[Any, ...]) -> Window:
        inner = [self._inner(model) for model in models]
        key = frozenset(map(id, inner))
        window = self._windows.get(key)
        if window is None or None in (window.models or ()):
            for old in [old for old, other in self._windows.items() if None in (other.models or ())]:
                del self._windows[old]  # its models are gone, and others may have their places in memory
            window = self._windows[key] = Window(inner)
            if self._last is None:
                window.place = Place(step=self._first_step)
        if len(models) == 1:
            window.given = reference_to(models[0])
        return window

    # Backward ----------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, num_items: Any = None, **kwargs: Any) -> None:
        """Bring a loss into the gradients; see `Accelerator.backward`."""
        window, divisor = self.current, None
        if num_items is None:
            divisor = self._divisor_outside() if window is None else window.divisor()
        if divisor is not None:
            self._run(loss if divisor == 1 else loss / divisor, kwargs)
            if window is not None:
                window.is_pending = not window.place.is_last
            return
        window = window or self._begin_outside(by_items=num_items is not None)
        if num_items is not None:
            share = self._share_of_items(window, num_items)
        elif window is self._outside and window.batch is None:
            share = window.share_of_steps(window.place.length)
        else:
            share = window.share()
        if share.rescale != 1.0:
            rescale(self._parameters(window), share.rescale)
        window.reference = share.reference
        if share.divisor is not None:
            self._run(loss if share.divisor == 1 else loss / share.divisor, kwargs)
        elif window.place.is_last or (self._state.sync_each_batch and not self._alone):
            with left_out(everything(self._models, self._optimizers).values()):
                self._run(loss, kwargs)
        window.is_pending = not window.place.is_last

    def _run(self, loss: torch.Tensor, kwargs: dict[str, Any]) -> None:
        preemption.note_work()
        if self._scaling is not None:
            loss = self._scaling.scale(loss)
        loss.backward(**kwargs)

    def _divisor_outside(self) -> int | None:
        """Return by what to divide a loss outside of regions that is a window by itself; `None` if it may not be."""
        outside, state = self._outside, self._state
        loader = state.active_dataloader
        if outside.is_pending or not state.sync_gradients or getattr(loader, "global_batch", None) is not None:
            return None
        _check_trains(loader)
        self._clock += 1
        outside.used = outside.began = self._clock
        return state.plugin_kwargs.get("num_steps", 1)

    def _begin_outside(self, *, by_items: bool) -> Window:
        """Return the window of losses outside of regions, with this one counted; see [Note: outside a region]."""
        window, state = self._outside, self._state
        loader = state.active_dataloader
        plan = getattr(loader, "global_batch", None)
        if plan is None:
            _check_trains(loader)
        is_first = window.calls.count(None if plan is None else batch_of(loader))
        is_new = not window.is_pending and (is_first or by_items)
        self._use(window, anew=is_new)
        number = window.place.number
        if is_first:
            number = 1 if is_new else self._place_before(window, plan, state.num_steps).number + 1
        window.place = Place(0, number, state.num_steps, state.sync_gradients)
        if is_first or is_new:
            self._count_samples(window, loader, plan)
        if plan is not None and state.sync_gradients and number != plan.accumulation and not self._is_at_end(loader):
            refuse_loop(plan, number)
        return window

    def _share_of_items(self, window: Window, num_items: Any) -> Share:
        count = count_items(num_items)
        window.enter(ITEMS)
        if window.batch is not None and not window.batch[0]:
            count = 0  # this rank's batch is padding
        window.own += count
        if window.place.is_last or self._state.sync_each_batch:
            target = self._mean(window.own)
        else:
            target = window.reference or count * window.place.length
        return share_of(count, window.reference, target)

    def _mean(self, number: int) -> float:
        if self._alone:
            return number
        total = torch.tensor(number, dtype=torch.int64, device=self._runtime.device)
        return self._runtime.collectives.all_reduce(total).item() / self._runtime.process.world_size

    # Parameters --------------------------------------------------------------------------------------------------

    def _parameters(self, window: Window) -> list[torch.Tensor]:
        return reached(window, self._all(), self._models, self._optimizers)

    def _all(self) -> list[Window]:
        return [*self._windows.values(), self._outside]

    def _open(self) -> list[Window]:
        return [window for window in self._all() if window.is_pending]

    def _pending_parameters(self) -> list[torch.Tensor]:
        return list({id(item): item for window in self._open() for item in self._parameters(window)}.values())

    def closed(self, optimizers: Iterable[Any]) -> list[Any]:
        """Return those of the optimizers whose gradients are not in the middle of a window."""
        waiting = {id(parameter) for parameter in self._pending_parameters()}
        return [
            optimizer
            for optimizer in optimizers
            if not any(id(item) in waiting for group in optimizer.param_groups for item in group["params"])
        ]

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]] | None:
        """Return counters and accumulated gradients; `None` if `step` says everything."""
        known: list[tuple[Window, list[int] | None]] = [
            (window, [self._index(model) for model in window.models or ()]) for window in self._windows.values()
        ]
        kept = [(window, indices) for window, indices in known if -1 not in (indices or ())]
        if self._outside.is_pending:
            kept.append((self._outside, None))
        if len(kept) < 2 and not any(
            not window.place.is_last or window.is_pending or window.calls.usual > 1 for window, _ in kept
        ):
            return None
        return [self._window_state(window, indices) for window, indices in kept]

    def _window_state(self, window: Window, indices: list[int] | None) -> dict[str, Any]:
        place = window.place
        return {
            "models": indices,
            "is_last_used": window is self._last,
            "step": place.step,
            "number": place.number,
            "length": place.length,
            "is_last": place.is_last,
            "measure": window.measure,
            "reference": window.reference,
            "own": window.own,
            "total": window.total,
            "calls": window.calls.usual,
            "gradients": self._gradients(window) if window.is_pending else {},
        }

    def load_state_dict(self, saved: Iterable[dict[str, Any]] | None, step: int) -> None:
        """Go on with the windows that `state_dict` returned, in place of those that are open.

        Args:
            saved: The windows, if there were any to save.
            step: The counter that goes on where they do not say.

        Raises:
            CheckpointError: If gradients do not fit the parameters.
        """
        for parameter in self._pending_parameters():
            parameter.grad = None
        self.forget()
        self._first_step = step
        for state in saved or ():
            indices = state["models"]
            if indices and max(indices) >= len(self._models):
                continue  # a model that is not loaded here
            window = self._outside if indices is None else self._find(tuple(self._models[index] for index in indices))
            window.place = Place(state["step"], state["number"], state["length"], state["is_last"])
            window.measure, window.reference = state["measure"], state["reference"]
            window.own, window.total = state["own"], state["total"]
            window.is_moved = state.get("is_moved", False)
            window.calls = Calls(state.get("calls"))
            window.is_pending = not window.place.is_last
            if state["is_last_used"]:
                self._last = window
            if self._optimizers:  # or the run only evaluates
                self._put_back(state["gradients"])

    def _gradients(self, window: Window) -> dict[str, dict[str, Any]]:
        wanted = {id(parameter) for parameter in self._parameters(window)}
        found: dict[str, dict[str, Any]] = {}
        for owner, named in self._named().items():
            held = {
                name: pack(item.grad) for name, item in named.items() if id(item) in wanted and item.grad is not None
            }
            wanted.difference_update(map(id, named.values()))
            if held:
                found[owner] = held
        return found

    def _put_back(self, gradients: dict[str, dict[str, Any]]) -> None:
        named = self._named()
        for owner, packed in gradients.items():
            put_back(named.get(owner, {}), packed, owner)

    def _named(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return all parameters by owner and name; one that optimizers share with a model is found at the model first."""
        found: dict[str, Mapping[str, torch.Tensor]] = {
            f"model {index}": dict(model.named_parameters()) for index, model in enumerate(self._models)
        }
        for index, optimizer in enumerate(self._optimizers):
            held = [item for group in optimizer.param_groups for item in group["params"]]
            found[f"optimizer {index}"] = {str(number): item for number, item in enumerate(held)}
        return found

    def _index(self, model: Any) -> int:
        return next((index for index, item in enumerate(self._models) if item is model), -1)


def _check_trains(loader: Any) -> None:
    """Refuse to train on a loader that `prepare` said is for evaluation only."""
    size = getattr(loader, "lacks_global_batch", None)
    if size is not None:
        raise SettingError(
            explain(
                f"global_batch_size={size} (from DataLoaderConfiguration), and the loop that runs, or was broken off last, is "
                "over a loader whose batches cannot make it up: it is for evaluation only.",
                accepted="training on DataLoaders made with batch_size",
                remedy="Give the DataLoader a sampler in place of a batch sampler, or leave global_batch_size out and "
                "choose gradient_accumulation_steps.",
            )
        )


def _check_nested(outer: Window, inner: Window) -> None:
    """Refuse a region in a region, unless each is all of its window.

    Raises:
        SettingError: (a `ValueError`) if a loss in both would have to count for two windows at once.
    """
    if all(window.place.is_last and window.place.number == 1 for window in (outer, inner)):
        return
    raise SettingError(
        explain(
            "A region of accumulate() was opened inside another one: a loss in both would belong to two windows.",
            accepted="one region at a time",
            remedy="Pass all models that are trained by one loss to one region: accelerator.accumulate(first, second).",
        )
    )
