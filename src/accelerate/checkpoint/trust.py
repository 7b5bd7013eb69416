"""The one file that reads and writes pickles.

Owns every call of `torch.save` and `torch.load`. Reading runs no code from the file: tensors, containers and
numpy arrays are rebuilt, anything else is refused by name. Only a caller who passes `weights_only=False`
himself gets more; nothing falls back to it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

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


_REMEDY = "If you trust its author, read it with accelerate.utils.load(file, weights_only=False)."
# The one class that torch lets a pickle call with a length.
_ALLOCATES = b"bytearray"


class RefusedPickle(CheckpointError, pickle.UnpicklingError):
    """A pickle holds more than data, or something that pretends to be one does."""


def read_pickle(file: Path, map_location: Any = "cpu") -> Any:
    """Read a file written by `torch.save`, running none of its code.

    Raises:
        CheckpointError: If the file is damaged, or holds anything but data.
    """
    try:
        return load(file, map_location)
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
