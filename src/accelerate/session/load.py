"""Continue a run from a folder that `save_state`, or Accelerate 1.x, has written.

Owns the choice of the folder and the order of loading.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import background, commit, full, gradients, layout, legacy, manifest, naming, train_state, weights
from ..core.errors import AccelerateError, CheckpointError, SettingError, explain
from ..runtime.state import Runtime
from ..settings.options.project import ProjectConfiguration
from . import numbered
from .save import Contents, checkpoints_folder, leads_on_disk

LoadHook = Callable[[list[torch.nn.Module], str], None]


@dataclass(frozen=True)
class Loaded:
    """What a caller of `load_state` has to know of the checkpoint."""

    folder: Path | str
    """The folder; or the address it was copied from."""
    step: int
    """The accumulation step; 0 if the checkpoint does not say."""
    iteration: int
    """The number of the next save."""
    windows: Any = None
    """The state of windows of accumulation, if any were open."""


class Misfit(CheckpointError, ValueError):
    """What a checkpoint holds does not fit the object that should take it."""


@dataclass(frozen=True)
class _Choice:
    """What the rank that looked at the disk found."""

    folder: str
    manifest: manifest.Manifest | None
    error: AccelerateError | None = None


def load_state(
    contents: Contents,
    *,
    folder: str | Path | None,
    project: ProjectConfiguration,
    runtime: Runtime,
    pre_hooks: Sequence[LoadHook] = (),
    strict: bool = True,
    verify: manifest.Verify = "full",
    load_model_kwargs: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """Put a run into the state that a checkpoint holds. Called on all ranks; collective.

    Every rank reads. Runs no code from the folder, unless `allow_pickle`. Files of Accelerate 1.x are read too.

    Args:
        contents: What to load it into, in the order of the save.
        folder: The checkpoint; None takes the newest good one of the project, with automatic naming. Damaged newer
            ones are passed over with a warning.
        project: Where checkpoints lie. With automatic naming its counter goes on after all that are there.
        runtime: Ranks and devices.
        pre_hooks: Called on every rank with the models and the folder. Models that a hook takes out of the list
            are not loaded.
        strict: Refuse a folder that has lost its manifest, or states of this rank, or that holds more models (of
            which no hook may know), optimizers or schedulers than are given. Otherwise say so, and go on. A script
            that gives no optimizer or no scheduler at all only evaluates: it is told, not refused, and where
            optimizers were saved and it gives none, its loaders begin at their start.
        verify: How closely the folder is compared with its manifest first, on one rank for each disk: `"full"` reads
            all files and compares hashes, `"size"` looks for files and at their sizes, `"off"` takes what is there.
        load_model_kwargs: For `model.load_state_dict`, such as `{"strict": False}`.
        allow_pickle: Read states that were saved as pickles, after the comparison with the manifest. Such a file may
            run any code. Otherwise they are refused before anything is loaded.

    Raises:
        SettingError: (a `ValueError`) if there is no such folder, or none was given and naming is not automatic, or
            `verify` is unknown.
        CheckpointError: On all ranks, if the checkpoint is damaged, not complete, or does not fit the objects.
    """
    manifest.check_verify(verify)
    background.settle()
    choice = _choose(folder, project, runtime, strict, verify)
    source = Path(choice.folder)
    with commit.together(runtime.collectives, f"The checkpoint {source} was not loaded", source):
        # Counted, read, and compared with the objects as far as that can be, before any rank changes the first of them.
        _check_custom_objects(source, len(contents.custom_objects))
        evaluates = _only_evaluates(source, contents.optimizers)
        # A hook may know of models that it loads itself.
        given = _counts(contents, with_models=not pre_hooks)
        _check_counts(source, given, strict, evaluates=evaluates, tell=runtime.process.rank == 0)
        trained_on = () if evaluates else contents.dataloaders
        saved_ranks = choice.manifest.world_size if choice.manifest else None
        windows = None
        if not evaluates:  # gradients are of no use then
            with _fitting(source, layout.windows_stem(runtime.process.rank)):
                windows = gradients.read_windows(source, runtime.process.rank, runtime.process.world_size, saved_ranks)
        parts = _read_shared(source, contents, allow_pickle)
        for stem in _stems_of_loaders(trained_on, runtime.process.rank):
            train_state.check_pickle(source, stem, allow_pickle)
    with commit.together(runtime.collectives, f"The checkpoint {source} was not loaded", source):
        remaining = list(contents.models)
        for hook in pre_hooks:
            hook(remaining, str(source))
        for index in range(len(remaining)):
            weights.find_weights(source, index)
        for index, model in enumerate(remaining):
            full.load_model(model, source, index, **(load_model_kwargs or {}))
        _load_shared(source, parts)
        _load_places(source, trained_on, strict, allow_pickle)
        if saved_ranks in (None, runtime.process.world_size):
            _load_own_reading(source, trained_on, runtime.process.rank, allow_pickle)
        # Last, because what came before may have drawn random numbers.
        rest = train_state.load_random_state(source, runtime.process.rank, saved_ranks, runtime.hardware, strict)
        if leads_on_disk(runtime, project):
            _check_unchanged(source, choice.manifest)
    numbered.go_on_behind(source.name, project, runtime)
    step = choice.manifest.step if choice.manifest else rest.get("step", 0)
    if windows is None and saved_ranks not in (None, runtime.process.world_size):
        step = 0  # no window was open, and how many batches other ranks took for theirs says nothing here
    return Loaded(source, step, project.iteration, windows)


def _choose(
    folder: str | Path | None, project: ProjectConfiguration, runtime: Runtime, strict: bool, verify: manifest.Verify
) -> _Choice:
    """Let all ranks take the same checkpoint: the newest that is good on all disks, if none was given. Collective."""
    collectives = runtime.collectives
    leads = leads_on_disk(runtime, project)
    newest: int | None = None
    while True:
        own = _look(folder, project, newest, strict, verify) if leads else None
        choices = collectives.all_gather_object(own)
        found = [choice for choice in choices if choice is not None]
        numbers = [
            number for choice in found if (number := layout.checkpoint_number(Path(choice.folder).name)) is not None
        ]
        if folder is not None or any(choice.error for choice in found) or len(set(numbers)) == 1:
            return _same_choice(own, found)
        newest = min(numbers)


def _look(
    folder: str | Path | None, project: ProjectConfiguration, newest: int | None, strict: bool, verify: manifest.Verify
) -> _Choice:
    try:
        if folder is None:
            return _newest(project, newest, verify)
        return _examine(_given(Path(folder).expanduser()), strict, verify)
    except AccelerateError as error:
        return _Choice("", None, error)
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting to hear of it
        return _Choice("", None, CheckpointError(f"The checkpoint cannot be read: {type(error).__name__}: {error}"))


def _examine(source: Path, strict: bool, verify: manifest.Verify) -> _Choice:
    """Finish an interrupted save and compare the folder with its manifest."""
    commit.recover(source)
    found = manifest.read(source)
    manifest.check_links(source)
    if found is not None:
        manifest.check(source, found, verify)
    elif strict and _lost_manifest(source):
        raise CheckpointError(
            explain(
                f"{source} has no {layout.MANIFEST_NAME}: its save was cut off, or it was not copied whole.",
                remedy="Load another checkpoint, or pass strict=False to read what is there.",
            )
        )
    return _Choice(str(source), found)


def _check_unchanged(source: Path, before: manifest.Manifest | None) -> None:
    """Refuse what was read while another process saved there: it may be of both states."""
    after = manifest.read(source)
    if (after.save_id if after else None) != (before.save_id if before else None):
        raise CheckpointError(
            explain(f"{source} was saved anew while it was loaded.", remedy="Load it again: what was read is of both.")
        )


def _same_choice(own: _Choice | None, found: Sequence[_Choice]) -> _Choice:
    for choice in found:
        if choice.error is not None:
            raise choice.error
    first = found[0]
    others = {choice.manifest.save_id if choice.manifest else None for choice in found}
    if len(others) > 1:
        raise CheckpointError(
            explain(
                f"The nodes hold parts of different saves under {first.folder}.",
                remedy="Pass the folder of a checkpoint that is complete on all nodes.",
            )
        )
    return own or first


def _lost_manifest(source: Path) -> bool:
    """Tell whether files lie there that only this library writes, and never without a manifest."""
    names = [path.name for path in source.iterdir() if path.suffix == ".json"]
    return any(layout.is_checkpoint_file(name) and not layout.is_weights(name) for name in names)


def _given(source: Path) -> Path:
    if not source.is_dir():
        raise SettingError(explain(f"{source} is no folder to load a checkpoint from.", remedy="Check the path."))
    return source


def _newest(project: ProjectConfiguration, newest: int | None, verify: manifest.Verify) -> _Choice:
    """Return the newest good checkpoint, of a number up to `newest`, and warn of those that are passed over."""
    if not project.automatic_checkpoint_naming:
        raise SettingError(
            explain(
                "load_state() was given no folder, and automatic_checkpoint_naming is off.", remedy="Pass input_dir."
            )
        )
    folder = _given(checkpoints_folder(project))
    skipped: list[str] = []
    for name in layout.newest_first(path.name for path in folder.iterdir() if path.is_dir()):
        if newest is not None and (layout.checkpoint_number(name) or 0) > newest:
            continue
        try:
            choice = _examine(folder / name, strict=True, verify=verify)
            if choice.manifest is None and not legacy.is_peer_folder(folder / name):
                raise CheckpointError(f"{folder / name} has no {layout.MANIFEST_NAME}.")
        except (CheckpointError, OSError) as error:
            skipped.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if skipped:
            warnings.warn(f"Loading {name}, because newer ones cannot be: {' '.join(skipped)}", stacklevel=5)
        return choice
    raise CheckpointError(
        explain(
            f"{folder} holds no complete checkpoint. {' '.join(skipped)}".rstrip(),
            remedy="Pass the folder of a checkpoint, or start from the beginning.",
        )
    )


@contextmanager
def _fitting(source: Path, stem: str) -> Iterator[None]:
    """Say which file it was, if an object cannot take the state that was read for it.

    Raises:
        Misfit: In place of whatever the object stumbled over.
    """
    try:
        yield
    except AccelerateError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise Misfit(
            explain(
                f"{source / stem} does not fit: {type(error).__name__}: {error}",
                remedy="Prepare what was prepared for the save, in the same order.",
            )
        ) from error


def _check_custom_objects(source: Path, registered: int) -> None:
    saved = layout.custom_indices(path.name for path in source.iterdir())
    if len(saved) != registered:
        raise CheckpointError(
            explain(
                f"{source} holds {len(saved)} registered objects, and {registered} are registered here.",
                remedy="Call register_for_checkpointing with the same objects in the same order as for the save.",
            )
        )


def _only_evaluates(source: Path, optimizers: Sequence[Any]) -> bool:
    """Tell whether what was saved in training is to be evaluated: its loaders are others, or for another use."""
    saved = layout.count_saved(path.name for path in source.iterdir())
    return not optimizers and saved["optimizers"] > 0


def _counts(contents: Contents, *, with_models: bool) -> dict[str, int]:
    counted = {"models": contents.models} if with_models else {}
    counted |= {
        "optimizers": contents.optimizers,
        "schedulers": contents.schedulers,
        "loaders": contents.dataloaders,
    }
    return {kind: len(objects) for kind, objects in counted.items()}


def _check_counts(source: Path, given: Mapping[str, int], strict: bool, *, evaluates: bool, tell: bool) -> None:
    """Refuse to leave saved objects behind, or say that they are."""
    saved = layout.count_saved(path.name for path in source.iterdir())
    left = {
        kind: f"{kind}: {saved[kind]}, prepared here: {count}" for kind, count in given.items() if count < saved[kind]
    }
    # Loaders may be prepared when they are needed, one for each evaluation.
    refused = [text for kind, text in left.items() if kind == "models" or (given[kind] and kind != "loaders")]
    if refused and strict:
        raise CheckpointError(
            explain(
                f"{source} holds more than there is here to load it into ({'; '.join(refused)}).",
                remedy="Prepare what was prepared for the save, in the same order, or pass strict=False to load_state "
                "to load only what is prepared, as for an evaluation.",
            )
        )
    if left and tell:
        places = ""
        if given["loaders"] and saved["loaders"]:
            places = (
                " Without an optimizer this run evaluates: its loaders begin at their start."
                if evaluates
                else " Loaders continue in the order of prepare()."
            )
        warnings.warn(f"{source} holds more than is loaded ({'; '.join(left.values())}).{places}", stacklevel=4)


@dataclass(frozen=True)
class _Part:
    """A state that was read, and what takes it."""

    stem: str
    take: Callable[[Any], Any]
    state: Any


def _read_shared(source: Path, contents: Contents, allow_pickle: bool) -> list[_Part]:
    """Read what all ranks load alike, weights apart, in the order of loading. Changes nothing."""
    names = naming.parameter_names(contents.models)
    groups_may_move = not (contents.schedulers or contents.custom_objects)
    parts = []
    for index, optimizer in enumerate(contents.optimizers):
        stem = layout.numbered(layout.OPTIMIZER_NAME, index)
        with _fitting(source, stem):
            options = {"groups_may_move": groups_may_move, "allow_pickle": allow_pickle}
            state = full.read_optimizer(optimizer, source, index, names, **options)
        parts.append(_Part(stem, optimizer.load_state_dict, state))
    others = [(layout.numbered(layout.SCHEDULER_NAME, index), item) for index, item in enumerate(contents.schedulers)]
    if contents.scaler is not None:
        others.append((layout.SCALER_STEM, contents.scaler))
    others += [(layout.custom_stem(index), item) for index, item in enumerate(contents.custom_objects)]
    for stem, item in others:
        state = train_state.read_state(source, stem, allow_pickle=allow_pickle)
        parts.append(_Part(stem, item.load_state_dict, state))
    return parts


def _load_shared(source: Path, parts: list[_Part]) -> None:
    """Load what was read, and let go of each part then."""
    while parts:
        part = parts.pop(0)
        if part.stem.startswith(layout.CUSTOM_NAME):  # of the user: its errors are raised as they are
            part.take(part.state)
            continue
        with _fitting(source, part.stem):
            part.take(part.state)


def _stems_of_loaders(dataloaders: Sequence[Any], rank: int) -> Iterator[str]:
    for index in range(len(dataloaders)):
        yield layout.numbered(layout.SAMPLER_NAME, index)
        yield layout.loader_stem(index, rank)


def _load_places(source: Path, dataloaders: Sequence[Any], strict: bool, allow_pickle: bool) -> None:
    """Let loaders continue where they were; one that cannot is an error, or begins anew and is named."""
    for index, loader in enumerate(dataloaders):
        stem = layout.numbered(layout.SAMPLER_NAME, index)
        if not train_state.has_own_state(source, stem):
            warnings.warn(f"{source} does not say where loader {index} was; it starts anew.", stacklevel=3)
        elif hasattr(loader, "load_position_state"):  # clients may list loaders that were never prepared
            try:
                with _fitting(source, stem):
                    loader.load_position_state(train_state.read_state(source, stem, allow_pickle=allow_pickle))
            except CheckpointError as error:
                if strict:
                    raise
                warnings.warn(f"Loader {index} starts anew: {error}", stacklevel=3)


def _load_own_reading(source: Path, dataloaders: Sequence[Any], rank: int, allow_pickle: bool) -> None:
    """Load what torchdata's loaders keep of each rank's reading; without it the place is found by reading on."""
    for index, loader in enumerate(dataloaders):
        stem = layout.loader_stem(index, rank)
        if getattr(loader, "use_stateful_dataloader", False) and train_state.has_state(source, stem):
            with _fitting(source, stem):
                loader.load_own_state(train_state.read_state(source, stem, allow_pickle=allow_pickle))
