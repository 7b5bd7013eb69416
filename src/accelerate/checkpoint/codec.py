"""State dictionaries as JSON and tensors, and back, exactly.

Owns which Python values a checkpoint can hold and how each is spelled. What JSON says exactly (None, bool, str,
lists, finite floats, small integers, dictionaries with text keys) is written as itself; anything else is an
object whose `$type` names one of the classes below. A value that cannot be written is refused by its place:
nothing is ever turned into something similar.

Never touches files.
"""

from __future__ import annotations

import collections
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from ..core.errors import CheckpointError, explain

TAG = "$type"


class Inexpressible(CheckpointError):
    """A state holds something that JSON and tensors cannot express."""


class Node(msgspec.Struct, tag_field=TAG, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything that is spelled as an object with a `$type`."""


class IntNode(Node, tag="int"):
    """An integer that does not fit in 64 bits."""

    hex: str


class FloatNode(Node, tag="float"):
    """A float that JSON has no word for (infinities, NaN), by its bits."""

    bits: str


class ComplexNode(Node, tag="complex"):
    """A complex number, by its bits."""

    bits: str


class TextNode(Node, tag="str"):
    """A text with lone surrogates, such as an undecodable file name."""

    hex: str


class BytesNode(Node, tag="bytes"):
    """Bytes."""

    hex: str


class SequenceNode(Node, tag="sequence"):
    """A tuple, set, frozenset or deque."""

    kind: str
    items: list[Any]
    maxlen: int | None = None


class DictNode(Node, tag="dict"):
    """A dictionary with keys other than text, or of another class than `dict`."""

    items: list[tuple[Any, Any]]
    kind: str = "dict"
    factory: str | None = None


class TensorNode(Node, tag="tensor"):
    """A tensor, kept under `name` beside the JSON."""

    name: str
    bytes_of: str | None = None
    """The dtype, when the safetensors format has no word for it and the bytes are kept instead."""
    shape: list[int] | None = None
    stride: list[int] | None = None
    requires_grad: bool = False
    parameter: bool = False


class ArrayNode(Node, tag="array"):
    """A numpy array, its bytes kept under `name` beside the JSON."""

    name: str
    dtype: str
    shape: list[int]


class ScalarNode(Node, tag="scalar"):
    """A numpy scalar."""

    dtype: str
    hex: str


class TorchNode(Node, tag="torch"):
    """A `torch.dtype`, `torch.device` or `torch.Size`."""

    kind: str
    value: Any


_AnyNode = (
    IntNode | FloatNode | ComplexNode | TextNode | BytesNode | SequenceNode
    | DictNode | TensorNode | ArrayNode | ScalarNode | TorchNode
)  # fmt: skip

_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque"}
_MAPPINGS: dict[type, str] = {
    dict: "dict",
    collections.OrderedDict: "OrderedDict",
    collections.Counter: "Counter",
    collections.defaultdict: "defaultdict",
}
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (dict, list, set, tuple, int, float, str, bool)}
STORABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.uint32, torch.uint16,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
}  # fmt: skip
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NUMPY_DTYPE = re.compile(r"[<>|=][biufcmMSUV][0-9]{1,9}(\[[0-9]*[A-Za-z]+\])?")
_REMEDIES = {
    "function": "Leave it out of state_dict(), and set it again in load_state_dict().",
    "enum": "Save its value, and make the member again in load_state_dict().",
    "generator": "Save its get_state().",
}
_TENSOR_CLASSES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def encode(state: Any, name: str = "state") -> tuple[Any, dict[str, torch.Tensor]]:
    """Split `state` into a tree that JSON can hold, and tensors by name, which are not copied and stay on their devices.

    Args:
        state: Any nesting of the values this module knows.
        name: What to call it in an error.

    Raises:
        Inexpressible: (a `CheckpointError`) if a value cannot be written exactly; the message has its place.
    """
    encoder = _Encoder(name)
    return encoder.encode(state, ()), encoder.tensors


def decode(tree: Any, tensors: dict[str, torch.Tensor], name: str = "state") -> Any:
    """Put together again what `encode` took apart. Tensors come out on the CPU.

    Raises:
        CheckpointError: If the tree is not one that `encode` makes.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError, struct.error) as error:
        problem = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(
            explain(
                f"{name} is damaged, or was not written by this library: {problem}", remedy="Use another checkpoint."
            )
        ) from None


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is made of numbers in one block of memory, and nothing else."""
    wraps_others = hasattr(tensor, "__tensor_flatten__")
    strided = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return strided and not wraps_others and not tensor.is_meta and not torch.nn.parameter.is_lazy(tensor)


class _Encoder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}
        self._open: set[int] = set()
        self._by_class: dict[type, Callable[[Any, tuple[Any, ...]], Any]] = {
            type(None): _same,
            bool: _same,
            int: lambda value, _: value if -(2**63) <= value < 2**63 else IntNode(hex(value)),
            float: lambda value, _: value if math.isfinite(value) else FloatNode(struct.pack(">d", value).hex()),
            complex: lambda value, _: ComplexNode(struct.pack(">dd", value.real, value.imag).hex()),
            str: lambda value, _: (
                value if _encodable(value) else TextNode(value.encode("utf-8", "surrogatepass").hex())
            ),
            bytes: lambda value, _: BytesNode(value.hex()),
            torch.dtype: lambda value, _: TorchNode("dtype", str(value).removeprefix("torch.")),
            torch.device: lambda value, _: TorchNode("device", str(value)),
            torch.Size: lambda value, _: TorchNode("size", list(value)),
            np.ndarray: self._array,
            list: self._list,
            **dict.fromkeys(_SEQUENCES, self._sequence),
            **dict.fromkeys(_MAPPINGS, self._mapping),
            **dict.fromkeys(_TENSOR_CLASSES, self._tensor),
        }

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        write = self._by_class.get(type(value))
        if write is None:
            if isinstance(value, np.generic):
                return self._scalar(value, path)
            raise self._refusal(value, path)
        if not isinstance(value, (list, tuple, set, frozenset, dict, collections.deque)):
            return write(value, path)
        if id(value) in self._open:
            raise self._refusal(value, path, "contains itself")
        self._open.add(id(value))
        try:
            return write(value, path)
        finally:
            self._open.remove(id(value))

    def _list(self, value: list[Any], path: tuple[Any, ...]) -> list[Any]:
        return [self.encode(item, (*path, place)) for place, item in enumerate(value)]

    def _sequence(self, value: Any, path: tuple[Any, ...]) -> SequenceNode:
        items = self._list(list(value), path)
        return SequenceNode(_SEQUENCES[type(value)], items, maxlen=getattr(value, "maxlen", None))

    def _mapping(self, value: Any, path: tuple[Any, ...]) -> Any:
        if type(value) is dict and TAG not in value and all(type(key) is str and _encodable(key) for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        items = [(self.encode(key, (*path, key)), self.encode(item, (*path, key))) for key, item in value.items()]
        factory = getattr(value, "default_factory", None)
        if factory is not None and factory not in _FACTORIES.values():
            raise self._refusal(factory, (*path, "default_factory"))
        return DictNode(items, _MAPPINGS[type(value)], factory.__name__ if factory else None)

    def _tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> TensorNode:
        if not is_plain_tensor(value):
            raise self._refusal(value, path, f"is a tensor of layout {value.layout} that cannot be written as it is")
        node = TensorNode(
            self._fresh_name(path), requires_grad=value.requires_grad, parameter=isinstance(value, torch.nn.Parameter)
        )
        # It stays as it is and where it is: whoever writes or copies it brings it to the CPU, one after the other.
        content = value.detach()
        if not content.is_contiguous():
            like = torch.empty_like(content, memory_format=torch.preserve_format, device="meta")
            node.stride = list(content.stride()) if like.stride() == content.stride() else None
        if content.dtype not in STORABLE:
            node.bytes_of, node.shape = (str(content.dtype).removeprefix("torch."), list(content.shape))
            content = content.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        self.tensors[node.name] = content
        return node

    def _array(self, value: np.ndarray, path: tuple[Any, ...]) -> ArrayNode:
        if value.dtype.hasobject or value.dtype.names is not None:
            raise self._refusal(value, path, f"is a numpy array of {value.dtype}, which has no fixed bytes")
        node = ArrayNode(self._fresh_name(path), value.dtype.str, list(value.shape))
        self.tensors[node.name] = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)
        return node

    def _scalar(self, value: np.generic, path: tuple[Any, ...]) -> ScalarNode:
        if value.dtype.hasobject or value.dtype.names is not None:
            raise self._refusal(value, path)
        return ScalarNode(value.dtype.str, value.tobytes().hex())

    def _fresh_name(self, path: tuple[Any, ...]) -> str:
        name = ".".join(str(part) for part in path) or "value"
        if name.startswith("__") or not _encodable(name):
            name = f"tensor #{len(self.tensors)}"
        while name in self.tensors:
            name += "'"
        return name

    def _refusal(self, value: Any, path: tuple[Any, ...], problem: str = "") -> Inexpressible:
        place = " -> ".join([self.name, *(repr(part) for part in path)])
        kind = type(value).__name__
        remedy = "Save numbers, text, tensors, arrays, or lists and dictionaries of them."
        if callable(value) and hasattr(value, "__name__"):
            kind, remedy = ("class" if isinstance(value, type) else "function", _REMEDIES["function"])
        elif hasattr(type(value), "__members__"):
            remedy = _REMEDIES["enum"]
        elif isinstance(value, (torch.Generator, np.random.Generator)):
            remedy = _REMEDIES["generator"]
        problem = problem or f"is a {kind}, which a checkpoint cannot hold without running code when it is read"
        return Inexpressible(explain(f"{place} {problem}.", remedy=remedy))


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        # Each is taken once, as they are written: naming one a thousand times costs a stranger little, and us much.
        self.tensors = dict(tensors)

    def decode(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, (dict, Node)):
            return tree
        if isinstance(tree, dict) and TAG not in tree:
            return {key: self.decode(item) for key, item in tree.items()}
        node = tree if isinstance(tree, Node) else msgspec.convert(tree, _AnyNode)
        return self._node(node)

    def _node(self, node: Any) -> Any:
        match node:
            case IntNode():
                return int(node.hex, 16)
            case FloatNode():
                return struct.unpack(">d", bytes.fromhex(node.bits))[0]
            case ComplexNode():
                return complex(*struct.unpack(">dd", bytes.fromhex(node.bits)))
            case TextNode():
                return bytes.fromhex(node.hex).decode("utf-8", "surrogatepass")
            case BytesNode():
                return bytes.fromhex(node.hex)
            case SequenceNode():
                return self._sequence(node)
            case DictNode():
                return self._mapping(node)
            case TensorNode():
                return self._tensor(node)
            case ArrayNode():
                return self._array(node)
            case ScalarNode():
                return _array((), node.dtype, bytes.fromhex(node.hex))[()]
            case _:
                return _torch_value(node)

    def _sequence(self, node: SequenceNode) -> Any:
        kinds = {kind: cls for cls, kind in _SEQUENCES.items()}
        items = self.decode(node.items)
        return collections.deque(items, node.maxlen) if node.kind == "deque" else kinds[node.kind](items)

    def _mapping(self, node: DictNode) -> Any:
        kinds = {kind: cls for cls, kind in _MAPPINGS.items()}
        items = [(self.decode(key), self.decode(item)) for key, item in node.items]
        if node.kind == "defaultdict":
            return collections.defaultdict(_FACTORIES[node.factory] if node.factory else None, items)
        return kinds[node.kind](dict(items))

    def _tensor(self, node: TensorNode) -> torch.Tensor:
        # A copy: what was read lies in the file, which is mapped, and optimizers keep what they load. The disk would not
        # be freed when the file is removed, the tensor would change with it, and end the process if it is cut.
        value = self.tensors.pop(node.name).clone()
        if node.bytes_of is not None:
            value = value.view(_dtype(node.bytes_of)).reshape(node.shape or [])
        if node.stride is not None:
            if sum((size - 1) * step for size, step in zip(value.shape, node.stride, strict=True)) >= value.numel():
                raise ValueError(f"a tensor of shape {list(value.shape)} cannot have the strides {node.stride}")
            value = torch.empty_strided(value.shape, node.stride, dtype=value.dtype, device="cpu").copy_(value)
        if node.parameter:
            return torch.nn.Parameter(value, node.requires_grad)
        return value.requires_grad_(node.requires_grad)

    def _array(self, node: ArrayNode) -> np.ndarray:
        return _array(tuple(node.shape), node.dtype, self.tensors.pop(node.name).numpy().tobytes())


def _same(value: Any, _: tuple[Any, ...]) -> Any:
    return value


def _encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise TypeError(f"torch.{name} is no dtype")
    return _DTYPES[name]


def _array(shape: tuple[int, ...], dtype_name: str, content: bytes) -> np.ndarray:
    if any(size < 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    if not _NUMPY_DTYPE.fullmatch(dtype_name):
        raise ValueError(f"numpy's {dtype_name} has no fixed bytes")
    dtype = np.dtype(dtype_name)
    return np.ndarray(shape, dtype, buffer=bytearray(content or b"\0"))


def _torch_value(node: TorchNode) -> Any:
    makers: dict[str, Callable[[Any], Any]] = {"dtype": _dtype, "device": torch.device, "size": torch.Size}
    return makers[node.kind](node.value)
