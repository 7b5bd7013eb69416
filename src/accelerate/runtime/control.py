"""Which rank does what: run a function on some ranks, let one go first, split inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from ..collectives import Collectives
from ..core.errors import SettingError, WrongTypeError, explain


def only_if(condition: Callable[[], bool], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that it runs where `condition` holds when it is called, and returns `None` elsewhere."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if condition() else None

    return wrapper


@contextmanager
def goes_first(collectives: Collectives, is_first: bool) -> Iterator[None]:
    """Run the body on the first rank, then on the others. Called on all ranks; collective.

    The others are let go also if the first one's body raises, so that its error is what the user sees.
    """
    if not is_first:
        collectives.barrier()
    try:
        yield
    finally:
        if is_first:
            collectives.barrier()


def share_of(length: int, count: int, index: int) -> tuple[int, int]:
    """Return start and end of one of `count` contiguous shares; the first `length % count` get one more."""
    each, extra = divmod(length, count)
    start = index * each + min(index, extra)
    return start, start + each + (index < extra)


def split_inputs(inputs: Any, count: int, index: int, apply_padding: bool) -> Any:
    """Return one rank's share of the inputs, which stay as they are.

    Args:
        inputs: A list, tuple, tensor or `datasets.Dataset`, or a dictionary of them, all of one length. Anything
            else is returned whole.
        count: Number of ranks.
        index: This rank.
        apply_padding: Repeat the last element so that all shares are equally long.

    Raises:
        SettingError: (a `ValueError`) if the values of a dictionary differ in length.
    """
    if count == 1:
        return inputs
    if isinstance(inputs, dict):
        scalars = [key for key, value in inputs.items() if not hasattr(value, "__len__")]
        if scalars:
            raise WrongTypeError(
                explain(
                    f"split_between_processes got {scalars[0]!r}: {inputs[scalars[0]]!r:.60}, which has no length.",
                    accepted="a dictionary of lists, tuples or tensors of one length",
                    remedy="Take it out of the dictionary: every process has it anyway.",
                )
            )
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise SettingError(
                explain(
                    f"split_between_processes got values of different lengths: {lengths}.",
                    accepted="a dictionary whose values have one length",
                    remedy="Split them one after the other.",
                )
            )
        return {key: split_inputs(value, count, index, apply_padding) for key, value in inputs.items()}
    if _is_dataset(inputs):
        start, end = share_of(len(inputs), count, index)
        rows = list(range(start, end))
        if apply_padding:
            rows += [len(inputs) - 1] * (-(-len(inputs) // count) - len(rows))
        return inputs.select(rows)
    if not isinstance(inputs, (list, tuple, torch.Tensor)):
        return inputs
    start, end = share_of(len(inputs), count, index)
    return _padded(inputs, start, end, -(-len(inputs) // count)) if apply_padding else inputs[start:end]


def _padded(inputs: Any, start: int, end: int, size: int) -> Any:
    if isinstance(inputs, tuple):
        raise WrongTypeError(
            explain(
                "split_between_processes(apply_padding=True) got a tuple.",
                accepted="a list, a tensor or a dictionary of them",
                remedy="Pass list(...) of it.",
            )
        )
    if len(inputs) == 0:
        raise IndexError("split_between_processes(apply_padding=True) got nothing: there is no last element to repeat.")
    missing = size - (end - start)
    if isinstance(inputs, torch.Tensor):
        return torch.cat([inputs[start:end], *[inputs[-1:]] * missing]) if missing else inputs[start:end]
    return inputs[start:end] + [inputs[-1]] * missing


def _is_dataset(inputs: Any) -> bool:
    # By name: asking with isinstance would import an optional package.
    return any(
        f"{kind.__module__}.{kind.__name__}" == "datasets.arrow_dataset.Dataset" for kind in type(inputs).__mro__
    )
