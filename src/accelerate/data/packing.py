"""A batch as one buffer of bytes, and back.

Owns the layout of a message of the dispatcher. Never talks to other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..core.tree import default_factory, make_mapping

HEADER_BYTES = 16
"""Two integers of 64 bits. Tensors follow, widest elements first, so that each begins at a multiple of its width."""


class Slot(NamedTuple):
    """Where a tensor stood: one of dense numbers, so that its bytes are all of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


class Constant:
    """A leaf that is not sent as bytes but within the layout."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        mine, theirs = self.value, other.value
        # Only these are known to compare to a plain truth; anything else is sent anew each time.
        return (
            type(mine) is type(theirs)
            and isinstance(mine, (str, bytes, bool, int, float, type(None)))
            and mine == theirs
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Container(NamedTuple):
    """A list, tuple or mapping, with what it holds."""

    kind: type
    keys: tuple[Any, ...] | None
    items: tuple[Any, ...]
    factory: Any = None


class Layout(NamedTuple):
    """The structure of a batch, the order of its tensors in the buffer, and all leaves that are not tensors."""

    root: Slot | Constant | Container
    order: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def describe(batch: Any) -> tuple[Layout, list[torch.Tensor]]:
        """Return the layout of a batch, and its tensors in the order in which they are sent."""
        slots: list[Slot] = []
        tensors: list[torch.Tensor] = []
        root = _describe(batch, slots, tensors)
        size = HEADER_BYTES + sum([slot.num_bytes for slot in slots])
        if len(slots) == 1:
            return Layout(root, (0,), size), tensors
        order = tuple(sorted(range(len(slots)), key=lambda place: -slots[place].dtype.itemsize))
        return Layout(root, order, size), [tensors[place] for place in order]


def _describe(data: Any, slots: list[Slot], tensors: list[torch.Tensor]) -> Slot | Constant | Container:
    if type(data) is torch.Tensor and data.layout is torch.strided and not data.is_quantized:
        if data.is_conj() or data.is_neg():  # its bytes are not its numbers
            data = data.resolve_conj().resolve_neg()
        slot = Slot(data.dtype, data.shape, data.nbytes)
        slots.append(slot)
        tensors.append(data)
        return slot
    if isinstance(data, (list, tuple)):
        return Container(type(data), None, tuple([_describe(item, slots, tensors) for item in data]))
    if isinstance(data, Mapping):
        items = tuple([_describe(item, slots, tensors) for item in data.values()])
        return Container(type(data), tuple(data.keys()), items, default_factory(data))
    return Constant(data)


def _slots(node: Slot | Constant | Container) -> Iterator[Slot]:
    if isinstance(node, Slot):
        yield node
    elif isinstance(node, Container):
        for item in node.items:
            yield from _slots(item)


def _build(node: Slot | Constant | Container, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(node, Slot):
        return next(tensors)
    if isinstance(node, Constant):
        return node.value
    items = [_build(item, tensors) for item in node.items]
    if node.keys is not None:
        return make_mapping(node.kind, node.factory, dict(zip(node.keys, items, strict=True)))
    if node.kind is list:
        return items
    return node.kind(*items) if issubclass(node.kind, tuple) and hasattr(node.kind, "_fields") else node.kind(items)


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Make room for a message."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def pack(header: tuple[int, int], tensors: list[torch.Tensor], num_bytes: int, device: torch.device) -> torch.Tensor:
    """Write a message of `num_bytes`, which may be more than these tensors need."""
    parts = [_header(header)]
    place, filled = parts[0].device, HEADER_BYTES
    for tensor in tensors:
        if tensor.device != place:  # made on the device already: join everything there
            place = device
        flat = (tensor.detach() if tensor.requires_grad else tensor).reshape(-1)
        if flat.stride(0) != 1:  # one column of a tensor, for example
            flat = flat.clone(memory_format=torch.contiguous_format)
        parts.append(flat.view(torch.uint8))
        filled += tensor.nbytes
    if filled < num_bytes:
        parts.append(torch.empty(num_bytes - filled, dtype=torch.uint8))
    if place is device:
        parts = [part.to(device) for part in parts]
    return torch.cat(parts).to(device)


@lru_cache(maxsize=16)
def _header(header: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(header, dtype=torch.int64).view(torch.uint8)


def read_header(message: torch.Tensor) -> tuple[int, int]:
    """Return the two integers at the beginning of a message."""
    first, second = message[:HEADER_BYTES].view(torch.int64).tolist()
    return first, second


def unpack(message: torch.Tensor, layout: Layout) -> Any:
    """Return the batch in a message.

    A tensor that is alone keeps the memory of the message. Several get their own: changing one in place is then no
    change of the others for autograd, and keeping one does not keep all.
    """
    if isinstance(layout.root, Slot):
        return message[HEADER_BYTES : layout.num_bytes].view(layout.root.dtype).view(layout.root.shape)
    slots = list(_slots(layout.root))
    found: list[torch.Tensor] = [message] * len(slots)
    several = len(slots) > 1
    start = HEADER_BYTES
    for place in layout.order:
        slot = slots[place]
        part = message[start : start + slot.num_bytes]
        found[place] = (part.clone() if several else part).view(slot.dtype).view(slot.shape)
        start += slot.num_bytes
    return _build(layout.root, iter(found))
