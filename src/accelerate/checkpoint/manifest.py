"""What a complete checkpoint consists of.

Owns the file that is written last: names, sizes and hashes of all others, and where they come from. A folder
without it is not a complete checkpoint of ours; one that contradicts it is not loaded. It protects itself too, by
a hash of its own content.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch
import xxhash

from ..core.errors import CheckpointError, SettingError, explain
from ..core.versions import __version__
from . import documents, durable, layout, legacy
from .disk_errors import about

FORMAT = 1
MAX_FILES = 200_000
_CHUNK_BYTES = 2**20  # what is hashed is still in the cache of the processor that has read it
_THREADS = 4
_MANY_WRONG = 1000  # that is enough to know
_BLANK = "0" * 16

Verify = Literal["full", "size", "off"]
"""How closely a checkpoint is looked at before it is loaded: each byte, names and sizes, or not at all."""


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
    xxh3: str = ""
    """Of the whole text, in which zeros stand here."""


class _Head(msgspec.Struct):
    """What every format has."""

    format: int
    accelerate: str = "another version"


def write(
    folder: Path, known: Mapping[str, FileEntry], *, save_id: str, world_size: int, step: int, iteration: int
) -> None:
    """Describe everything in `folder`, durably. Reads the files that are not `known`, such as those of hooks.

    Raises:
        CheckpointError: If something lies there that would be refused when it is loaded.
    """
    names = list(durable.files_below(folder))
    _refuse_unreadable(folder, names)
    files = {name: known.get(name) or entry_of(folder / name) for name in names}
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
    durable.write_file(folder / layout.MANIFEST_NAME, to_bytes(content))


def _refuse_unreadable(folder: Path, names: Sequence[str]) -> None:
    problem = ""
    if len(names) > MAX_FILES:
        problem = f"{len(names)} files, and {MAX_FILES} are the most"
    elif outside := [name for name in names if not layout.is_inside(name)]:
        problem = f"a file with a name that other systems take for a place elsewhere: {outside[0][:200]!r}"
    elif links := [name for name in names if (folder / name).is_symlink() and not _lies_in(folder, folder / name)]:
        problem = f"a link that leads out of the folder: {links[0][:200]!r}"
    if problem:
        raise CheckpointError(
            explain(
                f"The checkpoint was given {problem}. It could not be loaded again.",
                remedy="Look at what hooks of save_state write.",
            )
        )


def to_bytes(content: Manifest) -> bytes:
    """Return the text of a manifest, with the hash of its content."""
    blank = msgspec.structs.replace(content, xxh3=_BLANK)
    text = msgspec.json.format(msgspec.json.encode(blank), indent=1) + b"\n"
    head, _, tail = text.rpartition(_BLANK.encode())
    return head + _own_hash(text, _BLANK).encode() + tail


def _own_hash(text: bytes, stated: str) -> str:
    """Return the hash of the whole text, in which the hash that it states stands for nothing."""
    head, _, tail = text.rpartition(stated.encode())
    return xxhash.xxh3_64_hexdigest(head + _BLANK.encode() + tail)


def entry_of(file: Path, told: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Read a file and describe it; `told` hears how many bytes were read, now and then."""
    digest = xxhash.xxh3_64()
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    num_bytes = 0
    with about(file), file.open("rb", buffering=0) as stream:
        while length := stream.readinto(chunk):
            digest.update(chunk[:length])
            num_bytes += length
            told(length)
    return FileEntry(num_bytes, digest.hexdigest())


def read(folder: Path) -> Manifest | None:
    """Return the manifest of `folder`, or None if it has none.

    Raises:
        CheckpointError: If it is damaged, or of a format newer than this version knows.
    """
    file = folder / layout.MANIFEST_NAME
    try:
        text = documents.read_file(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise documents.damaged(file, error) from error
    if (num_files := text.count(b'"num_bytes"')) > MAX_FILES:
        raise documents.damaged(file, f"it names {num_files} files, and {MAX_FILES} are the most")
    head = documents.parse(text, _Head, file)
    if head.format > FORMAT:
        raise CheckpointError(
            explain(
                f"{folder} has checkpoint format {head.format}, written by accelerate {head.accelerate}.",
                accepted=f"formats up to {FORMAT}",
                remedy="Update accelerate.",
            )
        )
    found = documents.parse(text, Manifest, file)
    if len(found.xxh3) != len(_BLANK) or found.xxh3 != _own_hash(text, found.xxh3):
        raise documents.damaged(file, "it has other content than was written")
    if outside := [name for name in found.files if not layout.is_inside(name)]:
        raise CheckpointError(
            explain(f"{file} names {outside[0][:200]!r}, outside its folder.", remedy="Do not trust it.")
        )
    return found


def check_verify(verify: str) -> None:
    """Refuse an unknown way of verifying.

    Raises:
        SettingError: (a `ValueError`) naming those that there are.
    """
    if verify not in get_args(Verify):
        raise SettingError(
            explain(
                f"load_state() was given verify={verify!r}.",
                accepted=get_args(Verify),
                remedy="Leave it out: everything is verified then.",
            )
        )


def check_links(folder: Path) -> None:
    """Refuse links with the name of a checkpoint's file that lead out of the folder: a stranger may have set them.

    Raises:
        CheckpointError: Naming the first one.
    """
    for path in folder.iterdir():
        named = layout.is_checkpoint_file(path.name) or path.name.startswith(layout.FSDP_MODEL_NAME)
        if named and path.is_symlink() and not _lies_in(folder, path):
            raise CheckpointError(
                explain(
                    f"{path} is a link that leaves its folder, to {os.readlink(path)!r}.",
                    remedy="Copy the file in its place if you have set the link; otherwise do not trust the checkpoint.",
                )
            )


def check(folder: Path, manifest: Manifest, verify: Verify = "full") -> None:
    """Compare the folder with its manifest.

    Args:
        folder: The checkpoint.
        manifest: As read from it.
        verify: `"full"` reads all files and compares their content, `"size"` only looks for them and at their sizes.
            Both refuse files with names of a checkpoint that another save has left there. `"off"` does nothing.

    Raises:
        CheckpointError: Naming the files that are missing, different, or of another save.
    """
    if verify == "off":
        return
    looked_at = ((name, problem(folder, name, entry)) for name, entry in manifest.files.items())
    wrong = list(islice((f"{name[:200]} {found}" for name, found in looked_at if found), _MANY_WRONG))
    known = {layout.MANIFEST_NAME, *manifest.files}
    wrong += [
        f"{path.name} does not belong to this save"
        for path in sorted(folder.iterdir())
        if layout.is_checkpoint_file(path.name) and path.name not in known
    ]
    if not wrong and verify == "full":  # reading is slow: not where it is known already that something is wrong
        wrong = [f"{name} has other content than was written" for name in _different(folder, manifest)]
    if wrong:
        number = f"at least {len(wrong) - 5}" if len(wrong) >= _MANY_WRONG else str(len(wrong) - 5)
        more = f"; and {number} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            explain(
                f"The checkpoint {folder} is not complete, or not of one save: {'; '.join(wrong[:5])}{more}.",
                remedy="Load another one. What does not belong there can be moved away.",
            )
        )


def is_whole(folder: Path) -> bool:
    """Tell whether a checkpoint, ours or of Accelerate 1.x, has all its files at their sizes."""
    try:
        found = read(folder)
        if found is not None:
            check(folder, found, "size")
    except (CheckpointError, OSError):
        return False
    return found is not None or legacy.is_peer_folder(folder)


def _different(folder: Path, manifest: Manifest) -> list[str]:
    """Read all files, several at once, and return those that are not what was written."""
    largest_first = sorted(manifest.files, key=lambda name: manifest.files[name].num_bytes, reverse=True)
    with ThreadPoolExecutor(_THREADS) as threads:  # reading and hashing let other threads run
        found = threads.map(lambda name: entry_of(folder / name), largest_first)
        entries = dict(zip(largest_first, found, strict=True))
    return [name for name, entry in manifest.files.items() if entries[name] != entry]


def problem(folder: Path, name: str, entry: FileEntry) -> str:
    """Say what is wrong with a file, as far as its place and its size tell; nothing if all is well."""
    if found := unreadable(folder, name):
        return found
    size = (folder / name).stat().st_size
    return "" if size == entry.num_bytes else f"has {size} bytes in place of {entry.num_bytes}"


def unreadable(folder: Path, name: str) -> str:
    """Say why a file may not, or cannot, be read; nothing if it can."""
    file = folder / name
    try:
        if ("/" in name or file.is_symlink()) and not _lies_in(folder, file):
            return "leads out of the folder"
        return "" if file.is_file() else "is missing"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"


def _lies_in(folder: Path, file: Path) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def stale_files(folder: Path, written: Collection[str]) -> list[str]:
    """Return the files in `folder` that have to go when a new state, of the files `written`, takes its place.

    These are the files of the state that lies there, and files with names of a checkpoint: a load would not know
    which state they belong to.

    Raises:
        CheckpointError: If nothing says that one belongs to a checkpoint: it is not ours to remove.
    """
    try:
        found = read(folder)
    except CheckpointError:
        found = None
    present = {path.name for path in folder.iterdir() if path.is_file()}
    named = {name for name in present if layout.is_checkpoint_file(name)}
    listed = set(found.files) | {layout.MANIFEST_NAME} if found else set[str]()
    gone = sorted((named | listed) - set(written))
    is_checkpoint = found is None and any(layout.marks_checkpoint(name) for name in present)
    if strangers := [] if is_checkpoint else [name for name in gone if name not in listed]:
        raise CheckpointError(
            explain(
                f"{folder} holds files with names that a checkpoint uses, and that no checkpoint there lists: "
                f"{', '.join(strangers[:5])}. They may be weights of save_model, or of another library.",
                remedy="Save into another folder, or move them away.",
            )
        )
    return gone
