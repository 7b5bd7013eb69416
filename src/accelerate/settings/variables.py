"""Which variables of the environment this library knows, and what becomes of those that cannot be obeyed.

Owns the list of names; `tests/unit/settings/test_variables.py` compares it with the code. Pure: takes mappings.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from ..core import engines
from ..core.errors import SettingError, explain
from .env import flag
from .options.absent import refuse

PREFIX = "ACCELERATE_"

OBEYED = (
    "ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_NUM_PROCESSES", "ACCELERATE_RESUME", "ACCELERATE_SAVE_ON_SIGNALS",
    "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU",
)  # fmt: skip
"""Variables of ours that have an effect."""

OF_WORKERS = ("ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_LOG_LEVEL", "ACCELERATE_TORCH_DEVICE")
"""Those of them that are no setting of a launch: each worker reads them."""

INTERNAL = ("ACCELERATE_LAUNCHER_PID", "ACCELERATE_PREEMPTED_NOTE", "ACCELERATE_SETTINGS")
"""What the launcher tells its workers."""

LATER = ("ACCELERATE_INIT_INCLUDE_BUFFERS",)
"""Defaults of functions that this version does not have; nothing else looks at them."""

_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": engines.DEEPSPEED,
    "ACCELERATE_USE_FSDP": engines.FSDP,
    "ACCELERATE_USE_MEGATRON_LM": engines.MEGATRON,
    "ACCELERATE_USE_PARALLELISM_CONFIG": engines.MESH,
    "ACCELERATE_USE_SAGEMAKER": engines.SAGEMAKER,
}
"""Those that turn an engine on: only a boolean is understood."""

_DETAILS = {
    "ACCELERATE_ALLOW_CP_STANDALONE": engines.MESH,
    "ACCELERATE_CONFIG_DS_FIELDS": engines.DEEPSPEED,
    "ACCELERATE_DEBUG_RDV_FILE": "a meeting of processes in a file",
    "ACCELERATE_DOWNCAST_BF16": engines.XLA,
    "ACCELERATE_ENABLE_RICH": "tracebacks by rich",
    "ACCELERATE_GRADIENT_CLIPPING": engines.DEEPSPEED,
    "ACCELERATE_IN_TPU_POD": engines.TPU,
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": engines.SAGEMAKER,
}
"""Those that say something to an engine that is missing -> which."""

_FAMILIES = {
    "ACCELERATE_DEEPSPEED_": engines.DEEPSPEED,
    "ACCELERATE_FP8_": engines.FP8,
    "FSDP_": engines.FSDP,
    "MEGATRON_LM_": engines.MEGATRON,
    "PARALLELISM_CONFIG_": engines.MESH,
}
"""Beginnings of names that belong to one engine as a whole -> which."""

_OF_CLIENTS = ("ACCELERATE_KT_",)
"""Beginnings of names that libraries on top of this one have made up for themselves."""

KNOWN = frozenset((*OBEYED, *INTERNAL, *LATER, *_SWITCHES, *_DETAILS))
"""Names that begin with ACCELERATE_, but for those of a family."""

_OFF = ("", "0", "false", "f", "no", "n", "off", "none")


def refuse_absent(environ: Mapping[str, str]) -> None:
    """Refuse what asks for an engine that is missing; what turns one off is fine.

    Raises:
        UnsupportedCombination: (a `ValueError`) that names the variable and the engine.
        SettingError: (a `ValueError`) for a switch that is no boolean.
    """
    for name, engine in _SWITCHES.items():
        if flag(environ, name):
            refuse(f"{name}={environ[name]} (in the environment)", engine)
    for name, value in environ.items():
        engine = _DETAILS.get(name) or next(
            (needs for begin, needs in _FAMILIES.items() if name.startswith(begin)), None
        )
        if engine is not None and not _is_off(name, value):
            refuse(f"{name}={value:.80} (in the environment)", engine)


def _is_off(name: str, value: str) -> bool:
    alone = name.endswith(("_SIZE", "_DEGREE")) and value == "1"  # one of something is what everybody has
    return alone or value.strip().lower() in _OFF


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that look like one of ours and are none, each with the name that was meant.

    A name that is near none of ours may be somebody else's: only a launch tells of it, by `about_unknown`.
    """
    found: dict[str, str] = {}
    for name in environ:
        begins_alike = difflib.get_close_matches(name.partition("_")[0], [PREFIX.rstrip("_")], cutoff=0.85)
        if begins_alike and name not in KNOWN and not name.startswith(tuple(_FAMILIES)):
            close = difflib.get_close_matches(name, sorted((*OBEYED, *_SWITCHES)), n=1, cutoff=0.85)
            if close:
                found[name] = close[0]
    return found


def about_ignored(environ: Mapping[str, str]) -> list[str]:
    """Say, a sentence for each, which variables have no effect, though their name is one of ours or looks like it."""
    later = [
        f"the variable {name} has no effect: it speaks to functions that this version does not have."
        for name in LATER
        if name in environ
    ]
    return later + [
        f"the variable {name} has no effect: accelerate does not know it. Did you mean {meant}?"
        for name, meant in misspelt(environ).items()
    ]


def about_unknown(environ: Mapping[str, str], flags: Collection[str]) -> list[str]:
    """Say, a sentence for each, which variables begin like ours, have no effect, and look like none of ours.

    Args:
        environ: The environment.
        flags: The names of the settings of a launch: not all have a variable.
    """
    told = misspelt(environ)
    return [
        f"the variable {name} has no effect: {_instead(name, flags)}"
        for name in environ
        if name.startswith(PREFIX)
        and name not in KNOWN
        and name not in told
        and not name.startswith((*_FAMILIES, *_OF_CLIENTS))
    ]


def _instead(name: str, flags: Collection[str]) -> str:
    flag = name.removeprefix(PREFIX).lower()
    return f"{flag} has none. Pass --{flag}." if flag in flags else "accelerate does not know it."


def unreadable(name: str, text: str, accepted: str) -> SettingError:
    """Return the error for a variable that cannot be read."""
    return SettingError(
        explain(
            f"{name}={text!r:.80} in the environment cannot be read.",
            accepted=accepted,
            remedy="Correct or unset the variable.",
        )
    )
