"""Everything of a run that is not weights: optimizers, schedulers, scaler, loaders, random generators, own objects.

Owns the two files that one state becomes (its structure as JSON, its tensors as safetensors), and what is kept of
a loader and of the random generators.
"""

from __future__ import annotations

import hashlib
import io
import random
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..core.errors import CheckpointError, explain
from ..hardware import Hardware
from . import documents, layout, legacy
from .codec import Inexpressible, decode, encode
from .files import File, TensorFile, TextFile
from .trust import read_trusted, write_pickle
from .weights import check_count, read_tensors

FORMAT = 1


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON file of one state."""

    format: int
    num_tensors: int
    state: Any


def plan_state(stem: str, state: Any, *, allow_pickle: bool = False) -> list[File]:
    """Return the files of one state: `<stem>.json` and, if it holds tensors, `<stem>.safetensors` before it.

    Args:
        stem: Under which name it is kept.
        state: Any nesting of what `codec` knows.
        allow_pickle: Keep a state that holds anything else as `<stem>.pkl`.

    Raises:
        CheckpointError: If the state holds something that cannot be written; the message has its place.
    """
    try:
        tree, tensors = encode(state, stem)
    except Inexpressible as error:
        if allow_pickle:
            return [_plan_pickle(stem, state)]
        raise Inexpressible(
            f"{error} Or pass allow_pickle=True to save_state and load_state; who loads such a checkpoint runs its code."
        ) from None
    structure, numbers = layout.state_files(stem)
    document = msgspec.json.encode(_Document(FORMAT, len(tensors), tree))
    documents.check_size(document, stem, "Keep long lists of numbers as a tensor or an array.")
    check_count(len(tensors), numbers)
    text = TextFile(structure, document + b"\n")
    return [TensorFile(numbers, tensors), text] if tensors else [text]


def _plan_pickle(stem: str, state: Any) -> TextFile:
    """Pickle at once, so that what cannot be raises at the call, and what changes later is not in the file."""
    content = io.BytesIO()
    try:
        write_pickle(state, content)
    except Exception as error:
        raise CheckpointError(
            explain(f"{stem} cannot be pickled either: {type(error).__name__}: {error}", remedy="Leave it out.")
        ) from error
    return TextFile(layout.pickle_file(stem), content.getvalue())


def has_state(folder: Path, stem: str) -> bool:
    """Tell whether `folder` holds a state under `stem`, ours or one of Accelerate 1.x."""
    return has_own_state(folder, stem) or legacy.peer_file(folder, stem).is_file()


def has_own_state(folder: Path, stem: str) -> bool:
    """Tell whether `folder` holds a state under `stem` that this library has written."""
    return (folder / layout.state_files(stem)[0]).is_file() or _own_pickle(folder, stem) is not None


def _own_pickle(folder: Path, stem: str) -> Path | None:
    """Return the pickle that this library has written for a state; not what Accelerate 1.x calls the same."""
    file = folder / layout.pickle_file(stem)
    is_own = file != legacy.peer_file(folder, stem) or (folder / layout.MANIFEST_NAME).is_file()
    return file if is_own and file.is_file() and not (folder / layout.state_files(stem)[0]).is_file() else None


def check_pickle(folder: Path, stem: str, allow_pickle: bool) -> None:
    """Refuse a state whose reading runs code, unless that is wanted.

    Raises:
        CheckpointError: Naming the file and the argument.
    """
    file = _own_pickle(folder, stem)
    if file is not None and not allow_pickle:
        raise CheckpointError(
            explain(
                f"{file} is a pickle, saved with allow_pickle=True: to read it runs code from it.",
                remedy="Only if you trust whoever wrote the checkpoint, pass allow_pickle=True to load_state.",
            )
        )


def read_state(folder: Path, stem: str, *, allow_pickle: bool = False) -> Any:
    """Read one state. Tensors come out on the CPU.

    Args:
        folder: The checkpoint.
        stem: Under which name it is kept.
        allow_pickle: Read `<stem>.pkl` too, where there is nothing else, which may run any code.

    Raises:
        MissingFile: If there is none.
        CheckpointError: If it is damaged, or is a pickle that needs code to be read.
    """
    structure, numbers = (folder / name for name in layout.state_files(stem))
    if not structure.is_file():
        check_pickle(folder, stem, allow_pickle)
        pickled = folder / layout.pickle_file(stem)
        if allow_pickle and pickled.is_file():
            return read_trusted(pickled)
        if legacy.peer_file(folder, stem).is_file():
            return legacy.read_state(folder, stem)
        raise layout.MissingFile(
            explain(
                f"{folder} holds no {stem}: {structure.name} is not there.", remedy="Prepare what was prepared then."
            )
        )
    document = documents.parse(structure.read_bytes(), _Document, structure)
    if document.format > FORMAT:
        raise CheckpointError(explain(f"{structure} has format {document.format}.", accepted=f"up to {FORMAT}"))
    tensors: dict[str, torch.Tensor] = {}
    if document.num_tensors:
        if not numbers.is_file():
            raise layout.MissingFile(explain(f"{structure} keeps tensors in {numbers.name}, which is not there."))
        tensors, _ = read_tensors(numbers)
    if len(tensors) != document.num_tensors:
        raise documents.damaged(structure, f"{document.num_tensors} tensors are named, and {len(tensors)} are there")
    return decode(document.state, tensors, str(structure))


def random_state(hardware: Hardware) -> dict[str, Any]:
    """Return the states of all random generators of this process."""
    state: dict[str, Any] = {
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if hardware.rng_key not in ("", *state):  # the CPU's own is there already
        state[hardware.rng_key] = hardware.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], hardware: Hardware) -> tuple[list[str], list[str]]:
    """Set the random generators of this process; return those that have no match, and those it is wrong for."""
    setters = {
        "random_state": random.setstate,
        "numpy_random_seed": np.random.set_state,
        "torch_manual_seed": torch.set_rng_state,
    }
    if hardware.rng_key not in ("", *setters):
        setters[hardware.rng_key] = hardware.set_rng_state
    absent, failed = [], []
    for name, setter in setters.items():
        if name not in state:
            absent.append(f"{name} (not in the checkpoint)")
            continue
        value = state[name]
        if name == hardware.rng_key and isinstance(value, (list, tuple)) and len(value) > hardware.count():
            # The run used to see more devices; those that are left go on.
            absent.append(f"{name} of {len(value) - hardware.count()} devices (not visible here)")
            value = value[: hardware.count()]
        try:
            setter(value)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
            failed.append(f"{name} ({error})")
    return absent, failed


def load_random_state(folder: Path, rank: int, saved_ranks: int | None, hardware: Hardware, strict: bool) -> Any:
    """Restore the random generators of `rank`; return what the file says besides, such as the step of old files.

    Args:
        folder: The checkpoint.
        rank: Whose generators.
        saved_ranks: How many ranks saved, if known. A rank beyond these gets a state that follows from rank 0's.
        hardware: What the rank computes on.
        strict: Raise if a state that was saved cannot be restored; otherwise only say so.
    """
    stem = layout.rng_stem(rank)
    if saved_ranks is not None and rank >= saved_ranks and has_state(folder, layout.rng_stem(0)):
        _derive_random_state(folder, rank, hardware)
        return {}
    if not has_state(folder, stem):
        saved = "an unknown number of" if saved_ranks is None else str(saved_ranks)
        _complain(
            f"Rank {rank} keeps its own random state: {folder} was saved by {saved} ranks and holds none for it.",
            strict and saved_ranks is not None and rank < saved_ranks,
        )
        return {}
    state = read_state(folder, stem)
    if not isinstance(state, dict) or not isinstance(state.get("step", 0), int):
        raise CheckpointError(explain(f"{folder / stem} holds a {type(state).__name__}, not random states."))
    absent, failed = set_random_state(state, hardware)
    if absent or failed:
        # Absent ones were saved on another kind or number of devices, which is no damage.
        _complain(f"Random states not restored on rank {rank}: {', '.join(absent + failed)}.", strict and bool(failed))
    return state


def _derive_random_state(folder: Path, rank: int, hardware: Hardware) -> None:
    """Seed the generators of a rank that the saved run did not have."""
    state = read_state(folder, layout.rng_stem(0))
    root = state.get("torch_manual_seed") if isinstance(state, dict) else None
    if not isinstance(root, torch.Tensor):
        raise CheckpointError(explain(f"{folder / layout.rng_stem(0)} holds no state of torch's generator."))
    digest = hashlib.blake2b(root.numpy().tobytes() + rank.to_bytes(8, "big"), digest_size=8)
    seed = int.from_bytes(digest.digest(), "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    hardware.manual_seed_all(seed)


def _complain(message: str, is_error: bool) -> None:
    if is_error:
        raise CheckpointError(explain(message, remedy="Pass strict=False to go on with other random numbers."))
    warnings.warn(message, stacklevel=3)
