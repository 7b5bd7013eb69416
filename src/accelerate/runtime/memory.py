"""Memory: giving it back, and finding the batch size that fits."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.errors import SettingError, WrongTypeError, explain
from . import state
from .attempts import Attempts, Verdict
from .batch_size import allowed, next_to_probe

logger = logging.getLogger(__name__)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give the device's cached memory back; collect garbage first if asked."""
    if garbage_collection:
        gc.collect()
    state.current_or_single().hardware.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Return as many `None` as there are arguments, and free what nobody else holds.

    Example:
        ```python
        model, optimizer = release_memory(model, optimizer)
        ```
    """
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Tell whether an exception is the device, or the CPU, running out of memory."""
    return state.current_or_single().hardware.is_out_of_memory(exception)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
    *,
    agree: bool = True,
    probe: Callable[..., Any] | None = None,
    accelerator: Any = None,
    keep_global_batch: bool = False,
) -> Callable[..., Any]:
    """Decorate a function to run with the largest batch size that fits in memory.

    The function gets the batch size as its first argument. When it runs out of memory, it is called again with a
    smaller one, and the main process logs a warning with both sizes. Models, optimizers and loaders are to be made and
    prepared inside the function, and gone when it ends. Random states are put back before each further attempt, so the
    run that fits is the one that this size would have given at once.

    With several processes the decorated function is called on all ranks; it is collective. When one rank runs out, the
    others are released from the collective they wait in, all make the process group anew and go on with one size, the
    smallest that any rank proposes. Process groups and device meshes made before have to be made again. It returns
    once all ranks have finished.
    Groups of other backends than gloo, such as NCCL, cannot be left in the middle of a collective: there the ranks go
    on if all ran out at the same place, and otherwise a `RuntimeError` says which one did, within about a minute.

    Args:
        function: Takes `batch_size` first.
        starting_batch_size: The first to try, and the largest.
        reduce_batch_size_fn: Returns the next to try; `None` multiplies by 0.9.
        agree: Find one size for all processes. `False` lets each decide by itself, which suits functions that some
            ranks call alone and in which ranks do not talk to each other.
        probe: Does just enough to show whether a batch size fits, such as two steps; called like the function. With it
            the largest size that fits is first searched by halving and bisection, up and down, to within a sixteenth;
            the function then runs once. What the probe returns is dropped.
        accelerator: Forgets what was prepared (`free_memory()`) before each further attempt. Otherwise the function
            has to call that first, or what it prepared before stays in memory.
        keep_global_batch: Raise `accelerator.gradient_accumulation_steps` as the batch size shrinks, so that both
            multiplied stay the same; tries only sizes for which that is possible. Applies while the function runs.

    Raises:
        RuntimeError: When called, if no batch size above 0 fits, or another rank failed.
        SettingError: (a `ValueError`) if two of the options contradict each other.
        WrongTypeError: (a `TypeError`) when called with the batch size itself.

    Example:
        ```python
        @find_executable_batch_size(starting_batch_size=256, accelerator=accelerator, keep_global_batch=True)
        def train(batch_size):
            model, optimizer, loader = accelerator.prepare(*make(batch_size))
            ...

        train()
        ```
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
            agree=agree,
            probe=probe,
            accelerator=accelerator,
            keep_global_batch=keep_global_batch,
        )
    _check_options(reduce_batch_size_fn, probe, accelerator, keep_global_batch)
    decorated = function

    @functools.wraps(decorated)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        clear_device_cache(garbage_collection=True)
        _refuse_batch_size(decorated, args)
        attempts = Attempts(agree, _collect if accelerator is None else accelerator.free_memory)
        start = attempts.smallest(lambda: starting_batch_size)
        search = _Search(attempts, start, accelerator if keep_global_batch else None)
        try:
            size = start if probe is None else search.bisect(probe, args, kwargs)
            return search.shrink(decorated, args, kwargs, size, reduce_batch_size_fn)
        finally:
            search.end()

    return wrapper


class _Search:
    """The sizes of one call, from `start` down.

    Args:
        attempts: What tries them.
        start: The largest.
        accumulating: The accelerator that makes up for smaller sizes; `None` if nothing does.
    """

    def __init__(self, attempts: Attempts, start: int, accumulating: Any) -> None:
        self._attempts, self._start, self._accumulating = attempts, start, accumulating
        self._steps = 1 if accumulating is None else accumulating.gradient_accumulation_steps
        self._whole = None if accumulating is None else start * self._steps

    def bisect(self, probe: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Return the largest size with which `probe` runs, about; 0 if there is none."""
        fits, too_large = 0, None
        size = next_to_probe(self._start, fits, too_large, self._whole)
        while size is not None:
            verdict = self._attempt(probe, size, args, kwargs, keep=False)
            fits, too_large = (size, too_large) if verdict.fits else (fits, size)
            tried, size = size, next_to_probe(self._start, fits, too_large, self._whole)
            if not verdict.fits:
                self._tell(probe, tried, verdict, fits if size is None else size)
        return fits

    def shrink(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        size: int,
        propose: Callable[[], int] | None,
    ) -> Any:
        """Return what `function` gives with the first size it runs with, from `size` down.

        Raises:
            RuntimeError: If there is none.
        """
        while size > 0:
            verdict = self._attempt(function, size, args, kwargs, keep=True)
            if verdict.fits:
                return verdict.result
            tried, size = size, self._attempts.smallest(functools.partial(self._smaller, size, propose))
            self._tell(function, tried, verdict, size)
        raise RuntimeError("No executable batch size found, reached zero.")

    def end(self) -> None:
        """Put accumulation back."""
        if self._accumulating is not None:
            self._accumulating.gradient_accumulation_steps = self._steps

    def _attempt(
        self, function: Callable[..., Any], size: int, args: Sequence[Any], kwargs: Mapping[str, Any], *, keep: bool
    ) -> Verdict:
        if self._whole is not None:
            self._accumulating.gradient_accumulation_steps = self._whole // size
        return self._attempts.run(functools.partial(function, size, *args, **kwargs), keep=keep)

    def _smaller(self, size: int, propose: Callable[[], int] | None) -> int:
        return allowed(int(size * 0.9) if propose is None else propose(), self._whole)

    def _tell(self, function: Callable[..., Any], tried: int, verdict: Verdict, following: int) -> None:
        together = self._attempts.together
        if together and state.current().process.rank != 0:
            return
        where = f" on process {', '.join(map(str, verdict.ran_out))}" if together else ""
        then = f"The next is {following}" if following else "There is no smaller one"
        if following and self._whole is not None:
            then += f", accumulated {self._whole // following} times"
        name = getattr(function, "__name__", repr(function))
        logger.warning("%s: batch size %d ran out of memory%s (%s). %s.", name, tried, where, verdict.why, then)


def _collect() -> None:
    clear_device_cache(garbage_collection=True)


def _check_options(propose: Any, probe: Any, accelerator: Any, keep_global_batch: bool) -> None:
    if probe is not None and propose is not None:
        raise SettingError(
            explain(
                "find_executable_batch_size got probe and reduce_batch_size_fn, which both say what to try next.",
                accepted="one of them",
                remedy="Leave out reduce_batch_size_fn: with a probe the sizes are found by bisection.",
            )
        )
    if not keep_global_batch:
        return
    if accelerator is None:
        raise SettingError(
            explain(
                "find_executable_batch_size(keep_global_batch=True) got no accelerator, whose accumulation it raises.",
                remedy="Pass accelerator=... too, and use the same one inside the function.",
            )
        )
    size = accelerator.dataloader_config.global_batch_size
    if size is not None:
        raise SettingError(
            explain(
                f"keep_global_batch=True and DataLoaderConfiguration(global_batch_size={size}) both set accumulation.",
                accepted="one of them",
                remedy="Leave out keep_global_batch: prepare() keeps global_batch_size with any batch size.",
            )
        )


def _refuse_batch_size(function: Callable[..., Any], args: Sequence[Any]) -> None:
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = inspect.signature(function).parameters.values()
    parameters = [parameter.name for parameter in taken if parameter.kind in by_place]
    if len(parameters) >= len(args) + 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in taken):
        return
    call = ", ".join(f"{name}={value!r:.40}" for name, value in zip(parameters[1:], args[1:], strict=False))
    raise WrongTypeError(
        explain(
            f"{function.__name__} was called with its batch size, which the decorator passes.",
            remedy=f"Call it without: {function.__name__}({call})",
        )
    )
