"""Options of torch's agent that a plan passes on, as the installed torch takes them.

Owns the names of torch's configuration. Imports torch; only when such a run starts.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.launcher.api import LaunchConfig

from ..core.errors import SettingError, explain
from . import registry
from .plan import LaunchPlan

_LOGS = ("redirects", "local_ranks_filter", "logs_specs")
"""Those that choose where output goes."""
_FILTERS = ("duplicate_stdout_filters", "duplicate_stderr_filters")
"""Those that `launch.logs` carries out; torch does where the files are somebody else's choice."""


def config_fields(plan: LaunchPlan) -> dict[str, Any]:
    """Return the fields of `LaunchConfig` that the plan sets beyond those every run has.

    Raises:
        SettingError: (a `ValueError`) for one that the installed torch does not have.
    """
    known = {field.name for field in fields(LaunchConfig)}
    found: dict[str, Any] = {}
    for name, value in plan.agent.items():
        if name in _LOGS or (name in _FILTERS and "logs_specs" not in plan.agent):
            continue
        target = "numa_options" if name == "numa_binding" else name
        if target not in known:
            raise SettingError(
                explain(
                    f"--{name} {value} is an option that torch {torch.__version__} does not have.",
                    remedy="Leave the flag out, or update torch.",
                )
            )
        found[target] = _value(name, value)
    return found


def _value(name: str, value: Any) -> Any:
    if name == "numa_binding":
        from torch.numa.binding import AffinityMode, NumaOptions

        try:
            return NumaOptions(affinity_mode=AffinityMode(value))
        except ValueError:
            raise SettingError(
                explain(
                    f"numa_binding={value!r} is not known (from --numa_binding).",
                    accepted=[mode.value for mode in AffinityMode],
                    remedy="Pass --numa_binding node to bind workers to the memory near their device.",
                )
            ) from None
    return value.split(",") if name in _FILTERS else value


def logs(name: str, **options: Any) -> LogsSpecs:
    """Return where the workers' output is written by somebody else's rules.

    Args:
        name: Under which they are registered.
        **options: What was asked about the output, by torch's names.

    Raises:
        SettingError: (a `ValueError`) if nobody offers rules of that name, or they do not take the options.
    """
    found = _logs_class(name)
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise SettingError(
            explain(
                f"logs_specs={name!r} (from --logs_specs) does not take what torchrun gives to such a class: {error}.",
                accepted=f"a class that takes {', '.join(options)}",
                remedy="Ask those who offer it for a newer one, or leave the flag out.",
            )
        ) from None
    return found(**options)


def _logs_class(name: str) -> Any:
    registry.check_logs(name, "from --logs_specs")
    return importlib.metadata.entry_points(group=registry.LOGS_GROUP)[name].load()
