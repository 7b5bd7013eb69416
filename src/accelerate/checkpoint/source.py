"""Weights where they lie: what there is, and one tensor at a time.

Owns the different files that weights are found in, so that whoever rewrites them need not know which. Nothing is in
memory but the tensor that was asked for last; files of `torch.save` are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch

from ..core.errors import CheckpointError, explain
from . import dcp, durable, layout
from .tensor_file import TensorInfo, info_of, read_header, write_tensors
from .trust import read_pickle
from .weights import TIED_KEY, plan_index, plan_shards, read_index, separate_tied, tied_metadata

_REPEATED = 4
_REPEATED_BYTES = 2**24
"""Tensors that show the same numbers again may grow to so many times what is stored, and this, when they are written out."""


@dataclass(frozen=True)
class Source:
    """Weights of one model."""

    tensors: dict[str, TensorInfo]
    tied: dict[str, str]
    """Names that show the same tensor as another one."""
    read: Callable[[str], torch.Tensor]
    """Returns one of `tensors` on the CPU."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What else the files say, such as a license."""

    @property
    def num_bytes(self) -> int:
        """How many bytes all tensors have."""
        return sum(info.num_bytes for info in self.tensors.values())


def open_weights(folder: Path, index: int = 0) -> Source:
    """Find the weights of model `index` in `folder`; safetensors are preferred, then `torch.save`, then sharded ones.

    Raises:
        MissingFile: If there are none, or a file of several is not there.
        CheckpointError: If a file is damaged, holds something else than tensors, or an index names a file elsewhere.
    """
    for safe in (True, False):
        file = folder / layout.model_file(index, safe)
        files, names = places(file)
        if files:
            found = _of_safetensors(files) if safe else _of_pickles(files)
            if lost := [name for name in names if name not in found.tensors and name not in found.tied]:
                raise CheckpointError(
                    explain(f"The index of {file} names tensors that no file holds: {', '.join(lost[:5])}.")
                )
            return found
    sharded = folder / f"{layout.FSDP_MODEL_NAME}_{index}"
    if dcp.is_folder(sharded):
        return open_sharded(sharded)
    raise layout.MissingFile(
        explain(
            f"{folder} holds no weights of model {index}.",
            accepted=f"{layout.model_file(index)}, {layout.model_file(index, False)}, their shards with an index, or "
            f"{sharded.name}",
        )
    )


def open_sharded(folder: Path) -> Source:
    """Find the weights in a distributed checkpoint of torch.

    Raises:
        MissingFile: If it is none.
        CheckpointError: If it is damaged.
    """
    found = dcp.read_folder(folder)
    tensors = {name: entry.info for name, entry in found.weights.items()}
    return Source(tensors, {}, lambda name: dcp.read_tensor(found, name))


def places(file: Path) -> tuple[list[Path], list[str]]:
    """Return the files that hold what `file` stands for, and the tensors that they have to hold.

    Raises:
        MissingFile: If an index names a file that is not there.
        CheckpointError: If an index is damaged, or names a file elsewhere.
    """
    index = file.with_name(layout.index_file(file.name))
    if file.is_file() or not index.is_file():
        return [file] if file.is_file() else [], []
    place = read_index(index)
    return list(dict.fromkeys(place.values())), list(place)


def _of_safetensors(files: list[Path]) -> Source:
    tensors: dict[str, TensorInfo] = {}
    tied: dict[str, str] = {}
    place: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        tensors |= header.tensors
        place |= dict.fromkeys(header.tensors, file)
        tied |= _tied(file, header.metadata)
        metadata |= {key: value for key, value in header.metadata.items() if key != TIED_KEY}

    opened = _OpenFile()
    return Source(
        tensors,
        {name: target for name, target in tied.items() if target in tensors},
        lambda name: opened.read(place[name], name),
        metadata,
    )


class _OpenFile:
    """The file that was read last stays open: each opening reads its header again."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: Any = None

    def read(self, file: Path, name: str) -> torch.Tensor:
        if file != self._file:
            self._content = safetensors.safe_open(file, "pt")
            self._file = file
        return self._content.get_tensor(name)


def _tied(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        return msgspec.json.decode(metadata.get(TIED_KEY, "{}"), type=dict[str, str])
    except msgspec.DecodeError as error:
        raise CheckpointError(explain(f"{file} is damaged: {error}", remedy="Use another checkpoint.")) from error


def _of_pickles(files: list[Path]) -> Source:
    state: dict[str, torch.Tensor] = {}
    for file in files:
        found = read_pickle(file, mapped=True)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise CheckpointError(
                explain(f"{file} is no dictionary of names and tensors.", remedy="Pass weights that were saved alone.")
            )
        state |= found
    kept, tied = separate_tied(state)
    needed = sum(info_of(tensor).num_bytes for tensor in kept.values())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept.values()}
    stored = sum(storages.values())
    if needed > _REPEATED * stored + _REPEATED_BYTES:
        # One number that is shown a billion times is small in the file, and fills the disk when it is written out.
        largest = max(kept, key=lambda name: info_of(kept[name]).num_bytes)
        raise CheckpointError(
            explain(
                f"The tensors in {files[0].parent} have {needed} bytes, and only {stored} in their file; "
                f"{largest[:200]!r} has the shape {list(kept[largest].shape)}.",
                remedy="Do not trust it.",
            )
        )
    return Source({name: info_of(tensor) for name, tensor in kept.items()}, tied, kept.__getitem__)


def rewrite(
    source: Source,
    file: Path,
    max_shard_bytes: int | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> None:
    """Write weights as safetensors to `file`, or to shards named after it and an index, one tensor after the other.

    Args:
        source: The weights.
        file: What to write, `model.safetensors`.
        max_shard_bytes: Bytes per file at most; None writes one file.
        told: Called with the bytes of each tensor that was read.
    """
    plan = plan_shards({name: info.num_bytes for name, info in source.tensors.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        told(source.tensors[name].num_bytes)
        return tensor

    for number, names in enumerate(plan, start=1):
        shard = file.with_name(layout.shard_file(file.name, number, len(plan)))
        tensors = {name: source.tensors[name] for name in names}
        tied = {name: target for name, target in source.tied.items() if target in tensors}
        with shard.open("wb") as stream:
            write_tensors(stream, tensors, read, {"format": "pt", **source.metadata, **tied_metadata(tied)})
        durable.flush_file(shard)
        weight_map.update(dict.fromkeys(names, shard.name))
    if len(plan) > 1:
        index = plan_index(file.name, weight_map, source.num_bytes)
        durable.write_file(file.with_name(index.name), index.content)
