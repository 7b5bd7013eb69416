"""Write everything of a run into one folder.

Owns the order of a save and which rank writes what. How each thing is written is `checkpoint`'s business, and so
is that the folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import commit, full, gradients, layout, manifest, naming, train_state
from ..checkpoint.background import Background, SaveHandle
from ..checkpoint.files import File, SnapshotMemory
from ..collectives import Collectives, Exchange, Line
from ..core.errors import CheckpointError, SettingError, WrongTypeError, explain
from ..runtime.state import Runtime
from ..settings.options.project import ProjectConfiguration

_log = logging.getLogger(__name__)

SaveHook = Callable[[list[torch.nn.Module], list[dict[str, torch.Tensor]], str], None]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What of a run is saved and loaded, each kind in the order in which it was prepared."""

    models: Sequence[torch.nn.Module]
    """The inner models, without wrappers."""
    optimizers: Sequence[Any]
    """Anything with `state_dict()` and `load_state_dict()`, as are `schedulers`, `scaler` and `custom_objects`."""
    schedulers: Sequence[Any]
    dataloaders: Sequence[Any]
    """Prepared loaders."""
    scaler: Any
    """The gradient scaler, or None."""
    custom_objects: Sequence[Any]
    """Objects registered for checkpoints."""


class Saving:
    """What one run keeps between its saves."""

    def __init__(self, runtime: Runtime) -> None:
        self.background = Background(runtime.collectives)
        self.memory = SnapshotMemory(runtime.hardware)
        self._line: Line | None = None

    def own_line(self, collectives: Collectives, staging: commit.Staging) -> Exchange:
        """Return how ranks talk while training goes on. Called on all ranks; collective at the first save in background."""
        if self._line is None or not self._line.is_open():
            # Agreed on: while one rank still connects, none may begin to write, and perhaps end.
            with staging.kept_if_all_succeed(collectives):
                line = collectives.second_line()
            self._line = line  # not before all have one: the next save has to begin alike on all ranks
        return self._line

    def release(self) -> None:
        """Wait for a save that still runs, and give its memory back.

        Raises:
            CheckpointError: If that save failed, and this rank has not heard of it.
        """
        try:
            self.background.end()
        finally:
            self.memory.release()


def save_state(
    contents: Contents,
    *,
    folder: str | Path | None,
    project: ProjectConfiguration,
    step: int,
    windows: Any = None,
    runtime: Runtime,
    saving: Saving,
    get_model_state: Callable[[torch.nn.Module], dict[str, torch.Tensor]],
    pre_hooks: Sequence[SaveHook] = (),
    safe_serialization: bool = True,
    blocking: bool = True,
    allow_pickle: bool = False,
) -> SaveHandle:
    """Save a run, so that `load_state` can continue it. Called on all ranks; collective.

    Rank 0 writes what all ranks share (the first rank of each node with `save_on_each_node`), every rank its
    random generators and its positions in stateful loaders. Until the last moment the folder does not change,
    and the oldest checkpoints beyond `total_limit` go only when the new one is on the disk.

    Args:
        contents: What to save.
        folder: Where to; with automatic naming the project decides, and a folder given here is ignored.
        project: Naming, limit, and the number of the save, which is raised by one.
        step: The accumulation step.
        windows: The state of windows of accumulation, where `step` is not all.
        runtime: Ranks and devices.
        saving: What the run keeps between its saves. One that still runs is waited for.
        get_model_state: Returns the weights of a model; may be collective.
        pre_hooks: Called on every rank with the models, their weights and the folder being written. Weights that
            a hook takes out of the list are not written.
        safe_serialization: Write weights as safetensors; otherwise as `torch.save` files, which are pickles.
        blocking: Return when the checkpoint is complete; otherwise when everything is copied, and write on.
        allow_pickle: Keep a state that JSON and tensors cannot express as a pickle; `load_state` needs the same then.

    Returns:
        The save, which is done if `blocking`.

    Raises:
        WrongTypeError: (a `TypeError`) if there is neither a folder nor automatic naming.
        SettingError: (a `ValueError`) on all ranks, if automatic naming leads to a folder that exists.
        CheckpointError: On all ranks, if something failed on one, in this save or in the one before that ran in the
            background; what was there before is whole.
    """
    saving.background.wait()
    target = _choose_folder(folder, project)
    collectives, leads = runtime.collectives, leads_on_disk(runtime, project)
    automatic, iteration = project.automatic_checkpoint_naming, project.iteration
    world_size = runtime.process.world_size
    save_id = collectives.broadcast_object(uuid.uuid4().hex)
    staging = commit.Staging(target, collectives, leads=leads, fresh=automatic, stale=manifest.stale_files)

    def take() -> list[File]:
        weights = [get_model_state(model) for model in contents.models]
        for hook in pre_hooks:
            hook(list(contents.models), weights, str(staging.folder))
        files = _plan_shared(contents, weights, safe_serialization, allow_pickle) if leads else []
        files += _plan_own(contents, windows, runtime, allow_pickle)
        return files if blocking else saving.memory.snapshot(files)

    def finish(staged: Path, written: Mapping[str, manifest.FileEntry]) -> None:
        manifest.write(staged, written, save_id=save_id, world_size=world_size, step=step, iteration=iteration)

    def complete(exchange: Exchange, files: Callable[[], list[File]]) -> None:
        staging.complete(exchange, files, finish)
        if automatic and leads:
            _rotate(target, project.total_limit)

    if blocking:
        complete(collectives, take)
        handle = SaveHandle(target)
    else:
        with staging.kept_if_all_succeed(collectives):
            files = take()
        line = saving.own_line(collectives, staging)
        handle = saving.background.start(target, lambda: complete(line, lambda: files))
    project.iteration += 1
    return handle


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


def _plan_shared(
    contents: Contents, weights: Sequence[Mapping[str, torch.Tensor]], safe_serialization: bool, allow_pickle: bool
) -> list[File]:
    plan = partial(train_state.plan_state, allow_pickle=allow_pickle)
    files: list[File] = []
    for index, state in enumerate(weights):
        files += full.plan_model(state, index, safe_serialization)
    names = naming.parameter_names(contents.models)
    for index, optimizer in enumerate(contents.optimizers):
        files += full.plan_optimizer(optimizer, index, names, allow_pickle=allow_pickle)
    for index, scheduler in enumerate(contents.schedulers):
        files += plan(layout.numbered(layout.SCHEDULER_NAME, index), scheduler.state_dict())
    for index, loader in enumerate(contents.dataloaders):
        if hasattr(loader, "position_state"):  # clients may list loaders that were never prepared
            files += plan(layout.numbered(layout.SAMPLER_NAME, index), loader.position_state())
    if contents.scaler is not None:
        files += plan(layout.SCALER_STEM, contents.scaler.state_dict())
    for index, custom in enumerate(contents.custom_objects):
        files += plan(layout.custom_stem(index), custom.state_dict())
    return files


def _plan_own(contents: Contents, windows: Any, runtime: Runtime, allow_pickle: bool) -> list[File]:
    rank = runtime.process.rank
    files: list[File] = []
    for index, loader in enumerate(contents.dataloaders):
        own = loader.own_state() if hasattr(loader, "own_state") else None
        if own is not None:
            files += train_state.plan_state(layout.loader_stem(index, rank), own, allow_pickle=allow_pickle)
    files += train_state.plan_state(layout.rng_stem(rank), train_state.random_state(runtime.hardware))
    return files + gradients.plan_windows(rank, windows)


def _rotate(target: Path, total_limit: int | None) -> None:
    try:
        commit.rotate(target.parent, total_limit, target.name)
    except (OSError, CheckpointError) as error:
        # The new checkpoint is complete, on all ranks: that an old one is still there may not raise on this one.
        _log.warning("An old checkpoint in %s could not be removed: %s", target.parent, error)
