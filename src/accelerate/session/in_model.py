"""Weights from a file or folder into a model that is there already.

Owns what may be given: one file, an index of shards, or a folder that holds either. Models that are larger than the
memory of their device, with a device map and offloading, are not built yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import layout
from ..checkpoint.weights import complete_tied, read_file, read_shards
from ..core.errors import CheckpointError, SettingError, UnsupportedCombination, explain
from ..parallel.unwrap import extract_model_from_parallel

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_INDEX_SUFFIX = ".index.json"


def load_state_dict(checkpoint_file: str | Path, device_map: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the weights in one file onto the CPU, running no code from it.

    Tensors of a safetensors file lie in the file, which is mapped: copy what you keep.

    Args:
        checkpoint_file: A safetensors file, or one of `torch.save`.
        device_map: Not built yet.

    Raises:
        SettingError: (a `ValueError`) if there is no such file.
        CheckpointError: If it is damaged, or a pickle that holds more than data.
        UnsupportedCombination: If `device_map` is given.
    """
    _refuse({"device_map": device_map}, "load_state_dict")
    file = Path(checkpoint_file).expanduser()
    if not file.is_file():
        raise SettingError(explain(f"{file} is no file of weights.", remedy="Check the path."))
    return read_file(file)


def load_checkpoint_in_model(
    model: torch.nn.Module,
    checkpoint: str | Path,
    device_map: Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Collection[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Read weights into `model`, wherever its parameters are. Each rank reads for itself; no code is run.

    Args:
        model: The model itself, or a prepared one.
        checkpoint: What `save_model` or `save_state` has written, or like it: a safetensors file, a file of
            `torch.save`, an index of shards, or a folder with one of these.
        device_map: Not built yet, as the other arguments about placing and offloading.
        offload_folder: Not built yet.
        dtype: Parameters and buffers of floating point that are loaded take this type, such as `torch.bfloat16`.
        offload_state_dict: Not built yet.
        offload_buffers: Not built yet.
        keep_in_fp32_modules: Not built yet.
        offload_8bit_bnb: Not built yet.
        strict: Refuse weights that lack names of the model, or hold others. Otherwise these are told in a warning.
        full_state_dict: Only True is built.
        broadcast_from_rank0: Not built yet.

    Raises:
        SettingError: (a `ValueError`) if `checkpoint` holds no weights, or several.
        CheckpointError: If they are damaged, do not fit, or have no name in common with the model.
        UnsupportedCombination: If an argument is given that is not built, or `model` is on the meta device.
    """
    absent = {
        "device_map": device_map,
        "offload_folder": offload_folder,
        "offload_state_dict": offload_state_dict,
        "offload_buffers": offload_buffers,
        "keep_in_fp32_modules": keep_in_fp32_modules,
        "offload_8bit_bnb": offload_8bit_bnb,
        "full_state_dict": not full_state_dict,
        "broadcast_from_rank0": broadcast_from_rank0,
    }
    _refuse(absent, "load_checkpoint_in_model")
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    own = inner.state_dict(keep_vars=True)
    _refuse_meta(own)
    file = _find(Path(checkpoint).expanduser())
    found = read_shards(file) if file.name.endswith(_INDEX_SUFFIX) else read_file(file)
    weights = complete_tied(found, inner)
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    _refuse_strangers(file, own, weights, missing)
    if dtype is not None:
        _convert(own, weights, dtype)
    try:
        inner.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(
            explain(f"The weights in {file} do not fit: {error}", remedy="Build the model as it was for the save.")
        ) from None
    if missing or unexpected:
        warnings.warn(
            f"{file}: {len(missing)} names of the model are not in it ({_listed(missing)}), and {len(unexpected)} are "
            f"not in the model ({_listed(unexpected)}). strict=True refuses this.",
            stacklevel=2,
        )


def _refuse_meta(own: Mapping[str, Any]) -> None:
    if empty := [name for name, tensor in own.items() if isinstance(tensor, torch.Tensor) and tensor.is_meta]:
        raise UnsupportedCombination(
            explain(
                f"load_checkpoint_in_model was given a model with tensors on the meta device, {empty[0]!r} among them.",
                remedy="Create them first: model.to_empty(device='cpu').",
            )
        )


def _refuse_strangers(file: Path, own: Mapping[str, Any], weights: Mapping[str, Any], missing: Sequence[str]) -> None:
    """Refuse weights of another model: to load none of them is not what anybody wants."""
    if weights and own and len(missing) == len(own):
        raise CheckpointError(
            explain(
                f"{file} and the model have no name in common: {_listed(list(weights))} there, {_listed(missing)} here.",
                remedy="Load weights of this model, or rename them.",
            )
        )


def _refuse(absent: Mapping[str, Any], function: str) -> None:
    if given := [name for name, value in absent.items() if value]:
        raise UnsupportedCombination(
            explain(
                f"{function} was given {', '.join(given)}: large models over several devices are not built yet.",
                remedy="Leave it out.",
            )
        )


def _find(place: Path) -> Path:
    """Return the one file or index that is meant."""
    if place.is_file():
        return place
    if not place.is_dir():
        raise SettingError(explain(f"{place} is neither a file of weights nor a folder.", remedy="Check the path."))
    for safe in (True, False):
        name = layout.model_file(0, safe)
        for candidate in (place / name, place / layout.index_file(name)):
            if candidate.is_file():
                return candidate
    names = [path.name for path in place.iterdir() if path.is_file()]
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    found = indices or [name for name in names if name.endswith(_SUFFIXES)]
    if len(found) != 1:
        raise SettingError(
            explain(
                f"{place} holds {len(found)} files that may be the weights: {_listed(sorted(found))}.",
                accepted="one file, or one index",
                remedy="Pass the file itself.",
            )
        )
    return place / found[0]


def _convert(own: Mapping[str, Any], weights: Mapping[str, torch.Tensor], dtype: torch.dtype | str) -> None:
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise SettingError(
            explain(f"load_checkpoint_in_model was given dtype={dtype!r}.", accepted="such as torch.bfloat16")
        )
    for name, tensor in own.items():
        if name in weights and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(kind)


def _listed(names: Collection[str]) -> str:
    listed = ", ".join(repr(name[:80]) for name in list(names)[:3])
    return f"{listed}, ..." if len(names) > 3 else listed or "none"
