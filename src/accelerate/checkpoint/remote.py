"""Checkpoints at an address: `s3://`, `gs://`, `hf://`, `memory://`, and what else fsspec knows.

Owns the order in which files get there, and the only import of fsspec. There are no folders to rename at an address,
and nothing to flush. So the files of a save go under a name that no other save has, `files-<save id>/`, and the manifest
last, as one object: that is the decision. Until then the manifest that is there names the older files, which go
afterwards. An address without a manifest holds no complete checkpoint.

Called by `session.remote`.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..collectives.base import Collectives
from ..core.addresses import hidden, shown
from ..core.available import require
from ..core.errors import AccelerateError, CheckpointError, MissingPackage, explain
from . import commit, layout, manifest

MAX_MANIFEST_BYTES = 2**27
"""More than a manifest of `manifest.MAX_FILES` files takes."""


class Unreachable(CheckpointError):
    """An address could not be reached. That says nothing about what is there."""


@dataclass(frozen=True)
class Place:
    """An address, and how to get there."""

    address: str
    system: Any
    path: str

    def at(self, *names: str) -> str:
        """Return the path of something below the address."""
        return "/".join([self.path, *names])


def is_address(folder: object) -> bool:
    """Tell whether a destination is an address such as `s3://bucket/run`, and no folder."""
    return isinstance(folder, str) and "://" in folder


def below(address: str, *names: str) -> str:
    """Return the address of something below `address`."""
    return "/".join([address.rstrip("/"), *names])


def open_place(address: str) -> Place:
    """Find out how to get to an address.

    Raises:
        MissingPackage: (an `ImportError`) if fsspec is not installed, or what it needs for this kind of address.
        Unreachable: If nobody knows this kind.
    """
    require("fsspec", setting=repr(shown(address)), install="'accelerate[remote]'")
    import fsspec

    with _told(address):
        try:
            system, path = fsspec.core.url_to_fs(address)
        except ImportError as error:
            kind = address.partition("://")[0]
            raise MissingPackage(
                explain(
                    f"{shown(address)!r} needs a package that is missing: {error}",
                    remedy=f"Install it to use {kind}://.",
                )
            ) from error
    # What other processes have written has to be seen.
    system.invalidate_cache()
    return Place(address, system, str(path).rstrip("/"))


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn whatever a file system raises into one kind of error that names the address.

    Raises:
        Unreachable: In place of it.
    """
    try:
        yield
    except AccelerateError:
        raise
    except Exception as error:  # noqa: BLE001 - file systems raise anything
        told = hidden(str(error), address)
        raise Unreachable(
            explain(
                f"{shown(address)} cannot be reached: {type(error).__name__}: {told}",
                remedy="Check the address and who may use it, and try again.",
            )
        ) from (error if told == str(error) else None)


# Writing ------------------------------------------------------------------------------------------------------------


def upload(folder: Path, address: str, collectives: Collectives, leads: bool) -> None:
    """Copy a complete local checkpoint to an address. Called on all ranks; collective.

    Args:
        folder: The checkpoint, with its manifest. With several nodes each has its part.
        address: Where to. What is there is replaced when the new one is complete.
        collectives: How ranks tell each other.
        leads: Whether this rank copies what lies on its disk.

    Raises:
        CheckpointError: On all ranks, if something failed on one; the address holds what it held before.
    """
    problem = f"The checkpoint {shown(address)} was not written"
    found: manifest.Manifest | None = None
    with commit.together(collectives, problem):
        found = manifest.read(folder) if leads else None
    parts: list[manifest.Manifest | None] = collectives.all_gather_object(found)
    with commit.together(collectives, problem):
        if found is not None:
            taken = {name for part in parts[: collectives.rank] if part is not None for name in part.files}
            _copy_up(folder, open_place(address), found, [name for name in found.files if name not in taken])
    with commit.together(collectives, problem):
        if collectives.rank == 0:
            _publish(open_place(address), [part for part in parts if part is not None])


def _copy_up(folder: Path, place: Place, found: manifest.Manifest, names: list[str]) -> None:
    with _told(place.address):
        for name in names:
            target = place.at(layout.FILES_PREFIX + found.save_id, name)
            place.system.makedirs(target.rpartition("/")[0], exist_ok=True)
            place.system.put_file(str(folder / name), target)


def _publish(place: Place, parts: list[manifest.Manifest]) -> None:
    files = {name: entry for part in reversed(parts) for name, entry in part.files.items()}
    whole = msgspec.structs.replace(parts[0], files=files)
    with _told(place.address):
        _replace(place, layout.MANIFEST_NAME, manifest.to_bytes(whole))
    try:
        _remove_files(place, keep=layout.FILES_PREFIX + whole.save_id)
    except Exception as error:  # noqa: BLE001 - file systems raise anything, and the save is decided
        told = hidden(f"{type(error).__name__}: {error}", place.address)
        warnings.warn(
            f"The checkpoint {shown(place.address)} was written, and files of older saves there could not be removed: "
            f"{told}. The next save there tries again.",
            stacklevel=2,
        )


def _replace(place: Place, name: str, content: bytes) -> None:
    """Write one object so that at any instant the old or the new content is there."""
    protocol = place.system.protocol
    if "file" not in ([protocol] if isinstance(protocol, str) else protocol):
        place.system.pipe_file(place.at(name), content)
        return
    # On a disk an object is a file, which is not written in one piece, but renamed in one.
    aside = place.at(f"{layout.SAVING_NAME}-{name}")
    place.system.pipe_file(aside, content)
    place.system.mv(aside, place.at(name))


def _remove_files(place: Place, keep: str = "") -> None:
    for name in _names(place):
        if name.startswith(layout.FILES_PREFIX) and name != keep:
            place.system.rm(place.at(name), recursive=True)


def _names(place: Place) -> list[str]:
    try:
        found = place.system.ls(place.path, detail=False)
    except FileNotFoundError:
        return []
    return [str(path).rstrip("/").rpartition("/")[2] for path in found]


def upload_weights(folder: Path, address: str) -> None:
    """Copy weights to an address under their own names, for other tools. Called on one rank.

    The index goes last; where weights of the same names are there already, it is removed first.
    """
    place = open_place(address)
    new = sorted((path.name for path in folder.iterdir()), key=lambda name: (name.endswith(".index.json"), name))
    with _told(address):
        old = [name for name in _names(place) if layout.is_weights(name)]
        for name in old:
            if name.endswith(".index.json"):
                place.system.rm_file(place.at(name))
        place.system.makedirs(place.path, exist_ok=True)
        for name in new:
            place.system.put_file(str(folder / name), place.at(name))
        for name in old:
            if name not in new and not name.endswith(".index.json"):
                place.system.rm_file(place.at(name))


def rotate(checkpoints: str, total_limit: int | None, newest: str) -> list[str]:
    """Remove the oldest numbered checkpoints at an address beyond the limit. Called on one rank."""
    place = open_place(checkpoints)
    with _told(checkpoints):
        removed = layout.plan_rotation(_names(place), total_limit, newest)
        for name in removed:
            # The manifest first: without it nobody takes the rest for a checkpoint.
            if place.system.exists(place.at(name, layout.MANIFEST_NAME)):
                place.system.rm_file(place.at(name, layout.MANIFEST_NAME))
            place.system.rm(place.at(name), recursive=True)
    return removed


# Reading ------------------------------------------------------------------------------------------------------------


def numbered(checkpoints: str) -> list[str]:
    """Return the names of the numbered checkpoints at an address, highest number first, complete or not."""
    with _told(checkpoints):
        return layout.newest_first(_names(open_place(checkpoints)))


def has_manifest(address: str) -> bool:
    """Tell whether there is a complete checkpoint at an address, or what is left of one."""
    place = open_place(address)
    with _told(address):
        return place.system.exists(place.at(layout.MANIFEST_NAME))


def download(address: str, folder: Path) -> manifest.Manifest:
    """Copy a checkpoint into a local folder, and compare every file with the manifest. Called on one rank per disk.

    Args:
        address: Where the checkpoint is.
        folder: A folder that does not exist.

    Raises:
        MissingFile: If there is no manifest.
        Unreachable: If the address cannot be reached.
        CheckpointError: If a file is missing or damaged, or the manifest names one elsewhere.
    """
    place = open_place(address)
    folder.mkdir(parents=True)
    found = _read_manifest(place, folder)
    names = {name: place.at(layout.FILES_PREFIX + found.save_id, name) for name in found.files}
    # Before anything is copied: nobody knows what lies there, and how much.
    for name, entry in found.files.items():
        size = _size(place, names[name])
        if size is not None and size != entry.num_bytes:
            raise CheckpointError(
                explain(
                    f"{name[:200]} at {shown(address)} has {size} bytes in place of {entry.num_bytes}.",
                    remedy="Load another.",
                )
            )
    for name, path in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _told(address):
            try:
                place.system.get_file(path, str(folder / name))
            except FileNotFoundError:
                continue  # told below, with all others
    manifest.check(folder, found, "full")
    return found


def _read_manifest(place: Place, folder: Path) -> manifest.Manifest:
    address, path = shown(place.address), place.at(layout.MANIFEST_NAME)
    size = _size(place, path)
    if size is None:
        raise layout.MissingFile(
            explain(f"{address} has no {layout.MANIFEST_NAME}: it is no complete checkpoint.", remedy="Load another.")
        )
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            explain(
                f"{address} has a {layout.MANIFEST_NAME} of {size} bytes.",
                accepted=f"up to {MAX_MANIFEST_BYTES}",
                remedy="Do not trust it.",
            )
        )
    with _told(place.address):
        place.system.get_file(path, str(folder / layout.MANIFEST_NAME))
    found = manifest.read(folder)
    assert found is not None
    if not layout.is_file_name(layout.FILES_PREFIX + found.save_id):
        raise CheckpointError(explain(f"{address} has the save id {found.save_id!r}.", remedy="Do not trust it."))
    return found


def _size(place: Place, path: str) -> int | None:
    """Return how many bytes a file has; `None` if it is not there."""
    with _told(place.address):
        try:
            size = place.system.info(path)["size"]
        except FileNotFoundError:
            return None
        if size is None:
            raise OSError("it does not tell how large its files are")
        return size


@contextmanager
def scratch(collectives: Collectives, leads: bool) -> Iterator[Path]:
    """Give all ranks of a node one local folder that is gone afterwards. Called on all ranks; collective."""
    token = collectives.broadcast_object(uuid.uuid4().hex)
    root = Path(tempfile.gettempdir()) / f"accelerate-{token}"
    try:
        with commit.together(collectives, f"{root} could not be made"):
            if leads:
                root.mkdir(mode=0o700)  # fails if somebody else has it
        yield root
    finally:
        if leads:
            shutil.rmtree(root, ignore_errors=True)
