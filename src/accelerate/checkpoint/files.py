"""Files of a checkpoint that are still to be written.

Owns the three kinds there are, how each is written, and their copies in memory: what a save in the background writes
while training changes the originals. Nothing here knows what the files mean.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from ..hardware import Hardware
from .tensor_file import info_of, write_tensors
from .trust import write_pickle


class File(ABC):
    """A name inside the checkpoint, and what shall stand there."""

    name: str

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """About how long the file is."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the file. What is written need not be on the disk when this returns."""

    @abstractmethod
    def with_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> File:
        """Return the file with other tensors, each made from its name and the one that is there."""


@dataclass(frozen=True)
class TextFile(File):
    """A file whose bytes are there already."""

    name: str
    content: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def write(self, folder: Path) -> None:
        (folder / self.name).write_bytes(self.content)

    def with_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> TextFile:
        return self


@dataclass(frozen=True)
class TensorFile(File):
    """A safetensors file."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return _total_bytes(self.tensors)

    def write(self, folder: Path) -> None:
        self.write_to(folder / self.name)

    def write_to(self, target: Path | IO[bytes]) -> None:
        """Write the content to a path, or into a stream."""
        if isinstance(target, Path):
            with target.open("wb") as stream:
                self.write_to(stream)
        else:
            tensors = {name: info_of(tensor) for name, tensor in self.tensors.items()}
            write_tensors(target, tensors, self.tensors.__getitem__, {"format": "pt", **self.metadata})

    def with_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> TensorFile:
        return replace(self, tensors={name: change(name, tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class PickleFile(File):
    """Weights as `torch.save` writes them, for callers who asked for that."""

    name: str
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return _total_bytes(self.state)

    def write(self, folder: Path) -> None:
        write_pickle(dict(self.state), folder / self.name)

    def with_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> PickleFile:
        state = {
            name: change(name, value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            for name, value in self.state.items()
        }
        return replace(self, state=state)


def _total_bytes(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


class SnapshotMemory:
    """Room on the CPU for copies of tensors, kept from one save to the next.

    To touch new memory for the first time costs several times more than to copy into it; only the first snapshot
    pays for that.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._rooms: dict[tuple[str, str], torch.Tensor] = {}

    def snapshot(self, files: Iterable[File]) -> list[File]:
        """Return the files with copies of their tensors; the originals may change when this returns.

        The copies that an earlier snapshot made are overwritten: theirs must have been written before.
        """
        before, self._rooms = self._rooms, {}
        devices: set[torch.device] = set()

        def copy_of(file: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
            content = tensor.detach()
            room = before.get((file, name))
            if room is None or room.shape != content.shape or room.dtype != content.dtype:
                room = self._hardware.room_for(content)
            self._rooms[file, name] = room
            devices.add(content.device)
            return room.copy_(content, non_blocking=True)

        copies = [file.with_tensors(partial(copy_of, file.name)) for file in files]
        for device in sorted(devices, key=str):  # once for all: copies were queued one behind the other
            self._hardware.synchronize(device)
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._rooms.clear()
