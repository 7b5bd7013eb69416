"""What a complete checkpoint consists of.

Owns the file that is written last: names, sizes and hashes of all others, and where they come from. A folder
without it is not a complete checkpoint of ours; one that contradicts it is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import xxhash

from ..core.errors import CheckpointError, explain
from ..core.versions import __version__
from . import durable, layout

FORMAT = 1
_CHUNK_BYTES = 2**22


class FileEntry(msgspec.Struct, frozen=True):
    """One file."""

    num_bytes: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the folder holds, and who wrote it."""

    format: int
    save_id: str
    """The same on all disks of one save, and never again."""
    world_size: int
    step: int
    iteration: int
    accelerate: str
    torch: str
    files: dict[str, FileEntry]


def write(folder: Path, *, save_id: str, world_size: int, step: int, iteration: int) -> None:
    """Describe everything in `folder`, durably. Reads each file once."""
    files = {name: entry_of(folder / name) for name in durable.files_below(folder)}
    content = Manifest(
        format=FORMAT,
        save_id=save_id,
        world_size=world_size,
        step=step,
        iteration=iteration,
        accelerate=__version__,
        torch=str(torch.__version__),
        files=files,
    )
    text = msgspec.json.format(msgspec.json.encode(content), indent=1)
    durable.write_file(folder / layout.MANIFEST_NAME, text + b"\n")


def entry_of(file: Path, told: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Read a file and describe it; `told` hears how many bytes were read, now and then."""
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            told(len(chunk))
    return FileEntry(file.stat().st_size, digest.hexdigest())


def read(folder: Path) -> Manifest | None:
    """Return the manifest of `folder`, or None if it has none.

    Raises:
        CheckpointError: If it is damaged, or of a format newer than this version knows.
    """
    file = folder / layout.MANIFEST_NAME
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(explain(f"{file} is damaged: {error}", remedy="Use another checkpoint.")) from error
    if found.format > FORMAT:
        raise CheckpointError(
            explain(
                f"{folder} has checkpoint format {found.format}, written by accelerate {found.accelerate}.",
                accepted=f"formats up to {FORMAT}",
                remedy="Update accelerate.",
            )
        )
    if outside := [name for name in found.files if not layout.is_inside(name)]:
        raise CheckpointError(explain(f"{file} names {outside[0]!r}, outside its folder.", remedy="Do not trust it."))
    return found


def check(folder: Path, manifest: Manifest, hashes: bool = False) -> None:
    """Compare the folder with its manifest.

    Args:
        folder: The checkpoint.
        manifest: As read from it.
        hashes: Read all files and compare their content, not only their sizes.

    Raises:
        CheckpointError: Naming the files that are missing or different.
    """
    wrong: list[str] = []
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif (size := file.stat().st_size) != entry.num_bytes:
            wrong.append(f"{name} has {size} bytes in place of {entry.num_bytes}")
        elif hashes and entry_of(file) != entry:
            wrong.append(f"{name} has other content than was written")
    if wrong:
        raise CheckpointError(
            explain(f"The checkpoint {folder} is not complete: {'; '.join(wrong)}.", remedy="Load an earlier one.")
        )


def files_of(folder: Path) -> list[str]:
    """Return the files of the state that lies in `folder`: what a new state there has to remove.

    Without a manifest, these are the files with names that a checkpoint uses.
    """
    try:
        found = read(folder)
    except CheckpointError:
        found = None
    names = {path.name for path in folder.iterdir() if path.is_file() and layout.is_checkpoint_file(path.name)}
    return sorted(names | set(found.files if found else ()))
