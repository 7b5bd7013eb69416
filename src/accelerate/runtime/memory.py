"""Memory: giving it back, and finding the batch size that fits."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

from ..core.errors import WrongTypeError, explain
from . import state


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
) -> Callable[..., Any]:
    """Decorate a function to run with the largest batch size that fits in memory.

    The function gets the batch size as its first argument. When it runs out of memory, it is called again with a
    smaller one. Every rank decides for itself.

    Args:
        function: Takes `batch_size` first.
        starting_batch_size: The first to try.
        reduce_batch_size_fn: Returns the next to try; `None` multiplies by 0.9.

    Raises:
        RuntimeError: When called, if no batch size above 0 fits.
        WrongTypeError: (a `TypeError`) when called with the batch size itself.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    decorated = function

    @functools.wraps(decorated)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        batch_size = starting_batch_size
        clear_device_cache(garbage_collection=True)
        parameters = list(inspect.signature(decorated).parameters)
        if len(parameters) < len(args) + 1:
            call = ", ".join(f"{name}={value!r:.40}" for name, value in zip(parameters[1:], args[1:], strict=False))
            raise WrongTypeError(
                explain(
                    f"{decorated.__name__} was called with its batch size, which the decorator passes.",
                    remedy=f"Call it without: {decorated.__name__}({call})",
                )
            )
        while batch_size > 0:
            try:
                return decorated(batch_size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            batch_size = int(batch_size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise RuntimeError("No executable batch size found, reached zero.")

    return wrapper
