"""Model weights in files that every tool reads.

Owns how a state dictionary becomes safetensors files (or, when asked, files of `torch.save`), whole or in shards with
an index; reading it back; and what happens to tensors that share memory: one of the names is written, the others
are recorded in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import safetensors
import torch

from ..collectives.base import Collectives
from ..core.errors import CheckpointError, WrongTypeError, explain
from ..core.text import convert_file_size_to_int
from ..runtime.state import current_or_single
from . import documents, durable, layout, manifest
from .codec import STORABLE, is_plain_tensor
from .commit import Staging
from .disk_errors import about
from .files import File, PickleFile, TensorFile, TextFile
from .manifest import FileEntry
from .tensor_file import read_header
from .trust import load, read_pickle, write_pickle

__all__ = ["load", "load_weights", "plan_weights", "save", "save_model"]

TIED_KEY = "tied"
"""In a file's metadata: JSON of names not written -> the written name they share memory with."""


MAX_TENSORS = 500_000
"""In one file. Reading a name costs some hundred bytes of memory, however few it takes in the file."""
MAX_INDEXED = 250_000
"""In one index."""
_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 200 * MAX_TENSORS


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def save_model(
    state: Mapping[str, torch.Tensor],
    folder: str | Path,
    collectives: Collectives,
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Write the weights of one model into `folder`, in place of any that are there.

    Called on all ranks; collective. Rank 0 writes, the others wait. Other files in `folder` stay.

    Args:
        state: Names and tensors; looked at on rank 0 only.
        folder: Where to write. Created if needed.
        collectives: How ranks tell each other of failures.
        max_shard_size: Bytes per file at most, as a number or such as `"10GB"`. One larger tensor is not cut.
        safe_serialization: Write safetensors; otherwise files of `torch.save`, which are pickles.

    Raises:
        CheckpointError: On all ranks, if writing failed on one, or `folder` holds a checkpoint of a run with other
            weights. The old ones are there then.
    """
    limit = convert_file_size_to_int(max_shard_size)
    final = Path(folder).expanduser()

    def plan() -> list[File]:
        leads = collectives.rank == 0
        return plan_weights(state, layout.model_file(0, safe_serialization), limit) if leads else []

    staging = Staging(final, collectives, stale=stale_weights)
    staging.complete(collectives, plan, lambda _, written: _refuse_other_weights(final, written))


def stale_weights(folder: Path, written: Collection[str]) -> list[str]:
    """Return the files of older weights of the one model that `written` is of; none from a checkpoint of a run."""
    names = {path.name for path in folder.iterdir()}
    if layout.MANIFEST_NAME in names:
        return []
    return [name for name in names - set(written) if layout.model_indices([name]) == [0]]


def _refuse_other_weights(folder: Path, written: Mapping[str, FileEntry]) -> None:
    """Keep a checkpoint of a run from holding weights of one moment, and an optimizer of another."""
    if not folder.is_dir() or (found := manifest.read(folder)) is None:
        return
    other = [name for name, entry in written.items() if found.files.get(name) != entry]
    if other:
        raise CheckpointError(
            explain(
                f"{folder} holds a checkpoint of a run, and {other[0]} would not be what it was saved with.",
                remedy="Save the weights into another folder, or save the whole state there with save_state.",
            )
        )


def plan_weights(state: Mapping[str, torch.Tensor], file: str, max_shard_bytes: int | None = None) -> list[File]:
    """Return what to write for `state`: `file`, or shards named after it and an index if it exceeds `max_shard_bytes`.

    Raises:
        CheckpointError: If something in `state` cannot stand in a safetensors file and `file` is one.
    """
    safe = file.endswith(".safetensors")
    kept, tied = separate_tied(state) if safe else (dict(state), {})
    plan = plan_shards({name: _size(tensor) for name, tensor in kept.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    files: list[File] = []
    for number, names in enumerate(plan, start=1):
        shard = layout.shard_file(file, number, len(plan))
        tensors = {name: kept[name] for name in names}
        if safe:
            check_count(len(tensors), shard)
            metadata = tied_metadata({name: source for name, source in tied.items() if source in tensors})
            files.append(TensorFile(shard, tensors, metadata))
        else:
            files.append(PickleFile(shard, tensors))
        weight_map.update(dict.fromkeys(names, shard))
    if len(plan) > 1:
        files.append(plan_index(file, weight_map, sum(map(_size, kept.values()))))
    return files


def plan_index(file: str, weight_map: Mapping[str, str], total_bytes: int) -> TextFile:
    """Return the file that says which shard holds which tensor of the weights that `file` alone would hold.

    Raises:
        CheckpointError: If it would name more tensors than are read.
    """
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = msgspec.json.format(msgspec.json.encode(content, order="deterministic"), indent=2)
    _check_count(text.count(b":"), MAX_INDEXED, layout.index_file(file))
    return TextFile(layout.index_file(file), text + b"\n")


def plan_shards(sizes: Mapping[str, int], max_bytes: int | None) -> list[list[str]]:
    """Divide names over files of at most `max_bytes`, in order; a larger one gets a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if max_bytes is not None and shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def separate_tied(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Divide `state` into tensors to write, and names that show the very same tensor as an earlier name.

    Raises:
        CheckpointError: If something in `state` cannot stand in a safetensors file.
    """
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        _check_storable(name, tensor)
        place = alias_key(tensor)
        if place is not None and place in first:
            tied[name] = first[place]
            continue
        kept[name] = tensor
        if place is not None:
            first[place] = name
    return kept, tied


def alias_key(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what two tensors have in common iff they are the same numbers in memory; None for no numbers."""
    if not is_plain_tensor(tensor) or tensor.numel() == 0:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _check_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        problem = f"{name!r} is a {type(tensor).__name__}, not a tensor"
    elif tensor.is_meta:
        problem = f"{name!r} has no numbers: it is on the meta device"
    elif not is_plain_tensor(tensor) or tensor.dtype not in STORABLE:
        problem = f"{name!r} ({type(tensor).__name__} of {tensor.dtype}, {tensor.layout}) has no safetensors form"
    else:
        return
    raise CheckpointError(
        explain(f"The weights cannot be written: {problem}.", remedy="Convert it first, or leave it out of the state.")
    )


def _size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def check_count(count: int, name: str) -> None:
    """Refuse to write more tensors into one file than would be read.

    Raises:
        CheckpointError: If there are.
    """
    _check_count(count, MAX_TENSORS, name)


def _check_count(count: int, limit: int, name: str) -> None:
    if count > limit:
        raise CheckpointError(
            explain(f"{name} would name {count} tensors.", accepted=f"up to {limit}", remedy="Stack small ones.")
        )


def tied_metadata(tied: Mapping[str, str]) -> dict[str, str]:
    """Return what a file's metadata says of names that share the memory of others."""
    return {TIED_KEY: msgspec.json.encode(dict(tied)).decode()} if tied else {}


def load_weights(folder: Path, index: int = 0) -> dict[str, torch.Tensor]:
    """Read the weights of model `index` onto the CPU; safetensors files are preferred.

    Raises:
        MissingFile: If there are none.
        CheckpointError: If a file is damaged, or an index names a file elsewhere.
    """
    file = find_weights(folder, index)
    return read_shards(file) if file.name.endswith(layout.index_file("")) else read_file(file)


def find_weights(folder: Path, index: int = 0) -> Path:
    """Return the file with the weights of model `index`, or the index of their shards.

    Raises:
        MissingFile: If there is none.
    """
    for safe in (True, False):
        file = folder / layout.model_file(index, safe)
        for found in (file, file.with_name(layout.index_file(file.name))):
            if found.is_file():
                return found
    raise layout.MissingFile(
        explain(
            f"{folder} holds no weights of model {index}.",
            accepted=f"{layout.model_file(index)} or {layout.model_file(index, False)}, or their shards with an index",
            remedy="Prepare as many models as were saved.",
        )
    )


def read_index(index: Path) -> dict[str, Path]:
    """Read which file holds which tensor.

    Raises:
        MissingFile: If a file is not there.
        CheckpointError: If the index is damaged, or names a file elsewhere.
    """
    content = index.read_bytes()
    if content.count(b":") > MAX_INDEXED:
        raise documents.damaged(index, f"it names more than the {MAX_INDEXED} tensors that are read")
    names = documents.parse(content, _Index, index).weight_map
    for shard in dict.fromkeys(names.values()):
        file = index.parent / shard
        if not layout.is_file_name(shard) or file.resolve().parent != index.parent.resolve():
            raise CheckpointError(
                explain(
                    f"{index} names the shard {shard[:200]!r}, outside its folder.",
                    remedy="Do not trust this checkpoint.",
                )
            )
        if not file.is_file():
            raise layout.MissingFile(explain(f"{index} names the shard {shard!r}, which is not there."))
    return {name: index.parent / shard for name, shard in names.items()}


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read all weights that an index names onto the CPU.

    Raises:
        MissingFile: If a file is not there.
        CheckpointError: If something is damaged, or the index names a file elsewhere.
    """
    names = read_index(index)
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(names.values()):
        state.update(read_file(file))
    if missing := [name for name in names if name not in state]:
        listed = ", ".join(repr(name[:200]) for name in missing[:5])
        raise CheckpointError(explain(f"{index} names tensors that its shards do not hold: {listed}."))
    return state


def read_file(file: Path) -> dict[str, Any]:
    """Read one file of weights onto the CPU: safetensors by its name, otherwise of `torch.save`.

    Raises:
        CheckpointError: If it is damaged, or a pickle that holds more than data.
    """
    return read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Read one safetensors file onto the CPU, with the names that share memory with a written one.

    Raises:
        CheckpointError: If it is damaged.
    """
    state, metadata = read_tensors(file)
    names = documents.parse(metadata.get(TIED_KEY, "{}").encode(), dict[str, str], file)
    for name, source in names.items():
        if source in state and name not in state:
            state[name] = state[source]
    return state


def own_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies that do not lie in the file that the tensors were read from, for whoever keeps them.

    As `codec.decode` does for states. Names of the same tensor stay names of the same tensor.
    """
    copies = {id(tensor): tensor for tensor in tensors.values()}
    copies = {place: tensor.clone() for place, tensor in copies.items()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors that stand in one safetensors file onto the CPU, and its metadata.

    The tensors lie in the file, which is mapped: see `own_copies`.

    Raises:
        CheckpointError: If it is damaged.
    """
    _check_header(file)
    try:
        with safetensors.safe_open(file, "pt") as content:
            # An open file is no mapping: its keys() have to be asked for.
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return state, content.metadata() or {}
    except (safetensors.SafetensorError, RuntimeError, OverflowError) as error:
        raise documents.damaged(file, error) from None


def _check_header(file: Path) -> None:
    """Refuse what the reader of safetensors files would let pass, or take long over."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_BYTES), "little")
        rest = file.stat().st_size - _HEADER_BYTES
        if rest < 0 or length > min(rest, _MAX_HEADER_BYTES):
            raise documents.damaged(file, f"a header of {length} bytes, with {max(rest, 0)} bytes behind its length")
        header = stream.read(length)
    if header.count(b"data_offsets") > MAX_TENSORS:
        raise documents.damaged(file, f"it holds more than the {MAX_TENSORS} tensors that are read")
    documents.parse(header, dict[str, Any], file)
    read_header(file)


def complete_tied(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Add the names that the model ties to one in `state`; other writers drop them without a record."""
    names_of: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = alias_key(tensor) if isinstance(tensor, torch.Tensor) else None
        if place is not None:
            names_of.setdefault(place, []).append(name)
    completed = dict(state)
    for names in names_of.values():
        source = next((name for name in names if name in state), None)
        if source is not None:
            completed.update({name: state[source] for name in names if name not in state})
    return completed


def save(
    obj: Any, f: str | Path | IO[bytes], save_on_each_node: bool = False, safe_serialization: bool = False
) -> None:
    """Write `obj` once: on the main process, or on that of each node. Other processes return at once.

    Args:
        obj: Anything; with `safe_serialization`, names and tensors.
        f: Path or binary stream. A path is replaced as a whole.
        save_on_each_node: Let the first process of every node write. For disks that nodes do not share.
        safe_serialization: Write a safetensors file; otherwise a `torch.save` file, which is a pickle.
    """
    process = current_or_single().process
    if (process.local_rank if save_on_each_node else process.rank) != 0:
        return
    if not safe_serialization:
        _write_to(f, lambda target: write_pickle(obj, target))
        return
    if not isinstance(obj, Mapping):
        raise WrongTypeError(
            explain(
                f"A {type(obj).__name__} cannot be a safetensors file.", accepted="a dictionary of names and tensors"
            )
        )
    kept, tied = separate_tied(obj)
    content = TensorFile("", kept, tied_metadata(tied))
    _write_to(f, content.write_to)


def _write_to(f: str | Path | IO[bytes], write: Callable[[Any], None]) -> None:
    if isinstance(f, (str, Path)):
        file = Path(f).expanduser()
        with about(file):
            durable.replace_file(file, write)
    else:
        write(f)
