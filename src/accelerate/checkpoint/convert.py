"""Write a checkpoint anew in another form: one file or shards, pickles as data, sharded folders as plain weights.

Owns what each kind of folder becomes. `plan` decides, `convert` does. The output is staged like every save: it
appears whole, or not at all. Weights are copied one tensor after the other.

To teach it a further kind of sharded folder, let `source.open_weights` find it, and `plan` name its states.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..collectives.single import SingleProcess
from ..core.errors import CheckpointError, SettingError, explain
from ..runtime.state import current_or_single
from . import commit, dcp, durable, layout, legacy, manifest, train_state
from .source import Source, open_sharded, open_weights, places, rewrite
from .trust import write_pickle
from .weights import stale_weights

_LEGACY_STATE = re.compile(
    rf"(?P<stem>({layout.OPTIMIZER_NAME}|{layout.SCHEDULER_NAME})(_[1-9][0-9]*)?)\.bin"
    rf"|(?P<loader>{layout.LOADER_NAME}(_[1-9][0-9]*)?)\.bin"
    rf"|(?P<scaler>{layout.SCALER_NAME.replace('.', '[.]')})"
    rf"|(?P<numbered>({layout.RNG_STATE_NAME}|{layout.CUSTOM_NAME})_[0-9]+)\.pkl"
)
_LEGACY_SAMPLER = re.compile(rf"{layout.SAMPLER_NAME}(_[1-9][0-9]*)?\.bin")
_SHARDED_WEIGHTS = re.compile(rf"{layout.FSDP_MODEL_NAME}_(0|[1-9][0-9]*)")
_SHARDED_STATES = re.compile(
    rf"{layout.OPTIMIZER_NAME}_[0-9]+|{layout.FSDP_MODEL_NAME}(_[0-9]+)?(_rank[0-9]+)?\.bin"
    rf"|{layout.OPTIMIZER_NAME}_[0-9]+_rank[0-9]+\.bin"
)


@dataclass(frozen=True)
class Origin:
    """What the manifest of the new folder says of the save."""

    world_size: int
    step: int
    iteration: int


@dataclass(frozen=True)
class Plan:
    """What has to be done to write a folder anew."""

    folder: Path
    kind: str
    """What the folder is, in words."""
    models: tuple[int, ...]
    """The models whose weights are written anew."""
    sharded: bool = False
    """Whether the folder itself holds the shards of model 0."""
    states: tuple[tuple[str, str], ...] = ()
    """States in pickles: under which name each is read, and written."""
    copies: tuple[str, ...] = ()
    """Files that stay as they are."""
    left: tuple[str, ...] = ()
    """Files that are left behind, with the reason."""
    origin: Origin | None = None
    """None for weights alone, which have no manifest."""


def plan(folder: Path) -> Plan:
    """Decide what becomes of `folder`. A save that was cut off in the middle of its last step is finished first.

    Raises:
        MissingFile: If there is nothing to convert.
        CheckpointError: If it is not complete, its content is not what was written, or it is of a kind that cannot be
            converted whole.
    """
    if not folder.is_dir():
        raise layout.MissingFile(explain(f"There is no folder {folder}.", remedy="Pass the folder of a checkpoint."))
    commit.recover(folder)
    manifest.check_links(folder)
    found = manifest.read(folder)
    if found is not None:
        # Otherwise a damaged checkpoint would come out with new, matching hashes.
        manifest.check(folder, found, "full")
        return _plan_own(folder, found)
    names = list(durable.files_below(folder))
    if dcp.is_folder(folder):
        left = (*_no_weights(folder), *_others(folder, {*dcp.read_folder(folder).files, dcp.METADATA_NAME}))
        return Plan(folder, "a sharded checkpoint of torch.distributed", (0,), sharded=True, left=left)
    if legacy.is_peer_folder(folder):
        return _plan_peer(folder, names)
    models = _models(folder)
    if not models:
        raise layout.MissingFile(
            explain(
                f"{folder} holds neither a checkpoint nor weights.",
                accepted="a folder of save_state or save_model, of Accelerate 1.x, with .safetensors or .bin weights, "
                "or of torch.distributed.checkpoint",
                remedy="Pass the folder that holds the files themselves, such as checkpoints/checkpoint_0.",
            )
        )
    if states := [name for name in names if layout.is_checkpoint_file(name) and not layout.is_weights(name)]:
        raise CheckpointError(
            explain(
                f"{folder} has no {layout.MANIFEST_NAME}, but states of a run such as {states[0]}: its save was cut "
                "off, or it was not copied whole.",
                remedy="Convert another checkpoint, or copy its weights alone into a folder and convert that.",
            )
        )
    return Plan(folder, "weights", tuple(models), left=(*_unread_weights(folder, models), *_others(folder)))


def _models(folder: Path) -> list[int]:
    sharded = {int(match[1]) for path in folder.iterdir() if (match := _SHARDED_WEIGHTS.fullmatch(path.name))}
    return sorted({*layout.model_indices(path.name for path in folder.iterdir()), *sharded})


def _unread_weights(folder: Path, models: Iterable[int]) -> Iterator[str]:
    """Name the files of weights that are passed over because others hold the same model."""
    for index in models:
        used: list[str] = []
        for safe in (True, False):
            files, _ = places(folder / layout.model_file(index, safe))
            used = used or [file.name for file in files]
        own = {path.name for path in folder.iterdir() if layout.model_indices([path.name]) == [index]}
        indices = (
            {layout.index_file(layout.model_file(index, safe)) for safe in (True, False)} if len(used) > 1 else set()
        )
        yield from (f"{name}: the weights are read from {used[0]}" for name in sorted(own - {*used, *indices}) if used)
        sharded = f"{layout.FSDP_MODEL_NAME}_{index}"
        if dcp.is_folder(folder / sharded):
            yield from ([f"{sharded}: the weights are read from {used[0]}"] if used else _no_weights(folder / sharded))


def _no_weights(folder: Path) -> list[str]:
    return [f"{key[:200]}: no weight" for key in dcp.read_folder(folder).others]


def _others(folder: Path, known: Collection[str] = ()) -> list[str]:
    """Name what else lies in a folder of which only a part is converted."""
    tops = {layout.MANIFEST_NAME, *(name.partition("/")[0] for name in known)}
    return [
        f"{name}: no part of it"
        for name in sorted(path.name for path in folder.iterdir())
        if not (
            name in tops
            or layout.is_weights(name)
            or _SHARDED_WEIGHTS.fullmatch(name)
            or name.startswith(layout.PREFIX)
        )
    ]


def _plan_own(folder: Path, found: manifest.Manifest) -> Plan:
    models = layout.model_indices(found.files)
    copies = tuple(name for name in found.files if not layout.is_weights(name))
    origin = Origin(found.world_size, found.step, found.iteration)
    left = (*_unread_weights(folder, models), *_others(folder, set(found.files)))
    return Plan(folder, "a checkpoint", tuple(models), copies=copies, left=left, origin=origin)


def _plan_peer(folder: Path, names: list[str]) -> Plan:
    if sharded := [path.name for path in folder.iterdir() if _SHARDED_STATES.fullmatch(path.name)]:
        raise CheckpointError(
            explain(
                f"{folder} is a checkpoint of Accelerate 1.x with FSDP: {sharded[0]} holds states that this version "
                "cannot convert.",
                remedy=f"Convert the weights alone: accelerate merge-weights {folder}/{layout.FSDP_MODEL_NAME}_0 OUTPUT",
            )
        )
    ranks = [
        int(match[1]) for name in names if (match := re.fullmatch(rf"{layout.RNG_STATE_NAME}_([0-9]+)\.pkl", name))
    ]
    world_size = len(ranks)
    if sorted(ranks) != list(range(world_size)):
        raise CheckpointError(
            explain(f"{folder} holds the random states of the ranks {sorted(ranks)} only.", remedy="Copy it whole.")
        )
    states: list[tuple[str, str]] = []
    copies: list[str] = []
    left: list[str] = []
    for name in names:
        top = name.partition("/")[0]
        if top.startswith(layout.PREFIX) or _SHARDED_WEIGHTS.fullmatch(top):
            continue
        match = _LEGACY_STATE.fullmatch(name)
        if match and match["loader"]:
            number = int(match["loader"].removeprefix(layout.LOADER_NAME).lstrip("_") or 0)
            stems = [layout.loader_stem(number, rank) for rank in range(world_size)]
            states += [(stem, stem) for stem in stems]
        elif match:
            stem = layout.SCALER_STEM if match["scaler"] else match["stem"] or match["numbered"]
            states.append((stem, stem))
        elif _LEGACY_SAMPLER.fullmatch(name):
            left.append(f"{name}: 1.x does not say in it where its loader was")
        elif layout.is_weights(name):
            continue
        elif (folder / name).is_symlink() or not (folder / name).is_file():
            left.append(f"{name}: no plain file")
        else:
            copies.append(name)
    first = legacy.read_state(folder, layout.rng_stem(0))
    step = first.get("step", 0) if isinstance(first, dict) else 0
    iteration = layout.checkpoint_number(folder.resolve().name) or 0
    models = _models(folder)
    return Plan(
        folder,
        "a checkpoint of Accelerate 1.x",
        tuple(models),
        states=tuple(states),
        copies=tuple(copies),
        left=(*left, *_unread_weights(folder, models)),
        origin=Origin(world_size, step if isinstance(step, int) else 0, iteration),
    )


def convert(
    planned: Plan,
    output: Path,
    max_shard_bytes: int | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> None:
    """Write what `plan` decided into a new folder. Called in one process.

    Args:
        planned: What to write.
        output: A folder that does not exist, or is empty.
        max_shard_bytes: Bytes per file of weights at most; None writes one file for each model.
        told: Called with the bytes of each tensor that was read.

    Raises:
        SettingError: (a `ValueError`) if there is something at `output`.
        CheckpointError: If something cannot be read without running code, is damaged, or cannot be written; there is
            no output then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SettingError(
            explain(f"There is something at {output} already.", accepted="a new or an empty folder", remedy="Move it.")
        )

    def finish(staging: Path, written: Mapping[str, manifest.FileEntry]) -> None:
        if planned.origin is not None:
            origin = planned.origin
            manifest.write(
                staging,
                written,
                save_id=uuid.uuid4().hex,
                world_size=origin.world_size,
                step=origin.step,
                iteration=origin.iteration,
            )

    with commit.staged(output, SingleProcess(), finish=finish) as staging:
        for index in planned.models:
            weights = open_sharded(planned.folder) if planned.sharded else open_weights(planned.folder, index)
            rewrite(weights, staging / layout.model_file(index), max_shard_bytes, told)
        for old, new in planned.states:
            for file in train_state.plan_state(new, legacy.read_state(planned.folder, old)):
                file.write(staging)
        for name in planned.copies:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(planned.folder / name, staging / name)


def merge_fsdp_weights(
    checkpoint_dir: str | Path,
    output_path: str | Path,
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """Write the weights of a sharded checkpoint of FSDP as one file that every tool reads.

    Called on all ranks; collective. Rank 0 reads and writes, the others wait. Runs no code from the folder. Weights
    that are in `output_path` already are replaced when the new ones are complete.

    Args:
        checkpoint_dir: A folder of `torch.distributed.checkpoint`, such as `pytorch_model_fsdp_0`.
        output_path: The folder for `model.safetensors`. Created if needed.
        safe_serialization: Write safetensors, one tensor after the other; otherwise `pytorch_model.bin`, which is a
            pickle, for which all of them have to be in memory.
        remove_checkpoint_dir: Remove `checkpoint_dir` when the output is on the disk.

    Raises:
        SettingError: (a `ValueError`) on all ranks, if `checkpoint_dir` is no such folder, or the output would be
            removed with it.
        CheckpointError: On all ranks, if it is damaged, or holds anything but data. Nothing is removed then.
    """
    folder, output = Path(checkpoint_dir).expanduser(), Path(output_path).expanduser()
    collectives = current_or_single().collectives
    problem = _merge_problem(folder, output, remove_checkpoint_dir) if collectives.rank == 0 else ""
    if problem := collectives.broadcast_object(problem):
        raise SettingError(problem)
    with commit.staged(output, collectives, stale=stale_weights) as staging:
        if collectives.rank == 0:
            _write_merged(open_sharded(folder), staging, safe_serialization)
    if remove_checkpoint_dir:
        with commit.together(collectives, f"{folder} was merged into {output}, and not removed"):
            if collectives.rank == 0:
                shutil.rmtree(folder)


def _merge_problem(folder: Path, output: Path, remove: bool) -> str:
    if not dcp.is_folder(folder):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{dcp.METADATA_NAME}")) if folder.is_dir() else []
        return explain(
            f"{folder} is no sharded checkpoint: {dcp.METADATA_NAME} is not there.",
            accepted="a folder of torch.distributed.checkpoint, such as pytorch_model_fsdp_0",
            remedy=f"Pass {folder / inside[0]}." if inside else "Pass the folder that holds the .distcp files.",
        )
    if remove and output.resolve().is_relative_to(folder.resolve()):
        return explain(
            f"The output {output} lies in {folder}, which is to be removed.", remedy="Write it somewhere else."
        )
    return ""


def _write_merged(weights: Source, staging: Path, safe_serialization: bool) -> None:
    file = staging / layout.model_file(0, safe_serialization)
    if safe_serialization:
        rewrite(weights, file)
    else:
        write_pickle({name: weights.read(name) for name in weights.tensors}, file)
