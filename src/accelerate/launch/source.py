"""What one source says about a launch: a flag, a variable, the place, a file.

Owns what the stronger of two sources takes from the weaker. Pure.
"""

from __future__ import annotations

from typing import Any

Source = dict[str, tuple[Any, str]]
"""Setting -> its value, and where that came from."""

MACHINES = ("num_machines", "min_machines", "machine_rank", "main_process_ip", "main_process_port")
"""The settings that say which machines there are, and where they meet."""

_REPLACES: dict[str, tuple[str, ...]] = {
    "num_processes": ("processes_per_machine",),
    "processes_per_machine": ("num_processes",),
    "num_machines": ("min_machines",),
    "standalone": (*MACHINES, "rdzv_backend"),
}
"""Setting -> others that answer the same question."""


def over(weaker: Source, stronger: Source) -> Source:
    """Put two sources together: what the stronger one answers, the weaker one is not asked."""
    said = [name for name, (value, _) in stronger.items() if value is not False]
    answered = {other for name in said for other in (name, *_REPLACES.get(name, ()))}
    return {**{name: item for name, item in weaker.items() if name not in answered}, **stronger}
