"""How many accelerators a launcher sees, without torch where that is possible.

Owns the questions to the NVIDIA driver. No CUDA context is made: a launcher holds no device memory, and a process
that forks stays able to fork.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import SettingError, explain


@dataclass(frozen=True)
class Devices:
    """The accelerators a launched process would see."""

    count: int
    name: str = "cpu"
    visible: str | None = None
    """The variable that restricts which of them a process sees."""
    is_all: bool = False
    """Whether these are known to be all of the machine: then their numbers go from 0 to the last."""
    label: str = ""
    """What `distributed_type` says for several of these; empty if there are none, or they have no label of their own."""


NONE = Devices(0)
CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"


def find(environ: Mapping[str, str]) -> Devices:
    """Count the accelerators for which the installed torch was built."""
    build = torch_build()
    if build.get("cuda") and not _has_plugins():
        count = visible_count(nvidia_count(), environ.get(CUDA_VARIABLE))
        return Devices(count, "cuda", CUDA_VARIABLE, CUDA_VARIABLE not in environ, "MULTI_GPU" if count else "")
    if build and not any(build.get(kind) for kind in ("cuda", "hip", "xpu", "mps")) and not _has_plugins():
        return NONE
    return _ask_torch()


_ID = re.compile(r"\d{1,9}([.-]\d+)?|(GPU|MIG)-\S+", re.ASCII)
"""A number, a part (0.1) or a range (0-3) as some vendors have them, or a name."""


def check_ids(ids: Sequence[str], described: str, found: Devices | None = None) -> None:
    """Refuse devices that no machine has, or that this one does not have.

    Args:
        ids: What was asked for.
        described: The setting with its origin, for the error.
        found: What this machine shows, if that is known.
    """
    wrong = next((name for name in ids if not _ID.fullmatch(name)), None)
    twice = next((name for name in ids if ids.count(name) > 1), None)
    most = found.count if found is not None and found.is_all and found.count else None
    absent = next((name for name in ids if most and name.isdigit() and int(name) >= most), None)
    if wrong is not None:
        problem = f"holds {wrong!r:.100}, which is no device"
    elif twice is not None:
        problem = f"names the device {twice} twice"
    elif found is not None and absent is not None:
        problem = f"names {absent:.20}, and this machine shows {most} {found.name} device(s), counted from 0"
    else:
        return
    accepted = "`all`, numbers such as 0,1, or names such as GPU-8932f937"
    raise SettingError(explain(f"{described} {problem}.", accepted=accepted, remedy="Name each device once."))


def torch_build() -> dict[str, str | None]:
    """Read for which devices torch was built from its version file; empty if that cannot be told.

    Importing torch answers the same, a second later.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    found: dict[str, str | None] = {}
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            found[target.id] = str(value.value) if value.value else None
    # A wheel for a Mac serves its own GPU and says nothing about it here.
    is_mac = importlib.util.find_spec("_scproxy") is not None
    return {**found, "mps": "yes"} if found and is_mac else found


def _has_plugins() -> bool:
    # Devices that live outside torch register here and are loaded by `import torch`.
    import importlib.metadata  # costs 10 ms that runs on the CPU do not need

    return bool(importlib.metadata.entry_points(group="torch.backends"))


def _ask_torch() -> Devices:
    from ..hardware import CPU, detect

    family = detect()
    if family is CPU:
        return NONE
    return Devices(family.count(), family.name, family.visible_devices, label=family.label.value)


def nvidia_count() -> int:
    """Count the NVIDIA devices of this machine through the management library; 0 without a driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    number = ctypes.c_uint(0)
    if library.nvmlInit_v2() != 0:
        return 0
    try:
        return number.value if library.nvmlDeviceGetCount_v2(ctypes.byref(number)) == 0 else 0
    finally:
        library.nvmlShutdown()


def visible_count(present: int, variable: str | None) -> int:
    """Count what `CUDA_VISIBLE_DEVICES` leaves of the devices that are present.

    CUDA reads the list up to the first entry that is no device, and shows one slice at most of a divided device.
    """
    if variable is None or not present:
        return present
    seen: list[str] = []
    for entry in (item.strip() for item in variable.split(",")):
        if entry.startswith("MIG-"):
            return max(len(seen), 1)
        is_index = entry.isdigit() and int(entry) < present
        if not is_index and not entry.startswith("GPU-"):
            break
        if entry in seen:
            return 0
        seen.append(entry)
    return len(seen)
