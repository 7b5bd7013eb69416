from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.batch_size import CLOSE_ENOUGH, allowed, next_to_probe


def search(start: int, limit: int, whole: int | None = None) -> tuple[int, list[int]]:
    """Return what the search finds where sizes up to `limit` fit, and what it probed."""
    fits, too_large, probed = 0, None, []
    while (size := next_to_probe(start, fits, too_large, whole)) is not None:
        probed.append(size)
        fits, too_large = (size, too_large) if size <= limit else (fits, size)
    return fits, probed


def test_a_size_that_fits_at_once_is_taken():
    assert search(128, 128) == (128, [128])


def test_down_by_halves_then_up_and_down():
    assert search(128, 100) == (100, [128, 64, 96, 112, 104, 100])
    assert search(128, 9) == (9, [128, 64, 32, 16, 8, 12, 10, 9])


def test_nothing_fits():
    assert search(8, 0) == (0, [8, 4, 2, 1])


def test_sizes_divide_the_whole():
    assert search(128, 100, whole=128) == (64, [128, 64])
    assert search(48, 20, whole=144) == (18, [48, 24, 12, 18])


@pytest.mark.parametrize(
    ("size", "whole", "found"), [(7, None, 7), (0, None, 0), (-3, 12, 0), (7, 12, 6), (50, 12, 12), (5, 7, 1)]
)
def test_allowed(size: int, whole: int | None, found: int):
    assert allowed(size, whole) == found


@given(st.integers(1, 600), st.integers(0, 600), st.sampled_from([None, 1, 2, 3]))
def test_the_search_ends_close_below_the_limit(start: int, limit: int, steps: int | None):
    whole = None if steps is None else start * steps
    found, probed = search(start, limit, whole)
    assert len(probed) == len(set(probed)) <= 20
    assert all(1 <= size <= start for size in probed)
    best = max((size for size in range(1, min(start, limit) + 1) if whole is None or whole % size == 0), default=0)
    assert found <= best
    assert found >= best - max(1, found // CLOSE_ENOUGH) + 1 or found == best
    if whole is not None:
        assert all(whole % size == 0 for size in probed)
