"""Counts what the suite has shown, and says so at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

_COUNTS: Counter[str] = Counter()
_seconds = 0.0


@pytest.fixture
def tally() -> Iterator[Counter[str]]:
    """Counts cells, and runs that were resumed, and the time of the tests that count."""
    global _seconds
    began = time.monotonic()
    yield _COUNTS
    _seconds += time.monotonic() - began


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _COUNTS:
        counts = ", ".join(f"{number:,} {what}" for what, number in _COUNTS.items())
        terminalreporter.write_line(f"exactness: {counts}, in {_seconds:.0f} s")
