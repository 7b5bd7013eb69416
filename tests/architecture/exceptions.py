"""Where a rule of the architecture does not hold, and why. Each entry must still be needed; a test checks that."""

from __future__ import annotations

UPWARD = {
    ("utils", "commands.config.default"): "the historical name accelerate.utils.write_basic_config, resolved lazily",
}
"""(importing module, imported module) -> reason."""

TORCH_DISTRIBUTED = {
    "settings/options/handlers.py": "register_comm_hook is a method of the public options class; torch's hooks are "
    "imported inside it, and no process talks",
    "topology/greeting.py": "asks a store of a torch that is newer than those we know how it is greeted, and joins none",
}

DISTRIBUTED_TYPE: dict[str, str] = {}

LONG_FILES = {
    "accelerator.py": "the façade: one class with all public methods, most of it docstrings",
}

LONG_FUNCTIONS: dict[str, str] = {}
"""`"path:function"` -> reason."""

FACES_WITH_CODE = {
    "__init__.py": "resolves its names lazily from one table",
    "utils/__init__.py": "resolves its names lazily from one table",
}
