"""What the peer was observed to do, as tables for tests. Differences on purpose stand in the tests, with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OBSERVED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "observed_behaviours.json").read_text())


def on(processes: int, row: Any) -> Any:
    """Return a row's observation on so many processes."""
    return row[f"P{processes}"] if isinstance(row, dict) and "P1" in row else row
