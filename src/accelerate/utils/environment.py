"""Face of `accelerate.utils.environment`. The code lives in `accelerate.settings.env`, `accelerate.core.text` and `accelerate.hardware`."""

from ..core.text import str_to_bool
from ..hardware.affinity import override_numa_affinity, set_numa_affinity
from ..settings.env import (
    clear_environment,
    get_int_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
    patch_environment,
    purge_accelerate_environment,
)

__all__ = [
    "clear_environment",
    "get_int_from_env",
    "override_numa_affinity",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "purge_accelerate_environment",
    "set_numa_affinity",
    "str_to_bool",
]
