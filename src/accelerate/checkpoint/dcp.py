"""Reads folders of torch's distributed checkpoints: `.metadata` and `__0_0.distcp`, as Accelerate 1.x writes for FSDP.

Owns what such a folder means, and that reading it runs nothing: `.metadata` is a pickle, and torch loads it as one.
Here it is read as plain records, every name and number in it is checked, and tensors come from the files one piece
after the other. Works in one process, whatever number of processes has written.

Imports nothing of `torch.distributed`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, explain
from . import layout
from .tensor_file import TensorInfo, check_shape, dtype_name
from .trust import Record, load_tensor, read_records

METADATA_NAME = ".metadata"
DATA_SUFFIX = ".distcp"
MODEL_KEY = "model"
"""Under this key lie the weights, if a checkpoint holds more than them."""

_PLACE = "torch.distributed.checkpoint.metadata"
_OLD_PLACE = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES = frozenset(
    {
        *(
            (_PLACE, name)
            for name in (
                "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            )
        ),
        (_OLD_PLACE, "TensorProperties"),
        (_OLD_PLACE, "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A block of one tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder."""

    key: str
    """What the folder calls it: `"model.0.weight"`."""
    info: TensorInfo
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    path: Path
    tensors: tuple[Entry, ...]
    weights: dict[str, Entry]
    """Those that are weights, by the name that the model gives them."""
    others: tuple[str, ...]
    """Keys of everything else: tensors that are no weights, and values that are no tensors."""
    files: dict[str, int]
    """Every file that is named, and how long it has to be."""

    @property
    def missing(self) -> list[str]:
        """Files that are not there, or too short."""
        return [name for name, length in self.files.items() if _size(self.path / name) < length]


def is_folder(folder: Path) -> bool:
    """Tell whether `folder` is a distributed checkpoint of torch."""
    return (folder / METADATA_NAME).is_file()


def read_folder(folder: Path) -> Folder:
    """Read what `folder` holds; no tensor.

    Raises:
        MissingFile: If it is no distributed checkpoint.
        CheckpointError: If its `.metadata` is damaged, names files elsewhere, or something that is no description of
            tensors.
    """
    file = folder / METADATA_NAME
    if not file.is_file():
        raise layout.MissingFile(
            explain(
                f"{folder} is no sharded checkpoint: {METADATA_NAME} is not there.",
                accepted="a folder of torch.distributed.checkpoint, such as pytorch_model_fsdp_0",
                remedy="Pass the folder that holds the .distcp files.",
            )
        )
    _check_place(folder, METADATA_NAME)
    found = read_records(file, _CLASSES)
    try:
        return _folder(folder, found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(explain(f"{file} is damaged: {error}", remedy="Use another checkpoint.")) from error


def _folder(folder: Path, found: Any) -> Folder:
    content = _fields(found, "Metadata")
    places = {_index(key): _storage(value) for key, value in _dict(content["storage_data"]).items()}
    tensors: dict[str, Entry] = {}
    others: list[str] = []
    for key, value in _dict(content["state_dict_metadata"]).items():
        if not isinstance(key, str) or not isinstance(value, Record):
            raise TypeError("it describes something that has no name")
        if value.kind == "TensorStorageMetadata":
            tensors[key] = _entry(key, value.state, places)
        else:
            others.append(key)
    paths = _paths(content.get("planner_data"))
    weights = _weights(tensors, paths)
    files: dict[str, int] = {}
    for name, start, length in sorted(places.values()):
        if name not in files:
            _check_place(folder, name)
        if start < files.get(name, 0) and length:  # a small file would become a large one
            raise ValueError("two pieces share bytes of a file")
        files[name] = max(files.get(name, 0), start + length)
    taken = {entry.key for entry in weights.values()}
    return Folder(
        folder, tuple(tensors.values()), weights, (*others, *(key for key in tensors if key not in taken)), files
    )


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, Record) or record.kind != kind or not isinstance(record.state, dict):
        raise TypeError(f"there is no {kind} where one should be")
    return record.state


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("there is no dictionary where one should be")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(item) is int for item in value):
        raise TypeError("there are no sizes where some should be")
    check_shape(value)
    return value


def _index(record: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    name = fields["fqn"]
    if type(name) is not str:  # to print a list could take all memory
        raise TypeError("the name of a tensor is no text")
    return name, None if offset is None else _numbers(offset)


def _storage(record: Any) -> tuple[str, int, int]:
    fields = _fields(record, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError("its data is compressed, which this version cannot read")
    name = fields["relative_path"]
    if not isinstance(name, str):
        raise TypeError("the name of a file is no text")
    start, length = _numbers((fields["offset"], fields["length"]))
    return name, start, length


def _entry(key: str, state: Any, places: Mapping[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]) -> Entry:
    fields = _dict(state)
    properties = fields["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else _dict(properties)["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"the type of {key[:200]!r} is not known")
    shape = _numbers(fields["size"])
    pieces: list[Piece] = []
    for chunk in fields["chunks"]:
        place = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _numbers(place["offsets"]), _numbers(place["sizes"])
        pieces.append(Piece(offsets, sizes, *places[key, offsets]))
        if pieces[-1].length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{pieces[-1].length} bytes cannot hold a piece of {key[:200]!r} of shape {list(sizes)}")
    _check_cover(key, shape, pieces)
    return Entry(key, TensorInfo(dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize), tuple(pieces))


def _check_cover(key: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    """Refuse a tensor of which a part is not there, or there twice."""
    for piece in pieces:
        if not len(piece.offsets) == len(piece.sizes) == len(shape):
            raise ValueError(f"a piece of {key[:200]!r} has another number of dimensions")
        if any(begin + size > whole for begin, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)):
            raise ValueError(f"a piece of {key[:200]!r} lies outside it")
    solid = [piece for piece in pieces if math.prod(piece.sizes)]
    if sum(math.prod(piece.sizes) for piece in solid) != math.prod(shape):
        raise ValueError(f"the pieces of {key[:200]!r} do not make up its shape {list(shape)}")
    if len(solid) < 2:
        return
    # Along the dimension that is cut most, few pieces have to be compared with each other.
    axis = max(range(len(shape)), key=lambda dim: len({piece.offsets[dim] for piece in solid}))
    near: list[Piece] = []
    for piece in sorted(solid, key=lambda piece: piece.offsets[axis]):
        near = [other for other in near if other.offsets[axis] + other.sizes[axis] > piece.offsets[axis]]
        if any(_overlap(piece, other) for other in near):
            raise ValueError(f"two pieces of {key[:200]!r} overlap")
        near.append(piece)


def _overlap(one: Piece, other: Piece) -> bool:
    dims = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(begin < start + length and start < begin + size for begin, size, start, length in dims)


def _paths(planned: Any) -> dict[str, tuple[str, ...]]:
    """Return the places in nested dictionaries from which the keys were made, where the folder says so."""
    if not isinstance(planned, dict):
        return {}
    return {
        key: tuple(str(part) for part in path)
        for key, path in planned.items()
        if isinstance(key, str) and isinstance(path, tuple) and all(type(part) in (str, int) for part in path)
    }


def _weights(tensors: Mapping[str, Entry], paths: Mapping[str, tuple[str, ...]]) -> dict[str, Entry]:
    nested = {
        key: ".".join(path[1:]) for key, path in paths.items() if key in tensors and path[0] == MODEL_KEY and path[1:]
    }
    names = nested or {key: key for key in tensors}
    found = {name: tensors[key] for key, name in names.items()}
    if len(found) != len(names):
        raise ValueError("two of its tensors have the same name")
    return found


def _check_place(folder: Path, name: str) -> None:
    inside = layout.is_inside(name) and (folder / name).resolve().is_relative_to(folder.resolve())
    if not inside:
        raise CheckpointError(
            explain(f"{folder / METADATA_NAME} names the file {name!r}, outside its folder.", remedy="Do not trust it.")
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def read_tensor(folder: Folder, name: str) -> torch.Tensor:
    """Read one of the weights onto the CPU, put together from its pieces.

    Raises:
        MissingFile: If a file is not there.
        CheckpointError: If a piece is damaged, is something else than was announced, or needs code to be read.
    """
    entry = folder.weights[name]
    whole = None
    for piece, content in _pieces(folder, entry):
        if piece.sizes == entry.info.shape:
            return content.contiguous()
        if whole is None:
            whole = torch.empty(entry.info.shape, dtype=content.dtype)
        place = tuple(slice(begin, begin + size) for begin, size in zip(piece.offsets, piece.sizes, strict=True))
        whole[place] = content
    return torch.empty(entry.info.shape, dtype=getattr(torch, entry.info.dtype)) if whole is None else whole


def _pieces(folder: Folder, entry: Entry) -> Iterator[tuple[Piece, torch.Tensor]]:
    for piece in entry.pieces:
        file = folder.path / piece.file
        if _size(file) < piece.start + piece.length:
            raise layout.MissingFile(
                explain(f"{file}, with a part of {entry.key!r}, is missing or too short.", remedy="Copy it again.")
            )
    for piece in entry.pieces:
        file = folder.path / piece.file
        with file.open("rb") as stream:
            stream.seek(piece.start)
            content = load_tensor(io.BytesIO(stream.read(piece.length)), f"{entry.key!r} in {file}")
        if tuple(content.shape) != piece.sizes or dtype_name(content.dtype) != entry.info.dtype:
            raise CheckpointError(
                explain(
                    f"{entry.key!r} in {file} is {dtype_name(content.dtype)} {list(content.shape)} in place of "
                    f"{entry.info.dtype} {list(piece.sizes)}.",
                    remedy="The files are of different saves. Use another checkpoint.",
                )
            )
        yield piece, content
