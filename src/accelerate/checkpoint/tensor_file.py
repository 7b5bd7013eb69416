"""safetensors files piece by piece: what a file holds, and writing one tensor at a time.

Owns the header of the format. Reading it touches no tensor; writing holds no more than one. Files are laid out as
the safetensors library lays them out, so that the same tensors make the same bytes.

Whole files are read and written by `weights`, with that library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import torch

from ..core.errors import CheckpointError, explain

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts."""
MAX_DIMS = 64
"""As many as torch has. To multiply a million of large numbers takes hours."""

# In the order in which their tensors stand in a file.
_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, without its numbers."""

    dtype: str
    """As `torch` calls it: `"float32"`."""
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    num_bytes: int
    """The size of the whole file."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Describe a tensor."""
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.numel() * tensor.element_size())


def dtype_name(dtype: torch.dtype) -> str:
    """Return `"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def has_form(info: TensorInfo) -> bool:
    """Tell whether safetensors has a word for tensors like this one."""
    return getattr(torch, info.dtype, None) in _NAMES


def check_shape(shape: Sequence[int]) -> None:
    """Refuse what can be no shape of a tensor, before anything is multiplied.

    Raises:
        ValueError: Without the shape, which may be long.
    """
    if len(shape) > MAX_DIMS or not all(0 <= size < 2**63 for size in shape):
        raise ValueError("there is a shape in it that no tensor can have")


def read_header(file: Path) -> Header:
    """Read what a safetensors file holds, and none of its tensors.

    Raises:
        CheckpointError: If it is no such file, or its parts do not fit together or its size.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header of {length} bytes does not fit into {size}")
            header = _parse(stream.read(length), length)
        if header.num_bytes != size:
            raise ValueError(f"it has {size} bytes in place of {header.num_bytes}")
    except (ValueError, RecursionError) as error:
        # msgspec's own errors are ValueErrors.
        raise CheckpointError(explain(f"{file} is damaged: {error}", remedy="Use another checkpoint.")) from error
    return header


def _parse(text: bytes, length: int) -> Header:
    entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    metadata = msgspec.json.decode(entries.pop(_METADATA, msgspec.Raw(b"{}")), type=dict[str, str])
    found = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in entries.items()}
    end = 0
    for name, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        if begin != end or stop < begin:
            raise ValueError(f"the place of {name[:200]!r} in it is wrong")
        check_shape(entry.shape)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is not None and math.prod(entry.shape) * dtype.itemsize != stop - begin:
            raise ValueError(f"{name[:200]!r} of {entry.dtype} {entry.shape} cannot have {stop - begin} bytes")
        end = stop
    tensors = {name: _info(entry) for name, entry in found.items()}
    return Header(tensors, metadata, 8 + length + end)


def _info(entry: _Entry) -> TensorInfo:
    dtype = _DTYPES.get(entry.dtype)
    begin, end = entry.data_offsets
    # A type that this version has no word for is still worth a line in a table.
    return TensorInfo(dtype_name(dtype) if dtype else entry.dtype, tuple(entry.shape), end - begin)


def write_tensors(
    stream: IO[bytes],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, asking for one tensor after the other. The same tensors always make the same bytes.

    Args:
        stream: Where to write.
        tensors: What `read` will return, by name.
        read: Returns one tensor; asked once for each, in the order of the file.
        metadata: Texts to keep in the header.

    Raises:
        CheckpointError: If a tensor is of a type that safetensors has no word for, or not as announced.
    """
    order = list(_in_order(tensors))
    header = _header(tensors, order, metadata)
    stream.write(len(header).to_bytes(8, "little"))
    stream.write(header)
    for name in order:
        tensor = read(name).detach()
        if info_of(tensor) != tensors[name]:
            raise CheckpointError(
                explain(f"{name!r} is {info_of(tensor)} and was announced as {tensors[name]}.", remedy="Try again.")
            )
        if tensor.numel():
            stream.write(_bytes_of(tensor.cpu().resolve_conj().resolve_neg().contiguous()))
        del tensor  # or it would still be there while the next one is read


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU that is in one piece and not empty."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _in_order(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    ranks = {name: rank for rank, name in enumerate(_DTYPES)}
    keys: dict[str, tuple[int, bytes]] = {}
    for name, info in tensors.items():
        if name == _METADATA:  # a header of this name is no tensor's
            raise CheckpointError(
                explain(f"No tensor in a safetensors file can be called {name!r}.", remedy="Rename it.")
            )
        if not has_form(info):
            raise CheckpointError(
                explain(f"{name!r} of {info.dtype} has no safetensors form.", remedy="Convert it to another type.")
            )
        keys[name] = (ranks[_NAMES[getattr(torch, info.dtype)]], name.encode())
    yield from sorted(keys, key=lambda name: keys[name])


def _header(tensors: Mapping[str, TensorInfo], order: list[str], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        info = tensors[name]
        begin, end = end, end + info.num_bytes
        content[name] = _Entry(_NAMES[getattr(torch, info.dtype)], list(info.shape), (begin, end))
    text = msgspec.json.encode(content)
    return text + b" " * (-len(text) % 8)
