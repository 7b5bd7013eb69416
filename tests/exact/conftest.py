"""Counts what the suite has shown, and says so at the end."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

_COUNTS: Counter[str] = Counter()
_started = time.monotonic()


@pytest.fixture
def tally() -> Counter[str]:
    """Counts cells, and runs that were resumed."""
    return _COUNTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _COUNTS:
        counts = ", ".join(f"{number:,} {what}" for what, number in _COUNTS.items())
        terminalreporter.write_line(f"exactness: {counts}, in {time.monotonic() - _started:.0f} s")
