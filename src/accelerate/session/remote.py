"""Save to an address and continue from one: everything is staged in a local folder, and copied.

Owns which functions a destination needs, and the naming of checkpoints at an address. How files get there is
`checkpoint.remote`'s business.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import commit, layout, remote, weights
from ..checkpoint.background import SaveHandle
from ..collectives.base import Collectives
from ..core.addresses import shown
from ..core.errors import CheckpointError, SettingError, UnsupportedCombination, explain
from ..runtime.state import Runtime
from ..settings.options.project import ProjectConfiguration
from . import load, numbered, save


def saver(folder: str | Path | None, project: ProjectConfiguration) -> Callable[..., Any]:
    """Return what saves a run to this destination: `save.save_state`, or the one for addresses."""
    return save_state if _is_remote(folder, project) else save.save_state


def loader(folder: str | Path | None, project: ProjectConfiguration) -> Callable[..., load.Loaded]:
    """Return what continues a run from this place: `load.load_state`, or the one for addresses."""
    return load_state if _is_remote(folder, project, loads=True) else load.load_state


def _is_remote(folder: str | Path | None, project: ProjectConfiguration, loads: bool = False) -> bool:
    named = project.automatic_checkpoint_naming and not (loads and folder is not None)
    return remote.is_address(project.project_dir if named else folder)


def save_state(
    contents: save.Contents,
    *,
    folder: str | Path | None,
    project: ProjectConfiguration,
    runtime: Runtime,
    **options: Any,
) -> SaveHandle:
    """Save a run to an address, as `save.save_state` does to a folder. Called on all ranks; collective.

    Args:
        contents: What to save.
        folder: The address; with automatic naming the project decides.
        project: Naming, limit, and the number of the save, which is raised by one.
        runtime: Ranks and devices.
        **options: As for `save.save_state`. Saves to addresses block.

    Returns:
        The save, which is done.

    Raises:
        SettingError: (a `ValueError`) on all ranks, if automatic naming leads to a checkpoint that exists.
        CheckpointError: On all ranks, if something failed on one; the address holds what it held before.
    """
    if not options.pop("blocking", True):
        raise UnsupportedCombination(
            explain(
                "save_state(blocking=False) cannot save to an address in this version.",
                accepted="a folder, or blocking=True",
                remedy="Leave blocking=False out.",
            )
        )
    collectives, automatic = runtime.collectives, project.automatic_checkpoint_naming
    name = layout.checkpoint_name(project.iteration) if automatic else "checkpoint"
    address = remote.below(_checkpoints(project), name) if automatic else str(folder)
    with commit.together(collectives, f"The checkpoint {shown(address)} cannot be begun"):
        exists = automatic and collectives.rank == 0 and remote.has_manifest(address)
    if collectives.broadcast_object(exists):
        raise SettingError(
            explain(
                f"There is a checkpoint at {shown(address)} already.",
                remedy="Set ProjectConfiguration.iteration past the last checkpoint, or load that one first.",
            )
        )
    leads = runtime.process.local_rank == 0
    with remote.scratch(collectives, leads) as root:
        local = _local(project)
        save.save_state(contents, folder=root / name, project=local, runtime=runtime, **options)
        remote.upload(root / name, address, collectives, leads)
    project.iteration += 1
    if automatic and collectives.rank == 0:
        _rotate(_checkpoints(project), project.total_limit, name)
    return SaveHandle(address)


def load_state(
    contents: save.Contents,
    *,
    folder: str | Path | None,
    project: ProjectConfiguration,
    runtime: Runtime,
    **options: Any,
) -> load.Loaded:
    """Continue a run from an address, as `load.load_state` does from a folder. Called on all ranks; collective.

    The first rank of each node copies the checkpoint and compares it with its manifest; all of its ranks read the copy.

    Args:
        contents: What to load it into.
        folder: The address; None takes the newest complete one of the project, with automatic naming.
        project: Where checkpoints lie. With automatic naming its counter goes on after the loaded one.
        runtime: Ranks and devices.
        **options: As for `load.load_state`.

    Raises:
        CheckpointError: If the checkpoint is not complete, damaged, or does not fit the objects.
    """
    collectives, leads = runtime.collectives, runtime.process.local_rank == 0
    with remote.scratch(collectives, leads) as root:
        address = str(folder)
        with commit.together(collectives, "The checkpoint was not found"):
            if collectives.rank == 0:
                address = _fetch_newest(_checkpoints(project), root) if folder is None else _fetch(str(folder), root)
        address = collectives.broadcast_object(address)
        with commit.together(collectives, f"The checkpoint {shown(address)} was not copied"):
            if leads and collectives.rank != 0:
                _fetch(address, root)
        local = _local(project)
        loaded = load.load_state(contents, folder=root / _last(address), project=local, runtime=runtime, **options)
    numbered.go_on_behind(_last(address), project, runtime)
    return dataclasses.replace(loaded, folder=address, iteration=project.iteration)


def save_model(
    state: Mapping[str, torch.Tensor],
    folder: str | Path,
    collectives: Collectives,
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Write the weights of one model to a folder or an address. Called on all ranks; collective.

    The arguments are those of `weights.save_model`.

    Raises:
        CheckpointError: On all ranks, if writing failed on one.
    """
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization}
    if not remote.is_address(folder):
        weights.save_model(state, folder, collectives, **options)
        return
    with remote.scratch(collectives, collectives.rank == 0) as root:
        weights.save_model(state, root / "weights", collectives, **options)
        with commit.together(collectives, f"The weights were not written to {shown(folder)}"):
            if collectives.rank == 0:
                remote.upload_weights(root / "weights", str(folder))


def _local(project: ProjectConfiguration) -> ProjectConfiguration:
    """Return the options with which the local copy of each node is written and read."""
    return dataclasses.replace(project, automatic_checkpoint_naming=False, save_on_each_node=True)


def _checkpoints(project: ProjectConfiguration) -> str:
    return remote.below(str(project.project_dir), layout.CHECKPOINTS_FOLDER)


def _last(address: str) -> str:
    name = address.rstrip("/").rpartition("/")[2]
    return name if layout.checkpoint_number(name) is not None else "checkpoint"


def _fetch(address: str, root: Path) -> str:
    remote.download(address, root / _last(address))
    return address


def _fetch_newest(checkpoints: str, root: Path) -> str:
    skipped: list[str] = []
    for name in remote.numbered(checkpoints):
        address = remote.below(checkpoints, name)
        try:
            _fetch(address, root)
        except remote.Unreachable:
            raise  # it may be complete: to go on from an older one would throw away what was trained since
        except CheckpointError as error:
            skipped.append(f"{name}: {str(error).splitlines()[0]}")
            shutil.rmtree(root / name)
            continue
        if skipped:
            warnings.warn(f"Loading {name}; newer ones are not complete: {'; '.join(skipped)}", stacklevel=4)
        return address
    raise CheckpointError(
        explain(
            f"{shown(checkpoints)} holds no complete checkpoint. {'; '.join(skipped)}".rstrip(),
            remedy="Pass the address of a checkpoint, or start from the beginning.",
        )
    )


def _rotate(checkpoints: str, total_limit: int | None, newest: str) -> None:
    try:
        remote.rotate(checkpoints, total_limit, newest)
    except CheckpointError as error:
        # The new checkpoint is complete; that an old one is still there is no reason to stop a run.
        warnings.warn(f"An old checkpoint at {shown(checkpoints)} could not be removed: {error}", stacklevel=3)
