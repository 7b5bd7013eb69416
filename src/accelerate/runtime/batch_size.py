"""Which batch size to try next.

Pure arithmetic: knows neither memory nor ranks.
"""

from __future__ import annotations

CLOSE_ENOUGH = 16
"""Bisection stops when the sizes between the largest that fits and the smallest that does not are this part of it."""


def allowed(size: int, whole: int | None) -> int:
    """Return the largest batch size up to `size` that divides `whole`; `size` itself if there is no `whole`.

    Returns:
        A size of at least 1, or 0 if `size` is smaller than that.
    """
    if size < 1:
        return 0
    if whole is None:
        return size
    return next(divisor for divisor in range(min(size, whole), 0, -1) if whole % divisor == 0)


def next_to_probe(start: int, fits: int, too_large: int | None, whole: int | None) -> int | None:
    """Return the batch size to probe next, or `None` when the search is over and `fits` is its result.

    From `start` down by halves until one fits, then by bisection up and down.

    Args:
        start: The largest to probe.
        fits: The largest known to fit; 0 if none is known.
        too_large: The smallest known not to fit; `None` if none is known.
        whole: What sizes must divide, if anything.
    """
    if too_large is None:
        return allowed(start, whole) if fits == 0 else None
    if fits == 0:
        return allowed(too_large // 2, whole) or None
    if too_large - fits <= max(1, fits // CLOSE_ENOUGH):
        return None
    between = [size for size in range(fits + 1, too_large) if whole is None or whole % size == 0]
    middle = (fits + too_large) // 2
    return min(between, key=lambda size: abs(size - middle), default=None)
