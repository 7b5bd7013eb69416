"""The one file that reads and writes pickles.

Owns every call of `torch.save` and `torch.load`, and an unpickler of plain records for files that torch itself reads
with `pickle.load`. Reading runs no code from the file: tensors, containers and numpy arrays are rebuilt, anything else
is refused by name. Only a caller who passes `weights_only=False` or `allow_pickle=True` himself gets more; nothing falls
back to it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
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
_ARCHIVE_START = b"PK\3\4"
# The last records of a zip file: the end of a large one, where that lies, and the end.
_TAIL = struct.Struct("<4s36xQQ4s4xQ4x4s8xIIH")
_END_BYTES = 22
_OLD_PICKLES = 5
_ENCODINGS = frozenset({"latin1", "latin-1", "utf-8", "utf8", "ascii"})
_MAX_STEPS = 10_000_000
"""Objects in one pickle. One takes a byte of it, but sixty of memory."""
_MAX_DEPTH = 8
"""Of tuples in keys and in arguments. To hash deep ones ends the process."""


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
    if file.exists() and not file.is_file():  # to open a pipe would wait for ever
        raise CheckpointError(explain(f"{file} cannot be read: it is no plain file.", remedy="Use another checkpoint."))
    try:
        return load(file, map_location, **({"mmap": True} if mapped and is_archive(file) else {}))
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - torch's reader raises whatever the bytes make it stumble over
        text = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(explain(f"{file} cannot be read: {text}", remedy="Use another checkpoint.")) from None


def is_archive(file: Path) -> bool:
    """Tell whether torch would read `file` as the archive that it writes today."""
    with file.open("rb") as stream:
        return stream.read(len(_ARCHIVE_START)) == _ARCHIVE_START


def _check(f: Any, name: str) -> None:
    """Read the pickles that torch is about to read, calling nothing and counting what they ask for.

    Raises:
        RefusedPickle: If torch would need much more memory than the file has bytes, or could not survive it.
        Exception: If something in it is damaged.
    """
    try:
        with contextlib.nullcontext(f) if hasattr(f, "read") else open(f, "rb") as stream:
            start = stream.tell()
            size = stream.seek(0, os.SEEK_END)
            stream.seek(start)
            is_new = stream.read(len(_ARCHIVE_START)) == _ARCHIVE_START
            stream.seek(start)
            if is_new:
                for content in _pickles_of_archive(stream, size):
                    _CallReader(io.BytesIO(content), len(content), size).load()
            else:
                _check_old(stream, size)
            stream.seek(start)
    except zipfile.BadZipFile as error:
        raise RuntimeError(f"its archive is not whole ({error})") from None
    except pickle.UnpicklingError as error:
        raise RefusedPickle(explain(f"{name} is refused: {error}.", remedy=_REMEDY)) from None


def _pickles_of_archive(stream: IO[bytes], size: int) -> list[bytes]:
    """Return all that torch may take for the pickle of an archive. It looks for `data.pkl` in small and large letters."""
    if not _has_one_directory(stream, size):
        raise RuntimeError("its archive is cut off, or does not end as those of torch.save do")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("it is a packed archive, which torch.save does not write")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            raise pickle.UnpicklingError("its parts are larger than the whole")
        return [archive.read(entry) for entry in entries if entry.orig_filename.lower().endswith(".pkl")]


def _has_one_directory(stream: IO[bytes], size: int) -> bool:
    """Tell whether everybody finds the same list of entries in an archive.

    Readers differ in where they look, if it does not stand right before the end that names it. Then the entries that
    are looked at here would not be those that torch reads.
    """
    tail = min(size, _TAIL.size)
    stream.seek(size - tail)
    (
        large, large_size, large_begin, locator, large_place, end, end_size, end_begin, comment,
    ) = _TAIL.unpack(stream.read(tail).rjust(_TAIL.size, b"\0"))  # fmt: skip
    if end != b"PK\5\6" or comment:
        return False
    if locator != b"PK\6\7":
        return end_begin + end_size == size - _END_BYTES
    begin = size - _TAIL.size
    return large == b"PK\6\6" and large_place == begin and large_begin + large_size == begin


def _check_old(stream: IO[bytes], size: int) -> None:
    """Check the format of torch before 1.6: several pickles, the first of which is a number, then the tensors."""
    if _CallReader(stream, size, size).load() != torch.serialization.MAGIC_NUMBER:
        return  # torch reads no further
    for _ in range(_OLD_PICKLES - 1):
        _CallReader(stream, size, size).load()


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
    except Exception as error:  # noqa: BLE001 - torch's reader raises whatever the bytes make it stumble over
        text = f"{type(error).__name__}: {error}"[:500]
        raise CheckpointError(explain(f"{name} cannot be read: {text}", remedy="Use another checkpoint.")) from None
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
    is_path = isinstance(f, (str, os.PathLike))
    if kwargs["weights_only"] and not (is_path and os.fspath(f).endswith(".safetensors")):  # which is no pickle
        _check(f, str(f) if is_path else "the stream")
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


# What data is made of. Left out are, among others, extensions and everything that torch's own reader leaves out.
_TORCH_OPCODES = (
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINPERSID", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
)  # fmt: skip
# Plain records are written in newer forms too, and hold no bytes, sets and persistent objects.
_RECORD_OPCODES = sorted(
    {*_TORCH_OPCODES, "FRAME", "SHORT_BINUNICODE", "MEMOIZE", "STACK_GLOBAL"}
    - {"SHORT_BINSTRING", "EMPTY_SET", "BINPERSID"}
)
# One byte of these makes an object, or an entry in the table of those that were seen.
_MAKERS = frozenset({
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ",
    "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINUNICODE", "BINFLOAT", "LONG1", "BININT", "BININT2",
    "SHORT_BINUNICODE", "SHORT_BINSTRING",
})  # fmt: skip


class Record:
    """Stands for an object of a class that is not loaded: the name of the class, and what the pickle says of it."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DataReader(pickle._Unpickler):
    """An unpickler that knows few instructions, and counts what they make."""

    # Of the class above, which typeshed does not describe.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes], num_bytes: int) -> None:
        super().__init__(stream, encoding="utf-8")
        self._steps = _MAX_STEPS
        # What is used again costs two bytes, however long it is: the sum of it all has to stay near the file's size.
        self._left = 2**16 + 4 * num_bytes

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            # An instruction that is not in `dispatch` ends here too.
            raise pickle.UnpicklingError(f"it holds something else than plain data ({error})") from error

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise pickle.UnpicklingError(f"it holds more than the {_MAX_STEPS} objects that are read")

    def charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise pickle.UnpicklingError("it uses its parts again and again, and would unfold to more than it is")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it changes something that is no list")
        self.stack[-1].extend(values)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(dict(zip(map(self.checked_key, items[::2]), items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items({self.checked_key(key): value})

    def checked_key(self, key: Any) -> Any:
        """Return what may be a key of a dictionary."""
        # The hash of a tuple that is nested a million times would end the process.
        if not isinstance(key, (str, int, Record)):
            raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
        return key

    def set_items(self, items: dict[Any, Any]) -> None:
        """Add to the dictionary on the stack."""
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError("it changes something that is no dictionary")
        self.stack[-1].update(items)


def _dispatch(names: Collection[str], reader: type[_DataReader]) -> dict[int, Callable[[Any], None]]:
    """Return what to do for each instruction: as Python does, unless `reader` knows better."""

    def counted(action: Callable[[Any], None]) -> Callable[[Any], None]:
        def step(reader: _DataReader) -> None:
            reader.step()
            action(reader)

        return step

    found: dict[int, Callable[[Any], None]] = {}
    for name in names:
        code = getattr(pickle, name)[0]
        action = pickle._Unpickler.dispatch[code]
        action = getattr(reader, action.__name__, action)
        found[code] = counted(action) if name in _MAKERS else action
    return found


class _Name:
    """Stands for a class or a function that a pickle of torch names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Made:
    """Stands for what a call would have made."""

    def __init__(self, size: int, maker: str = "") -> None:
        self.size = size
        self.maker = maker


def _is_number(code: Any) -> bool:
    return isinstance(code, str) and re.fullmatch(r"[biufc][0-9]{1,2}", code) is not None


class _CallReader(_DataReader):
    """Goes through a pickle as torch's own reader does, and calls nothing: what would it take to read it?

    That reader knows which functions are harmless, but not how much they are asked for. Names it does not know are
    left to it: it refuses them.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}  # filled below

    def __init__(self, stream: IO[bytes], num_bytes: int, file_size: int) -> None:
        super().__init__(stream, num_bytes)
        self._file_size = file_size
        self._storages: dict[Any, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        name = name.rpartition(".")[2]
        if name == "bytearray":
            raise pickle.UnpicklingError("it asks for a bytearray, which may be of any length")
        return _Name(name)

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5:
            key, numbers = self.checked_key(pid[2]), pid[4]
            if type(numbers) is not int or not 0 <= numbers <= self._file_size:
                raise pickle.UnpicklingError("its tensors are larger than the whole")
            self._storages[key] = max(numbers, self._storages.get(key, 0))
            if sum(self._storages.values()) > self._file_size:
                raise pickle.UnpicklingError("its tensors are larger than the whole")
        return _Made(1)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(made, arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        self._weigh(state)
        maker = self.stack[-1].maker if isinstance(self.stack[-1], _Made) else ""
        if (maker == "dtype" and not self._is_plain_dtype(state)) or (
            maker == "_reconstruct" and not self._is_plain_array(state)
        ):
            raise pickle.UnpicklingError("it describes an array that is not made of plain numbers")

    def _call(self, called: Any, arguments: Any) -> _Made:
        name = called.name if isinstance(called, _Name) else ""
        if not name or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is no function")
        size = self._weigh(arguments)
        if name == "encode" and not (len(arguments) == 2 and arguments[1] in _ENCODINGS):
            raise pickle.UnpicklingError("it asks for an encoding that may make a text longer")
        if name == "dtype" and not (_is_number(arguments[0]) and arguments[1:] == (False, True)):
            raise pickle.UnpicklingError("it describes an array that is not made of plain numbers")
        if (name == "_reconstruct" or name.endswith("Tensor")) and self._asks_for_room(arguments):
            raise pickle.UnpicklingError("it asks for an array without saying what is in it")
        if name in ("ndarray", "_rebuild_nested_tensor") or name.endswith("DType"):
            raise pickle.UnpicklingError(f"it calls {name}, which trusts what it is told")
        if name == "_rebuild_from_type_v2":  # which calls the first one with the third
            self._call(*arguments[:3:2])
        return _Made(size, name)

    @staticmethod
    def _is_plain_dtype(state: Any) -> bool:
        """Tell whether numpy may be given this. It believes every word, and flags of objects make numbers to addresses."""
        return (
            isinstance(state, tuple)
            and state[1:2] in (("<",), (">",), ("|",), ("=",))
            and (state[:1], state[2:]) == ((3,), (None, None, None, -1, -1, 0))
        )

    @staticmethod
    def _is_plain_array(state: Any) -> bool:
        if not isinstance(state, tuple) or len(state) != 5:
            return False
        _, shape, kind, _, content = state
        return (
            isinstance(shape, tuple)
            and all(type(size) is int for size in shape)
            and isinstance(kind, _Made)
            and kind.maker == "dtype"
            and (isinstance(content, str) or (isinstance(content, _Made) and content.maker == "encode"))
        )

    @staticmethod
    def _asks_for_room(arguments: tuple[Any, ...]) -> bool:
        shape = [item for part in arguments for item in (part if isinstance(part, (tuple, list)) else (part,))]
        return any(isinstance(item, int) and item for item in shape)

    def _weigh(self, value: Any, depth: int = 0) -> int:
        """Return how many things would be looked at, or copied, if a function were called with `value`."""
        if isinstance(value, (tuple, list)):
            if depth == _MAX_DEPTH:
                raise pickle.UnpicklingError(f"something in it is more than {_MAX_DEPTH} tuples deep")
            self.charge(len(value))
            return 1 + sum(self._weigh(item, depth + 1) for item in value)
        size = value.size if isinstance(value, _Made) else len(value) if hasattr(value, "__len__") else 1
        self.charge(size)
        return size

    def checked_key(self, key: Any) -> Any:
        if isinstance(key, tuple):
            self._weigh(key)  # hashed as often as it is a key, to its ground
        elif isinstance(key, (list, dict, set)):
            raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
        return key

    def set_items(self, items: dict[Any, Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Made):
            target.size += len(items)
        else:
            super().set_items(items)


_CallReader.dispatch = _dispatch(_TORCH_OPCODES, _CallReader)


def read_records(file: Path, classes: Collection[tuple[str, str]], max_bytes: int = 2**29) -> Any:
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
        content = file.read_bytes()
        return _RecordReader(io.BytesIO(content), len(content), classes).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(explain(f"{file} is refused: {error}.", remedy=_DISTRUST)) from error
    except _DAMAGE as error:
        raise CheckpointError(
            explain(f"{file} is damaged: {type(error).__name__}: {error}", remedy="Use another checkpoint.")
        ) from error


class _RecordReader(_DataReader):
    """Calls nothing but the stand-ins of `find_class`."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}  # filled below

    def __init__(self, stream: IO[bytes], num_bytes: int, classes: Collection[tuple[str, str]]) -> None:
        super().__init__(stream, num_bytes)
        # Made anew for each file: whatever it does to its classes is forgotten with it.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (Record,), {"kind": name}) for module, name in classes
        }
        self._known |= {("torch", "Size"): _plain_tuple, ("torch.serialization", "_get_layout"): self._plain_text}
        self._known |= {
            (module, name): self._plain_text
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        found = self._known.get((module, name))
        if found is None:
            # A name in a file can be as long as the file.
            raise pickle.UnpicklingError(f"it names {module:.200}.{name:.200}, which its kind of file has no use for")
        return found

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise pickle.UnpicklingError("it changes something that is no record")
        self.stack[-1].state = state

    def _plain_text(self, *parts: str) -> str:
        # join() refuses what is no text. To print lists of lists could take all memory.
        self.charge(sum(map(len, parts)) + len(parts))
        return "/".join(parts)


def _plain_tuple(items: tuple[int, ...] = ()) -> tuple[int, ...]:
    if type(items) is not tuple:
        raise TypeError(f"torch.Size of a {type(items).__name__}")
    return items


_RecordReader.dispatch = _dispatch(_RECORD_OPCODES, _RecordReader)
