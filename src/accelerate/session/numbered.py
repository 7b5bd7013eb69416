"""Which numbered checkpoints a run finds when it begins, or is to save itself: in a folder, on several nodes, at an address.

Owns the question only. What is loaded, and whether it is complete, is up to `load` and `remote`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint import commit, layout, remote
from ..checkpoint.disk_errors import about
from ..core.addresses import shown
from ..runtime.state import Runtime
from ..settings.options.project import ProjectConfiguration
from .save import checkpoints_folder, leads_on_disk


def place(project: ProjectConfiguration) -> Path | str:
    """Return the folder, or the address, in which automatic naming puts checkpoints.

    Raises:
        SettingError: If the project has neither.
    """
    if remote.is_address(project.project_dir):
        return remote.below(str(project.project_dir), layout.CHECKPOINTS_FOLDER)
    return checkpoints_folder(project)


def newest(project: ProjectConfiguration, runtime: Runtime) -> int | None:
    """Return the highest number of a checkpoint, also of a damaged one. Called on all ranks; collective.

    A first save that was cut off is none. With `save_on_each_node` that of any node counts.

    Raises:
        CheckpointError: On all ranks, if one could not look.
    """
    found: int | None = None
    where = place(project)
    with commit.together(runtime.collectives, f"The checkpoints in {shown(where)} could not be listed"):
        if _looks(project, runtime):
            found = _newest_at(where)
    numbers = [number for number in runtime.collectives.all_gather_object(found) if number is not None]
    return max(numbers, default=None)


def go_on_behind(loaded: str, project: ProjectConfiguration, runtime: Runtime) -> None:
    """Let the next save have a number behind the checkpoint `loaded` and all that are there.

    A save does not write over those that were passed over. Called on all ranks; collective with automatic naming.

    Args:
        loaded: The last part of its folder or address.
        project: Its counter is raised.
        runtime: Ranks and disks.
    """
    number = layout.checkpoint_number(loaded)
    if not project.automatic_checkpoint_naming or number is None:
        return
    highest = newest(project, runtime) if project.project_dir else None
    project.iteration = max(project.iteration, number + 1, 0 if highest is None else highest + 1)


def exists(project: ProjectConfiguration, runtime: Runtime) -> bool:
    """Tell whether the next save would be refused, since there is a checkpoint of its number on any node.

    Called on all ranks; collective.

    Raises:
        CheckpointError: On all ranks, if one could not look.
    """
    found = False
    where = place(project)
    with commit.together(runtime.collectives, f"The checkpoints in {shown(where)} could not be looked at"):
        if _looks(project, runtime):
            found = _is_there(where, layout.checkpoint_name(project.iteration))
    return any(runtime.collectives.all_gather_object(found))


def _looks(project: ProjectConfiguration, runtime: Runtime) -> bool:
    if remote.is_address(project.project_dir):
        return runtime.process.rank == 0
    return leads_on_disk(runtime, project)


def _newest_at(where: Path | str) -> int | None:
    names = layout.newest_first(_names(where)) if isinstance(where, Path) else remote.numbered(where)
    return next((layout.checkpoint_number(name) for name in names if _is_there(where, name)), None)


def _names(folder: Path) -> list[str]:
    with about(folder):
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []


def _is_there(where: Path | str, name: str) -> bool:
    if isinstance(where, Path):
        with about(where):
            return (where / name).exists()
    # Nothing is written aside there: without a manifest it is a save that was cut off, and does not refuse the next one.
    return remote.has_manifest(remote.below(where, name))
