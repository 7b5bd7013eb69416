"""Write everything of a run into one folder.

Owns the order of a save and which rank writes what. How each thing is written is `checkpoint`'s business, and so
is that the folder appears whole or not at all.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import commit, full, gradients, layout, manifest, train_state
from ..core.errors import SettingError, WrongTypeError, explain
from ..runtime.state import Runtime
from ..settings.options.project import ProjectConfiguration

SaveHook = Callable[[list[torch.nn.Module], list[dict[str, torch.Tensor]], str], None]


def save_state(
    *,
    folder: str | Path | None,
    project: ProjectConfiguration,
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    dataloaders: Sequence[Any],
    scaler: Any,
    custom_objects: Sequence[Any],
    step: int,
    windows: Any = None,
    runtime: Runtime,
    get_model_state: Callable[[torch.nn.Module], dict[str, torch.Tensor]],
    pre_hooks: Sequence[SaveHook] = (),
    safe_serialization: bool = True,
) -> Path:
    """Save a run, so that `load_state` can continue it. Called on all ranks; collective.

    Rank 0 writes what all ranks share (the first rank of each node with `save_on_each_node`), every rank its
    random generators and its positions in stateful loaders. Until the last moment the folder does not change,
    and the oldest checkpoints beyond `total_limit` go only when the new one is on the disk.

    Args:
        folder: Where to; with automatic naming the project decides, and a folder given here is ignored.
        project: Naming, limit, and the number of the save, which is raised by one.
        models: The inner models, without wrappers.
        optimizers: Anything with `state_dict()`, as are `schedulers`, `scaler` and `custom_objects`.
        schedulers: Learning rate schedulers.
        dataloaders: Prepared loaders.
        scaler: The gradient scaler, or None.
        custom_objects: Objects registered for checkpoints, in order.
        step: The accumulation step.
        windows: The state of windows of accumulation, where `step` is not all.
        runtime: Ranks and devices.
        get_model_state: Returns the weights of a model; may be collective.
        pre_hooks: Called on every rank with the models, their weights and the folder being written. Weights that
            a hook takes out of the list are not written.
        safe_serialization: Write weights as safetensors; otherwise as `torch.save` files, which are pickles.

    Returns:
        The folder.

    Raises:
        WrongTypeError: (a `TypeError`) if there is neither a folder nor automatic naming.
        SettingError: (a `ValueError`) on all ranks, if automatic naming leads to a folder that exists.
        CheckpointError: On all ranks, if something failed on one; what was there before is whole.
    """
    target = _choose_folder(folder, project)
    collectives, rank = runtime.collectives, runtime.process.rank
    leads = leads_on_disk(runtime, project)
    save_id = collectives.broadcast_object(uuid.uuid4().hex)

    def finish(staging: Path) -> None:
        world_size, iteration = runtime.process.world_size, project.iteration
        manifest.write(staging, save_id=save_id, world_size=world_size, step=step, iteration=iteration)

    automatic = project.automatic_checkpoint_naming
    with commit.staged(
        target, collectives, leads=leads, fresh=automatic, stale=manifest.files_of, finish=finish
    ) as staging:
        weights = [get_model_state(model) for model in models]
        for hook in pre_hooks:
            hook(list(models), weights, str(staging))
        if leads:
            for index, state in enumerate(weights):
                full.save_model(state, staging, index, safe_serialization)
            for index, optimizer in enumerate(optimizers):
                full.save_optimizer(optimizer, staging, index)
            _save_shared(staging, schedulers, dataloaders, scaler, custom_objects)
        _save_own(staging, rank, dataloaders, runtime)
        gradients.write_windows(staging, rank, windows)
    project.iteration += 1
    if automatic and leads:
        _rotate(target, project.total_limit)
    return target


def leads_on_disk(runtime: Runtime, project: ProjectConfiguration) -> bool:
    """Tell whether this rank writes what the ranks at its disk share."""
    return (runtime.process.local_rank if project.save_on_each_node else runtime.process.rank) == 0


def checkpoints_folder(project: ProjectConfiguration) -> Path:
    """Return the folder in which automatic naming puts checkpoints.

    Raises:
        SettingError: If the project has no folder.
    """
    if project.project_dir is None:
        raise SettingError(
            explain(
                "automatic_checkpoint_naming=True needs a folder to name checkpoints in, and project_dir is None.",
                remedy="Pass project_dir to ProjectConfiguration or to Accelerator.",
            )
        )
    return layout.checkpoint_folder(Path(project.project_dir).expanduser(), 0).parent


def _choose_folder(folder: str | Path | None, project: ProjectConfiguration) -> Path:
    if project.automatic_checkpoint_naming:
        return layout.checkpoint_folder(checkpoints_folder(project).parent, project.iteration)
    if folder is None:
        raise WrongTypeError(
            explain(
                "save_state() was given no folder, and automatic_checkpoint_naming is off.",
                remedy="Pass output_dir, or ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True).",
            )
        )
    return Path(folder).expanduser()


def _save_shared(
    staging: Path, schedulers: Sequence[Any], dataloaders: Sequence[Any], scaler: Any, custom_objects: Sequence[Any]
) -> None:
    for index, scheduler in enumerate(schedulers):
        train_state.write_state(staging, layout.numbered(layout.SCHEDULER_NAME, index), scheduler.state_dict())
    for index, loader in enumerate(dataloaders):
        stem = layout.numbered(layout.SAMPLER_NAME, index)
        if hasattr(loader, "position_state"):  # clients may list loaders that were never prepared
            train_state.write_state(staging, stem, loader.position_state())
    if scaler is not None:
        train_state.write_state(staging, layout.SCALER_STEM, scaler.state_dict())
    for index, custom in enumerate(custom_objects):
        train_state.write_state(staging, layout.custom_stem(index), custom.state_dict())


def _save_own(staging: Path, rank: int, dataloaders: Sequence[Any], runtime: Runtime) -> None:
    for index, loader in enumerate(dataloaders):
        own = loader.own_state() if hasattr(loader, "own_state") else None
        if own is not None:
            train_state.write_state(staging, layout.loader_stem(index, rank), own)
    train_state.write_state(staging, layout.rng_stem(rank), train_state.random_state(runtime.hardware))


def _rotate(target: Path, total_limit: int | None) -> None:
    try:
        commit.rotate(target.parent, total_limit, target.name)
    except OSError as error:
        # The new checkpoint is complete; that an old one is still there is no reason to stop a run.
        warnings.warn(f"An old checkpoint in {target.parent} could not be removed: {error}", stacklevel=3)
