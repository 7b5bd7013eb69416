"""Where everything in a checkpoint lies.

Owns every file name this library writes or reads, the numbering of checkpoint folders, and which of them to
remove. Pure: looks at names, never at a disk. Imports no torch.

A checkpoint folder:

    model.safetensors, model_1.safetensors     weights, one file per model (save_state)
    model-00001-of-00003.safetensors,
    model.safetensors.index.json               the same, when sharded (save_model)
    pytorch_model.bin and its like             the same with safe_serialization=False
    optimizer.json, optimizer_1.json           one state: its structure as JSON ...
    optimizer.safetensors                      ... and its tensors, only if it has any
    scheduler.json, scaler.json                as above
    sampler.json                               where the first loader is: epoch, place, and what its order is drawn from
    sampler_1.json                             the same of the second one
    dl_state_dict_rank0.json                   what a stateful loader's worker processes have read, one per rank
    random_states_0.json                       random generators, one per rank
    accumulation_rank0.json                    windows of accumulation and their gradients, one per rank; only if open
    custom_checkpoint_0.json                   registered objects, in order of registration
    custom_checkpoint_0.pkl                    one state that JSON and tensors cannot express; only with allow_pickle=True
    accelerate_manifest.json                   written last: sizes and hashes of all of the above
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from ..core.errors import CheckpointError

MODEL_NAME = "pytorch_model"
SAFE_MODEL_NAME = "model"
FSDP_MODEL_NAME = "pytorch_model_fsdp"
OPTIMIZER_NAME = "optimizer"
SCHEDULER_NAME = "scheduler"
SAMPLER_NAME = "sampler"
LOADER_NAME = "dl_state_dict"
SCALER_NAME = "scaler.pt"
SCALER_STEM = "scaler"
RNG_STATE_NAME = "random_states"
CUSTOM_NAME = "custom_checkpoint"
WINDOWS_NAME = "accumulation"

WEIGHTS_NAME = "pytorch_model.bin"
WEIGHTS_PATTERN_NAME = "pytorch_model{suffix}.bin"
WEIGHTS_INDEX_NAME = "pytorch_model.bin.index.json"
SAFE_WEIGHTS_NAME = "model.safetensors"
SAFE_WEIGHTS_PATTERN_NAME = "model{suffix}.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

MANIFEST_NAME = "accelerate_manifest.json"
CHECKPOINTS_FOLDER = "checkpoints"
PREFIX = ".accelerate-"
"""How everything begins that is not there to stay."""
SAVING_NAME = ".accelerate-saving"
"""A folder being written. Whatever an earlier process left there is worthless."""
COMMIT_NAME = ".accelerate-commit"
"""A complete state inside an older one, on its way into place. It is the one that counts."""
JOURNAL_NAME = "journal.json"
REMOVING_PREFIX = ".accelerate-removing-"
FILES_PREFIX = "files-"
"""At an address the files of a save lie below this and the save's id; the manifest beside it says which save counts."""

_LONGEST_NAME = 255
"""Bytes, on every file system in use."""
# No save counts further than 18 digits, and Python refuses to read numbers of thousands.
_CHECKPOINT = re.compile(r"checkpoint_(0|[1-9][0-9]{0,17})")
_NUMBER = r"(_[1-9][0-9]{0,17})?"
_SHARD = r"(-[0-9]{5}-of-[0-9]{5})?"
_WEIGHTS = re.compile(rf"(model|pytorch_model)(?P<number>{_NUMBER}){_SHARD}\.(safetensors|bin)(\.index\.json)?")
_OPTIMIZER = re.compile(rf"{OPTIMIZER_NAME}(?P<number>{_NUMBER})\.(json|bin|pkl)")
_SCHEDULER = re.compile(rf"{SCHEDULER_NAME}(?P<number>{_NUMBER})\.(json|bin|pkl)")
_SAMPLER = re.compile(rf"{SAMPLER_NAME}(?P<number>{_NUMBER})\.(json|bin|pkl)")
_OF_RUN = rf"(optimizer{_NUMBER}|scheduler{_NUMBER}|sampler{_NUMBER}|dl_state_dict{_NUMBER}(_rank[0-9]{{1,18}})?)"
_OF_RANK = r"(random_states_[0-9]{1,18}|custom_checkpoint_[0-9]{1,18})"
# With the endings that this library or the peer gives them, and no others: `scaler.pkl` is somebody else's.
_STATE = re.compile(
    rf"({_OF_RUN}|{_OF_RANK}|accumulation_rank[0-9]{{1,18}}|scaler)\.(json|safetensors)"
    rf"|{_OF_RUN}\.bin|{_OF_RANK}\.pkl|{re.escape(SCALER_NAME)}"
)


_KINDS = (
    (rf"{re.escape(MANIFEST_NAME)}", "manifest: sizes and hashes of all other files"),
    (rf"(?:model|pytorch_model){_NUMBER}-([0-9]{{5}})-of-([0-9]{{5}})\.\w+", "weights of model {}, shard {} of {}"),
    (rf"(?:model|pytorch_model){_NUMBER}\.\w+\.index\.json", "weights of model {}: which shard holds what"),
    (rf"(?:model|pytorch_model){_NUMBER}\.\w+", "weights of model {}"),
    (rf"optimizer{_NUMBER}\.\w+", "optimizer {}"),
    (rf"scheduler{_NUMBER}\.\w+", "scheduler {}"),
    (rf"sampler{_NUMBER}\.\w+", "position of loader {}"),
    (rf"dl_state_dict{_NUMBER}_rank([0-9]{{1,18}})\.\w+", "what rank {1} has read of loader {0}"),
    (rf"dl_state_dict{_NUMBER}\.\w+", "what one rank has read of loader {}"),
    (r"random_states_([0-9]{1,18})\.\w+", "random states of rank {}"),
    (r"accumulation_rank([0-9]{1,18})\.\w+", "open windows of accumulation of rank {}"),
    (r"scaler\.\w+", "gradient scaler"),
    (r"custom_checkpoint_([0-9]{1,18})\.\w+", "registered object {}"),
    (r"pytorch_model_fsdp_([0-9]{1,18})/\.metadata", "weights of model {}: which piece lies where"),
    (r"pytorch_model_fsdp_([0-9]{1,18})/.*\.distcp", "weights of model {}, in pieces"),
    (r"optimizer_([0-9]{1,18})/\.metadata", "optimizer {}: which piece lies where"),
    (r"optimizer_([0-9]{1,18})/.*\.distcp", "optimizer {}, in pieces"),
    (r"pytorch_model_fsdp(_[0-9]{1,18})?\.bin", "weights of model {}"),
    (r"\.metadata", "which piece lies where"),
    (r".*\.distcp", "tensors in pieces"),
)
_WORDS = tuple((re.compile(pattern), words) for pattern, words in _KINDS)


class MissingFile(CheckpointError, FileNotFoundError):
    """A file that a checkpoint should hold is not there."""


def numbered(name: str, index: int) -> str:
    """Return the name of the `index`-th object of a kind; the first one has no number."""
    return name if index == 0 else f"{name}_{index}"


def model_file(index: int, safe_serialization: bool = True) -> str:
    """Return the file that holds the weights of model `index`."""
    if safe_serialization:
        return f"{numbered(SAFE_MODEL_NAME, index)}.safetensors"
    return f"{numbered(MODEL_NAME, index)}.bin"


def shard_file(file: str, number: int, count: int) -> str:
    """Return the file of shard `number` (from 1) of `count` of the weights that would fit in `file` alone."""
    if count == 1:
        return file
    stem, _, suffix = file.rpartition(".")
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def index_file(file: str) -> str:
    """Return the file that says which shard holds which tensor."""
    return f"{file}.index.json"


def rng_stem(rank: int) -> str:
    """Return the stem under which the random generators of `rank` are kept."""
    return f"{RNG_STATE_NAME}_{rank}"


def loader_stem(index: int, rank: int) -> str:
    """Return the stem under which `rank` keeps its position in stateful loader `index`."""
    return f"{numbered(LOADER_NAME, index)}_rank{rank}"


def windows_stem(rank: int) -> str:
    """Return the stem under which `rank` keeps its windows of accumulation."""
    return f"{WINDOWS_NAME}_rank{rank}"


def custom_stem(index: int) -> str:
    """Return the stem under which registered object `index` is kept."""
    return f"{CUSTOM_NAME}_{index}"


def state_files(stem: str) -> tuple[str, str]:
    """Return the two files of one state: its structure, and its tensors."""
    return f"{stem}.json", f"{stem}.safetensors"


def pickle_file(stem: str) -> str:
    """Return the file of one state that its two files cannot express. Accelerate 1.x gives some of its files such names."""
    return f"{stem}.pkl"


def custom_indices(names: Iterable[str]) -> set[int]:
    """Return the numbers of the registered objects in a folder with these names, ours or the peer's."""
    found = (re.fullmatch(rf"{CUSTOM_NAME}_([0-9]{{1,18}})\.(json|pkl)", name) for name in names)
    return {int(match.group(1)) for match in found if match}


def count_saved(names: Iterable[str]) -> dict[str, int]:
    """Count the models, optimizers, schedulers and loaders in a folder with these names, ours or the peer's."""
    patterns = {"models": _WEIGHTS, "optimizers": _OPTIMIZER, "schedulers": _SCHEDULER, "loaders": _SAMPLER}
    found: dict[str, set[int]] = {kind: set() for kind in patterns}
    for name in names:
        for kind, pattern in patterns.items():
            if match := pattern.fullmatch(name):
                found[kind].add(int((match["number"] or "_0")[1:]))
    return {kind: len(numbers) for kind, numbers in found.items()}


def model_indices(names: Iterable[str]) -> list[int]:
    """Return the numbers of the models whose weights have some of these names, ours or the peer's."""
    found = (_WEIGHTS.fullmatch(name) for name in names)
    return sorted({int((match["number"] or "_0")[1:]) for match in found if match})


def is_weights(name: str) -> bool:
    """Tell whether a file of this name holds model weights, or the index of their shards."""
    return _WEIGHTS.fullmatch(name) is not None


def is_checkpoint_file(name: str) -> bool:
    """Tell whether a save of the whole state may have written a file of this name."""
    return name == MANIFEST_NAME or is_weights(name) or _STATE.fullmatch(name) is not None


def marks_checkpoint(name: str) -> bool:
    """Tell whether a file of this name stands nowhere but in a save of the whole state, ours or the peer's."""
    return name == MANIFEST_NAME or re.fullmatch(rf"{RNG_STATE_NAME}_[0-9]{{1,18}}\.(json|pkl)", name) is not None


def in_words(name: str) -> str:
    """Say what the file of this name in a checkpoint holds."""
    for pattern, words in _WORDS:
        if match := pattern.fullmatch(name):
            numbers = [int((group or "").lstrip("_") or 0) for group in match.groups()]
            tensors = " (tensors)" if name.endswith(".safetensors") and not is_weights(name) else ""
            return words.format(*numbers) + tensors
    return "no part of a checkpoint, as far as its name says"


def is_inside(name: str) -> bool:
    """Tell whether a relative name read from a file stays inside its folder, links not considered."""
    parts = [part for part in name.split("/") if part not in ("", ".")]  # as text: manifests name up to 10^5 files
    plain = "\0" not in name and "\\" not in name and not re.match("[A-Za-z]:", name)
    return bool(parts) and plain and not name.startswith("/") and ".." not in parts


def is_file_name(name: str) -> bool:
    """Tell whether a name read from a file can be one of a file in the same folder."""
    return is_inside(name) and len(PurePosixPath(name).parts) == 1 and len(name.encode()) <= _LONGEST_NAME


def checkpoint_folder(project_dir: str | Path, iteration: int) -> Path:
    """Return the folder that automatic naming gives to save number `iteration`."""
    return Path(project_dir) / CHECKPOINTS_FOLDER / checkpoint_name(iteration)


def checkpoint_name(iteration: int) -> str:
    """Return the name that automatic naming gives to save number `iteration`."""
    return f"checkpoint_{iteration}"


def checkpoint_number(name: str) -> int | None:
    """Return the N of `checkpoint_N`, or None: any other folder is none of ours."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match.group(1)) if match else None


def newest_first(names: Iterable[str]) -> list[str]:
    """Return the automatically named folders among `names`, highest number first."""
    numbers = {name: number for name in names if (number := checkpoint_number(name)) is not None}
    return sorted(numbers, key=lambda name: numbers[name], reverse=True)


def plan_rotation(
    names: Iterable[str], total_limit: int | None, newest: str, is_good: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """Choose the folders to remove after a save, oldest first.

    Args:
        names: What lies beside the new folder, in any order; foreign names are ignored.
        total_limit: How many to keep. None keeps all.
        newest: The folder just written. It is kept, whatever its number.
        is_good: Tells whether a folder could be loaded. One that could not does not count, and stays until those
            around it go.
    """
    if total_limit is None:
        return []
    removed: list[str] = []
    kept = 1
    for name in newest_first(names):
        if name == newest:
            continue
        if kept >= total_limit:
            removed.insert(0, name)
        elif is_good(name):
            kept += 1
    return removed
