"""What a folder holds and whether it is whole, without reading a tensor, running code or changing anything.

Owns the descriptions that `accelerate checkpoint inspect` prints, and `verify`'s comparison with the manifest. Says
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.errors import CheckpointError, explain
from . import commit, dcp, durable, layout, legacy, manifest, source
from .tensor_file import TensorInfo, info_of, read_header
from .trust import is_archive, read_pickle

_PEER_FORM = "a checkpoint of Accelerate 1.x"
Health = Literal["complete", "pending", "unknown", "incomplete"]


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    name: str
    kind: str
    """What it holds, in words."""
    num_bytes: int
    num_tensors: int | None = None
    """None where that is not known without reading more than a header."""
    num_parameters: int | None = None
    """How many numbers the tensors have together."""
    dtypes: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Description:
    """A folder with a checkpoint or weights."""

    folder: str
    form: str
    """What it is, in words."""
    health: Health
    """`pending` is complete, but a file or more is still on its way into place; `unknown` has no manifest to tell."""
    problems: tuple[str, ...]
    """What is missing or wrong."""
    notes: tuple[str, ...]
    """What else there is to know."""
    files: tuple[File, ...]
    saved: manifest.Manifest | None = None
    """Who has saved, and when in the training."""
    written: float | None = None
    """When the manifest was written, in seconds since 1970."""

    @property
    def loadable(self) -> bool:
        """Whether `load_state()` would take it for complete. That its content is what was written, only reading tells."""
        return self.health != "incomplete" and (self.saved is not None or self.form == _PEER_FORM)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True)
class Project:
    """A folder with numbered checkpoints."""

    folder: str
    checkpoints: tuple[Description, ...]
    """Highest number first."""
    newest: str | None
    """The name of the one that `load_state()` would take, if its content is what was written."""
    notes: tuple[str, ...]


class _View:
    """A folder as it will be when an interrupted save in it is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending = commit.pending(folder)
        inside = (
            set(durable.files_below(self.pending.source)) if self.pending and self.pending.source.is_dir() else set()
        )
        gone = set(self.pending.remove) if self.pending else set()
        own = {name for name in durable.files_below(folder) if not name.startswith(layout.PREFIX)}
        self._inside = inside
        self.names = sorted((own - gone) | inside)
        self.manifest = manifest.read(self.path(layout.MANIFEST_NAME).parent)

    def base(self, name: str) -> Path:
        """Return the folder below which the file lies now."""
        return self.pending.source if self.pending and name in self._inside else self.folder

    def path(self, name: str) -> Path:
        return self.base(name) / name


def describe(folder: Path, *, look_inside: bool = True) -> Description:
    """Describe one folder.

    Args:
        folder: A checkpoint of ours or of Accelerate 1.x, a sharded one of torch, or a folder with weights.
        look_inside: Read the headers of the files, too.

    Raises:
        MissingFile: If there is no such folder, or none of these in it.
    """
    _check_there(folder)
    try:
        view = _View(folder)
    except CheckpointError as error:
        return Description(str(folder), "a checkpoint", "incomplete", (_first_line(error),), _leftovers(folder), ())
    sharded = _sharded_folders(folder)
    insides: dict[str, dict[str, TensorInfo] | str] = {}
    if look_inside:
        insides = {name: _inside(view.path(name)) for name in view.names}
    files = tuple(_file(name, view.path(name), insides.get(name, {})) for name in view.names)
    broken = [*_links(folder), *(f"{file.name}: {file.problem}" for file in files if file.problem)]
    notes = _leftovers(folder)
    found = view.manifest
    if found is not None:
        problems = (*_differences(view, found), *broken)
        health: Health = "incomplete" if problems else "pending" if view.pending else "complete"
        if view.pending:
            notes = (*notes, "A save was cut off while it moved its files into place; the next load finishes it.")
        foreign = [f"{name} is no part of this save" for name in _strangers(view, found)]
        written = view.path(layout.MANIFEST_NAME).stat().st_mtime
        return Description(str(folder), "a checkpoint", health, problems, (*notes, *foreign), files, found, written)
    if legacy.is_peer_folder(folder):
        notes = ("It has no manifest: whether all of it was written cannot be told.", *notes)
        problems = (*broken, *_missing(folder, sharded))
        state: Health = "incomplete" if problems else "unknown"
        return Description(str(folder), _PEER_FORM, state, problems, notes, files)
    return _without_manifest(folder, files, [*broken, *_missing(folder, sharded)], notes, sharded)


def _without_manifest(
    folder: Path, files: tuple[File, ...], problems: list[str], notes: tuple[str, ...], sharded: list[Path]
) -> Description:
    states = [file.name for file in files if layout.is_checkpoint_file(file.name) and not layout.is_weights(file.name)]
    if states:
        problems.insert(
            0, f"{layout.MANIFEST_NAME} is missing: the save was cut off, or the folder was not copied whole"
        )
        form = "a checkpoint"
    elif sharded:
        form = "a sharded checkpoint of torch.distributed"
    elif any(layout.is_weights(file.name) for file in files):
        form = "weights"
    else:
        raise layout.MissingFile(
            explain(
                f"{folder} holds neither a checkpoint nor weights.",
                accepted="a folder of save_state or save_model, of Accelerate 1.x, or of torch.distributed.checkpoint; a "
                "project folder with checkpoints/checkpoint_0",
            )
        )
    health: Health = "incomplete" if problems else "complete"
    return Description(str(folder), form, health, tuple(problems), notes, files)


def _check_there(folder: Path) -> None:
    if folder.is_dir():
        return
    beside = folder.parent.glob(f"{layout.SAVING_NAME}-*") if folder.parent.is_dir() else ()
    saving = next((path.name for path in beside), None)
    raise layout.MissingFile(
        explain(
            f"There is no folder {folder}."
            + (f" {saving} beside it is of a save that is running, or was killed." if saving else ""),
            remedy="Pass the folder of a checkpoint.",
        )
    )


def _links(folder: Path) -> list[str]:
    try:
        manifest.check_links(folder)
    except CheckpointError as error:
        return [_first_line(error)]
    return []


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _leftovers(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(layout.PREFIX))
    return tuple(
        f"{name} is of a save that is running, or was killed; the next save removes it."
        for name in names
        if name != layout.COMMIT_NAME
    )


def _differences(view: _View, found: manifest.Manifest) -> Iterator[str]:
    for name, entry in found.files.items():
        if problem := manifest.problem(view.base(name), name, entry):
            yield f"{name} {problem}"


def _strangers(view: _View, found: manifest.Manifest) -> list[str]:
    known = {*found.files, layout.MANIFEST_NAME}
    return [name for name in view.names if layout.is_checkpoint_file(name) and name not in known]


def _sharded_folders(folder: Path) -> list[Path]:
    return [path for path in (folder, *sorted(folder.iterdir())) if path.is_dir() and dcp.is_folder(path)]


def _missing(folder: Path, sharded: list[Path]) -> Iterator[str]:
    """Say which files others need are not there: shards that an index names, pieces that `.metadata` names."""
    for place in sharded:
        try:
            yield from (f"{place / name} is missing or too short" for name in dcp.read_folder(place).missing)
        except CheckpointError:
            continue  # a problem of that file, which is told already
    for index in layout.model_indices(path.name for path in folder.iterdir()):
        try:
            if not any(source.places(folder / layout.model_file(index, safe))[0] for safe in (True, False)):
                yield f"the shards of model {index} have no index"
        except CheckpointError as error:
            yield _first_line(error)


def _file(name: str, path: Path, inside: dict[str, TensorInfo] | str) -> File:
    size = path.stat().st_size if path.is_file() else 0
    kind = layout.in_words(name)
    if isinstance(inside, str):
        return File(name, kind, size, problem=inside)
    if not inside:
        return File(name, kind, size)
    dtypes = tuple(sorted({info.dtype for info in inside.values()}))
    return File(name, kind, size, len(inside), sum(info.numel for info in inside.values()), dtypes)


def _inside(path: Path) -> dict[str, TensorInfo] | str:
    """Return the tensors that a file describes, or what is wrong with it."""
    if not path.is_file():  # to open a pipe would wait for ever
        return "it is no plain file"
    try:
        if path.suffix == ".safetensors":
            return read_header(path).tensors
        if path.name == dcp.METADATA_NAME:
            return {entry.key: entry.info for entry in dcp.read_folder(path.parent).tensors}
        if path.suffix == ".pkl" and (path.parent / layout.MANIFEST_NAME).is_file():
            return {}  # of ours: it holds what can only be read by running it
        if path.suffix in (".bin", ".pt", ".pkl") and layout.is_checkpoint_file(path.name) and is_archive(path):
            found = enumerate(_tensors_in(read_pickle(path, mapped=True)))
            return {str(place): info_of(tensor) for place, tensor in found}
    except CheckpointError as error:
        return _first_line(error)
    except (OSError, RecursionError) as error:
        return f"it cannot be read: {error}"
    return {}


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield each tensor once, and look into each container once: some hold the same one over and over."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def describe_project(folder: Path) -> Project | None:
    """Describe a folder with numbered checkpoints, or its parent; None if it is none."""
    for place in (folder, folder / layout.CHECKPOINTS_FOLDER):
        if not place.is_dir() or (place / layout.MANIFEST_NAME).is_file():
            continue
        names = layout.newest_first(path.name for path in place.iterdir() if path.is_dir())
        if names:
            found = tuple(_describe_any(place / name) for name in names)
            newest = next((name for name, item in zip(names, found, strict=True) if item.loadable), None)
            return Project(str(place), found, newest, _leftovers(place))
    return None


def _describe_any(folder: Path) -> Description:
    try:
        return describe(folder, look_inside=False)
    except layout.MissingFile as error:
        return Description(str(folder), "no checkpoint", "incomplete", (_first_line(error),), (), ())


@dataclass(frozen=True)
class Verdict:
    """What reading all files of a checkpoint has shown."""

    folder: str
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]
    """Each begins with the name of a file."""


def verify(folder: Path, told: Callable[[int], None] = lambda _: None) -> Verdict:
    """Read all files of a checkpoint and compare them with its manifest. Changes nothing.

    Args:
        folder: The checkpoint.
        told: Hears how many bytes were read, now and then.

    Raises:
        MissingFile: If there is no such folder.
    """
    _check_there(folder)
    problems: list[str] = []
    try:
        view = _View(folder)
    except CheckpointError as error:
        return Verdict(str(folder), 0, 0, (_first_line(error),))
    found = view.manifest
    if found is None:
        return Verdict(str(folder), 0, 0, (f"{layout.MANIFEST_NAME} is missing: there is nothing to compare with",))
    for name, entry in found.files.items():
        if problem := manifest.unreadable(view.base(name), name):
            problems.append(f"{name} {problem}")
            continue
        try:
            own = manifest.entry_of(view.path(name), told)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if own != entry:
            other = _other_save(folder, name, own)
            sizes = f", {own.num_bytes} bytes in place of {entry.num_bytes}" if own.num_bytes != entry.num_bytes else ""
            problems.append(f"{name} {other or 'has other content than was written'}{sizes}")
    problems += [f"{name} is no part of this save" for name in _strangers(view, found)]
    total = sum(entry.num_bytes for entry in found.files.values())
    return Verdict(str(folder), len(found.files), total, tuple(problems))


def _other_save(folder: Path, name: str, own: manifest.FileEntry) -> str:
    """Say of which other checkpoint beside `folder` the file is."""
    for place in sorted(folder.resolve().parent.iterdir()):
        try:
            found = manifest.read(place) if place.is_dir() and place.name != folder.resolve().name else None
        except CheckpointError:
            continue
        if found is not None and found.files.get(name) == own:
            return f"is the file of another save: {place.name}, step {found.step}, save {found.save_id}"
    return ""
