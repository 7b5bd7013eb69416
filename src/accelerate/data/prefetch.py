"""Batches reach the device ahead of their use.

Owns the copy of one batch while the one before is computed on. Never decides which batches there are.

[Note: two streams] The copy of batch k + 1 is queued on a stream of its own before the loop gets batch k, so that it
runs while the loop computes on k. Four things make that correct:

1. The source of the copy is pinned memory: the device reads it without the host. Torch's allocator of pinned memory
   takes note of the copy and hands the memory out again only after it.
2. Before the loop gets a batch, its stream waits for the event at the end of the copy. The host does not wait.
3. The memory of the copy belongs to the copying stream, which would use it again as soon as the loop has let go of the
   batch, although kernels that read it may still be queued. So each tensor is recorded on the loop's stream: the
   allocator waits for what was queued there by then.
4. A batch whose tensors are not all known, or not all plain ones in host memory, is copied at its turn on the loop's
   stream, as without prefetching. There is nothing to record in an object that only knows how to move itself, and a
   tensor on a device may still be being computed on another stream.

The third has a price: while the host runs ahead of the device, the memory of each batch it has let go of is out of use
until the device has come so far.

Nothing is yielded while the copying stream is the current one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import hardware
from ..core.tree import honor_type, rebuild_mapping, tree_leaves
from ..hardware import Hardware


def prefetched(
    items: Iterator[tuple[Any, ...]], place: Callable[[Any], Any], device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """Yield each batch on the device, with the copy of the one after it under way.

    Takes one item more from `items` than it has given. An error of the source, or of a copy, is raised where its
    batch would come: the batch before is still given.

    Args:
        items: Tuples whose first element is a batch; the others are passed on.
        place: Moves a batch to `device`, without waiting for copies from pinned memory.
        device: Where to. Where its family has no stream for copies, each batch is placed at its turn.
    """
    family = hardware.of(device, "device of a loader")
    stream = family.copy_stream(device)
    if stream is None:
        for batch, *others in items:
            yield place(batch), *others
        return
    copier = _Copier(family, device, stream, place)
    current, failed = _next(items, copier)
    while current is not None:
        following, failed = _next(items, copier)
        others = current.others
        batch, current = copier.finish(current), following
        yield batch, *others
        del batch  # or it would stay in memory while the next one is read
    if failed is not None:
        raise failed


@dataclass
class _Copy:
    """A batch on its way."""

    batch: Any
    event: Any
    """The end of the copy; `None` for a batch that is placed at its turn."""
    others: list[Any]


def _next(items: Iterator[tuple[Any, ...]], copier: _Copier) -> tuple[_Copy | None, Exception | None]:
    try:
        for batch, *others in items:
            return copier.begin(batch, others), None
    except Exception as error:  # noqa: BLE001 - raised by the caller after the batch before
        return None, error
    return None, None


class _Copier:
    """Copies on a stream of its own. See [Note: two streams]."""

    def __init__(self, family: Hardware, device: torch.device, stream: Any, place: Callable[[Any], Any]) -> None:
        self._family, self._device, self._stream, self._place = family, device, stream, place

    def begin(self, batch: Any, others: list[Any]) -> _Copy:
        """Queue the copy of a batch."""
        if not _is_known(batch):
            return _Copy(batch, None, others)
        pinned = self._pinned(batch)
        with self._family.on_stream(self._stream):
            placed = self._place(pinned)
            event = self._stream.record_event()
        return _Copy(placed, event, others)

    def finish(self, copied: _Copy) -> Any:
        """Return the batch, for use on the current stream."""
        if copied.event is None:
            return self._place(copied.batch)
        stream = self._family.current_stream(self._device)
        stream.wait_event(copied.event)
        for leaf in tree_leaves(copied.batch):
            if isinstance(leaf, torch.Tensor) and not leaf.is_cpu:
                leaf.record_stream(stream)
        return copied.batch

    def _pinned(self, batch: Any) -> Any:
        if isinstance(batch, torch.Tensor):
            return self._family.pin(batch)
        if hasattr(batch, "to"):
            if hasattr(batch, "pin_memory"):
                return batch.pin_memory()
            if not isinstance(batch, MutableMapping):
                return batch
            # It is moved as a whole, so it has to stay what it is: a BatchEncoding, for example.
            pinned = copy.copy(batch)
            for key in pinned:
                pinned[key] = self._pinned(batch[key])
            return pinned
        if isinstance(batch, (tuple, list)):
            return honor_type(batch, [self._pinned(item) for item in batch])
        if isinstance(batch, Mapping):
            return rebuild_mapping(batch, {key: self._pinned(item) for key, item in batch.items()})
        return batch


def _is_known(data: Any) -> bool:
    """Tell whether all tensors are found by walking through the containers, and are in host memory."""
    if isinstance(data, torch.Tensor):
        # Others may lose their type in pinned memory, or cannot be recorded on a stream.
        return type(data) is torch.Tensor and data.layout is torch.strided and data.is_cpu and not data.requires_grad
    if hasattr(data, "to") and any(map(_moves, getattr(data, "__dict__", {}).values())):
        return False  # it has tensors besides its items
    if isinstance(data, (tuple, list)):
        return all(map(_is_known, data))
    if isinstance(data, Mapping):
        return all(map(_is_known, data.values()))
    return not _moves(data)


def _moves(data: Any) -> bool:
    return hasattr(data, "to")
