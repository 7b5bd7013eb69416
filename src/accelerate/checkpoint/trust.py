"""The one file that reads and writes pickles.

Owns every call of `torch.save` and `torch.load`, and an unpickler of plain records for files that torch itself reads
with `pickle.load`. Reading runs no code from the file: tensors, containers and numpy arrays are rebuilt, anything else
is refused by name. Only a caller who passes `weights_only=False` or `allow_pickle=True` himself gets more; nothing falls
back to it.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch

from ..core.errors import CheckpointError, explain


def _reconstruct(numpy: Any) -> Any:
    """Return the function that pickles of arrays name; the module it lies in was renamed in numpy 2."""
    # 1.26 has a `_core` without it already.
    new = getattr(getattr(numpy, "_core", None), "multiarray", None)
    return (new or numpy.core.multiarray)._reconstruct


# What an array of numbers is made of in a pickle; needed for numpy's random state in the peer's files.
_NUMPY_PARTS: list[Any] = [
    # Under both names, because a file may come from the other numpy.
    (_reconstruct(np), "numpy._core.multiarray._reconstruct"),
    (_reconstruct(np), "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"),
]

_DAMAGE = (
    AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error,
)  # fmt: skip
_DISTRUST = "It was not written by torch. Do not trust it."

_REMEDY = "If you trust its author, read it with accelerate.utils.load(file, weights_only=False)."
# The one class that torch lets a pickle call with a length.
_ALLOCATES = b"bytearray"


class RefusedPickle(CheckpointError, pickle.UnpicklingError):
    """A pickle holds more than data, or something that pretends to be one does."""


def read_pickle(file: Path, map_location: Any = "cpu", *, mapped: bool = False) -> Any:
    """Read a file written by `torch.save`, running none of its code.

    Args:
        file: What to read.
        map_location: Where tensors go, as `torch.load` takes it.
        mapped: Leave tensors in the file until they are used. Files of torch before 1.6 are read at once.

    Raises:
        CheckpointError: If the file is damaged, or holds anything but data.
    """
    try:
        return load(file, map_location, **({"mmap": True} if mapped and zipfile.is_zipfile(file) else {}))
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - torch's reader raises whatever the bytes make it stumble over
        text = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(explain(f"{file} cannot be read: {text}", remedy="Use another checkpoint.")) from None


def _check_size(file: Path) -> None:
    """Refuse a file that unpacks to more than it is. `torch.save` packs nothing, and writes nothing twice."""
    problem = ""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream, _mapped(stream) as content:
            found = content.find(_ALLOCATES)
    else:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                problem = "it is a packed archive, which torch.save does not write"
            elif sum(entry.file_size for entry in entries) > file.stat().st_size:
                problem = "its parts are larger than the whole"
            pickles = [] if problem else [entry for entry in entries if entry.filename.endswith(".pkl")]
            found = max((archive.read(entry).find(_ALLOCATES) for entry in pickles), default=-1)
    if found >= 0:
        problem = "it asks for a bytearray, which may be of any length"
    if problem:
        raise RefusedPickle(explain(f"{file} is refused: {problem}.", remedy=_REMEDY))


def _mapped(stream: IO[bytes]) -> Any:
    """Return the content of a file without reading it; an empty one cannot be mapped."""
    empty = not os.fstat(stream.fileno()).st_size
    return contextlib.nullcontext(b"") if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def load_tensor(stream: IO[bytes], name: str) -> torch.Tensor:
    """Read one tensor that `torch.save` wrote into a part of a file, running no code.

    Args:
        stream: The part.
        name: What to call it in an error.

    Raises:
        CheckpointError: If it is damaged, or anything but a tensor.
    """
    try:
        found = load(stream, "cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            explain(f"{name} is refused: it is a pickle that holds more than a tensor ({reason}).", remedy=_DISTRUST)
        ) from error
    except (RuntimeError, EOFError, ValueError, *_DAMAGE) as error:
        raise CheckpointError(explain(f"{name} cannot be read: {error}", remedy="Use another checkpoint.")) from error
    if not isinstance(found, torch.Tensor):
        raise CheckpointError(explain(f"{name} is a {type(found).__name__}, no tensor.", remedy=_DISTRUST))
    return found.detach()


def read_trusted(file: Path) -> Any:
    """Read a file of `write_pickle` whose author the caller trusts: it may run any code. Tensors come out on the CPU.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return load(file, "cpu", weights_only=False)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(
            explain(f"{file} cannot be read: {text}", remedy="Define its classes where they were at the save.")
        ) from error


def write_pickle(obj: Any, file: str | Path | IO[bytes]) -> None:
    """Write `obj` with `torch.save`. For callers who asked for this format."""
    if isinstance(file, (str, Path)):
        # Opened here, because torch's own writer refuses names such as ".x".
        with Path(file).open("wb") as stream:
            torch.save(obj, stream)
    else:
        torch.save(obj, file)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Read an object written by `save`.

    Args:
        f: Path or binary stream.
        map_location: Where tensors go, as `torch.load` takes it.
        **kwargs: Further arguments of `torch.load`. `weights_only` is True unless given.

    Raises:
        RefusedPickle: (a `pickle.UnpicklingError`) if reading it would run code, or take more memory than the file
            has bytes, and `weights_only` is true.
    """
    kwargs.setdefault("weights_only", True)
    if kwargs["weights_only"] and isinstance(f, (str, Path)):
        _check_size(Path(f))
    try:
        with torch.serialization.safe_globals(_NUMPY_PARTS):
            return torch.load(f, map_location=map_location, **kwargs)
    except (pickle.UnpicklingError, RuntimeError) as error:
        is_program = "TorchScript" in str(error)
        if not kwargs["weights_only"] or not (is_program or isinstance(error, pickle.UnpicklingError)):
            raise
        reason = str(error).split("\n", 1)[0]
        raise RefusedPickle(
            explain(
                f"{f} is refused: it is a pickle that holds more than tensors and plain values ({reason}).",
                remedy=_REMEDY,
            )
        ) from None


# What a pickle of plain records needs. Left out are, among others, persistent objects, extensions and bytes.
_RECORD_OPCODES = [
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "EMPTY_TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "TUPLE",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
    "MEMOIZE",
    "BINPUT",
    "LONG_BINPUT",
    "BINGET",
    "LONG_BINGET",
    "GLOBAL",
    "STACK_GLOBAL",
    "REDUCE",
    "NEWOBJ",
    "BUILD",
]


class Record:
    """Stands for an object of a class that is not loaded: the name of the class, and what the pickle says of it."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_records(file: Path, classes: Collection[tuple[str, str]], max_bytes: int = 2**30) -> Any:
    """Read a pickle of plain objects without loading a class or calling anything it names.

    What comes back is made of numbers, texts, tuples, lists, dictionaries, dtypes and `Record`s.

    Args:
        file: A pickle, such as the `.metadata` of torch's distributed checkpoints.
        classes: Module and name of the classes that may occur. Each object of one becomes a `Record`.
        max_bytes: Refuse a larger file.

    Raises:
        CheckpointError: If the file is damaged, or names anything else.
    """
    try:
        if file.stat().st_size > max_bytes:
            raise pickle.UnpicklingError(f"it is larger than {max_bytes} bytes")
        # Whole, because a stream makes room for as much as it is asked for, and the file says how much that is.
        return _RecordReader(io.BytesIO(file.read_bytes()), classes).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(explain(f"{file} is refused: {error}.", remedy=_DISTRUST)) from error
    except _DAMAGE as error:
        raise CheckpointError(
            explain(f"{file} is damaged: {type(error).__name__}: {error}", remedy="Use another checkpoint.")
        ) from error


class _RecordReader(pickle._Unpickler):
    """An unpickler that knows few instructions, and calls nothing but the stand-ins of `find_class`."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}  # filled below
    # Of the class above, which typeshed does not describe.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes], classes: Collection[tuple[str, str]]) -> None:
        super().__init__(stream)
        # Made anew for each file: whatever it does to its classes is forgotten with it.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (Record,), {"kind": name}) for module, name in classes
        }
        self._known |= {("torch", "Size"): _plain_tuple, ("torch.serialization", "_get_layout"): _plain_text}
        self._known |= {
            (module, name): _plain_text
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        }

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            # An instruction that is not in `dispatch` ends here too.
            raise pickle.UnpicklingError(f"it holds something else than plain records ({error})") from error

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        found = self._known.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which its kind of file has no use for")
        return found

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise pickle.UnpicklingError("it changes something that is no record")
        self.stack[-1].state = state

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(dict(zip(map(_checked_key, items[::2]), items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items({_checked_key(key): value})

    def _set_items(self, items: dict[Any, Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError("it changes something that is no dictionary")
        self.stack[-1].update(items)


def _checked_key(key: Any) -> Any:
    # The hash of a tuple that is nested a million times would end the process.
    if not isinstance(key, (str, int, Record)):
        raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
    return key


def _plain_tuple(items: tuple[int, ...] = ()) -> tuple[int, ...]:
    if type(items) is not tuple:
        raise TypeError(f"torch.Size of a {type(items).__name__}")
    return items


def _plain_text(*parts: str) -> str:
    # join() refuses what is no text. To print lists of lists could take all memory.
    return "/".join(parts)


for _name in _RECORD_OPCODES:
    _code = getattr(pickle, _name)[0]
    _RecordReader.dispatch[_code] = pickle._Unpickler.dispatch[_code]
_RecordReader.dispatch[pickle.BUILD[0]] = _RecordReader.load_build
_RecordReader.dispatch[pickle.SETITEM[0]] = _RecordReader.load_setitem
_RecordReader.dispatch[pickle.SETITEMS[0]] = _RecordReader.load_setitems
