"""What travels between a launcher and workers that run a function: the function, its arguments, and what it returns.

Owns the use of cloudpickle, and the format of the files. They lie in a folder that only this user can read, and both
ends are one run, so pickles are safe here.

[Note: by name or by value] A forked worker has the modules of its parent, so that the class of what it returns is
found by its name, and is the very class the parent has. A new interpreter has not: what was defined in a notebook
travels by value. Cloudpickle gives each such class a number when it is sent, by which it is recognised when it comes
back.
"""

from __future__ import annotations

import linecache
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.available import is_installed, require
from ..core.errors import LaunchError, WrongTypeError, explain


def pack_call(function: Callable[..., Any], arguments: Sequence[Any], file: Path) -> None:
    """Write a call for a new interpreter: functions and classes of a notebook, closures and lambdas included.

    Raises:
        MissingPackage: (an `ImportError`) if cloudpickle is not installed.
        WrongTypeError: (a `TypeError`) if something in the call cannot travel, such as an open file.
    """
    require("cloudpickle", setting="Running a function in new interpreters", install="'accelerate[notebook]'")
    import cloudpickle

    try:
        call = cloudpickle.dumps((function, tuple(arguments)))
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise WrongTypeError(
            explain(
                f"{name} or its arguments cannot be sent to a new interpreter: {_said(error)}.",
                accepted="what cloudpickle can write; no open files, locks, generators or connections",
                remedy="Create such objects inside the function.",
            )
        ) from error
    # The text of notebook cells is in no file. Tracebacks of the worker shall show it.
    cells = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    file.write_bytes(pickle.dumps((cells, call)))


def unpack_call(file: Path) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Read what `pack_call` wrote."""
    cells, call = pickle.loads(file.read_bytes())  # noqa: S301 - see above
    linecache.cache.update(cells)
    return pickle.loads(call)  # noqa: S301 - see above


def pack_result(value: Any, file: Path, *, by_value: bool) -> None:
    """Write what the function returned. See [Note: by name or by value].

    Raises:
        WrongTypeError: (a `TypeError`) if it cannot travel.
    """
    writers: list[Callable[[Any], bytes]] = [pickle.dumps]
    if is_installed("cloudpickle"):
        import cloudpickle

        writers.insert(0 if by_value else 1, cloudpickle.dumps)
    errors = []
    for write in writers:
        try:
            data = write(value)
        except Exception as error:  # noqa: BLE001 - the next writer may do it, and the first error is raised below
            errors.append(error)
        else:
            # Renamed, so that a worker that ends in the middle leaves nothing that looks whole.
            part = file.with_name(f"{file.name}.part")
            part.write_bytes(data)
            part.rename(file)
            return
    raise WrongTypeError(
        explain(
            f"What the function returned cannot be sent back: a {type(value).__name__}, {_said(errors[0])}.",
            accepted="what pickle can write",
            remedy="Return numbers, texts, lists, dictionaries or tensors; or leave return_results out.",
        )
    )


def unpack_results(files: Sequence[tuple[int, Path]]) -> list[Any]:
    """Read what the workers wrote: (rank, file) each.

    Raises:
        LaunchError: (a `RuntimeError`) if one is missing, or cannot be read, naming the rank.
    """
    return [_unpack_result(rank, file) for rank, file in files]


def _unpack_result(rank: int, file: Path) -> Any:
    if not file.exists():
        raise LaunchError(
            explain(
                f"Rank {rank} ended without a result: it was interrupted, or left by sys.exit().",
                remedy="Let the function return on all ranks, or leave return_results out.",
            )
        )
    try:
        return pickle.loads(file.read_bytes())  # noqa: S301 - see above
    except Exception as error:
        raise LaunchError(
            explain(
                f"What rank {rank} returned cannot be read here: {_said(error)}.",
                accepted="objects whose classes can be imported in the notebook too",
                remedy="Return numbers, texts, lists, dictionaries or tensors.",
            )
        ) from error


def search_path() -> list[str]:
    """Return where a new interpreter shall look for modules: where this one does."""
    return list(sys.path)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
