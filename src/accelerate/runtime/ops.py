"""Operations over nested data: lists, tuples and mappings of tensors.

Owns the walk over containers; the operation on one tensor is a leaf of `collectives`. Containers keep their type
and nothing is changed in place, except by `broadcast_object_list`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..core.errors import SettingError, WrongTypeError, explain
from ..core.tree import honor_type, rebuild_mapping, tree_leaves, tree_zip_map
from . import state


def is_torch_tensor(tensor: Any) -> bool:
    """Tell whether this is a tensor."""
    return isinstance(tensor, torch.Tensor)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Apply `func` to each leaf that passes `test_type`, keeping the containers.

    Args:
        func: Called as `func(leaf, *args, **kwargs)`.
        data: Lists, tuples, namedtuples and mappings, nested in any way.
        test_type: Which leaves are meant; tensors by default.
        error_on_other_type: Refuse other leaves in place of returning them unchanged.

    Raises:
        WrongTypeError: (a `TypeError`) for another leaf, if asked for.
    """
    if isinstance(data, (tuple, list)):
        return honor_type(
            data,
            [
                recursively_apply(
                    func,
                    item,
                    *args,
                    test_type=test_type,
                    error_on_other_type=error_on_other_type,
                    **kwargs,
                )
                for item in data
            ],
        )
    if isinstance(data, Mapping):
        return rebuild_mapping(
            data,
            {
                key: recursively_apply(
                    func,
                    item,
                    *args,
                    test_type=test_type,
                    error_on_other_type=error_on_other_type,
                    **kwargs,
                )
                for key, item in data.items()
            },
        )
    if test_type(data):
        return func(data, *args, **kwargs)
    if error_on_other_type:
        name = getattr(func, "__name__", "this operation")
        raise WrongTypeError(
            explain(
                f"{name} got a leaf of type {type(data).__name__}: {data!r:.100}.",
                accepted="tensors, and lists, tuples and mappings of them",
                remedy="Use gather_object, or gather_for_metrics(..., use_gather_object=True), for other objects.",
            )
        )
    return data


def send_to_device(
    tensor: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | list[str] | None = None,
) -> Any:
    """Move all tensors, and anything else with a `.to`, in nested data to a device.

    Args:
        tensor: Nested data. Objects with a method `to(device)`, such as a BatchEncoding, are moved as a whole.
        device: Where to.
        non_blocking: Do not wait for copies from pinned memory.
        skip_keys: Keys of mappings whose values stay.
    """
    if is_torch_tensor(tensor):
        return tensor.to(device, non_blocking=non_blocking)
    if hasattr(tensor, "to"):
        try:
            return tensor.to(device, non_blocking=non_blocking)
        except TypeError:  # a `to` of its own kind, without non_blocking
            return tensor.to(device)
    if isinstance(tensor, (tuple, list)):
        return honor_type(
            tensor,
            [send_to_device(item, device, non_blocking, skip_keys) for item in tensor],
        )
    if isinstance(tensor, Mapping):
        skipped = {skip_keys} if isinstance(skip_keys, str) else set(skip_keys or ())
        return rebuild_mapping(
            tensor,
            {
                key: item if key in skipped else send_to_device(item, device, non_blocking, skip_keys)
                for key, item in tensor.items()
            },
        )
    return tensor


def gather(tensor: Any) -> Any:
    """Return the tensors of all ranks joined along dimension 0. Called on all ranks; collective.

    Args:
        tensor: Nested tensors, each of the same shape on all ranks; one without dimensions counts as one row.

    Returns:
        Data of the same structure, each tensor of shape `(num_processes * n, ...)`. One process gets back what it
        gave.

    Raises:
        WrongTypeError: (a `TypeError`) with several processes, for a leaf that is not a tensor.
        DistributedOperationException: In debug mode, if the ranks' shapes differ.
    """
    runtime = state.current_or_single()
    if runtime.process.world_size == 1:
        return tensor
    collectives = runtime.collectives
    collectives.check("gather", tensor)
    if isinstance(tensor, torch.Tensor):
        return collectives.all_gather(tensor)
    return recursively_apply(collectives.all_gather, tensor, error_on_other_type=True)


def gather_object(object: Any) -> list[Any]:
    """Return the objects of all ranks in one list. Called on all ranks; collective.

    Args:
        object: A list or tuple, whose items are joined; a tensor or array with dimensions, whose rows are; or any
            other object, which becomes one item. It travels pickled. One process gets back what it gave.
    """
    runtime = state.current_or_single()
    if runtime.process.world_size == 1:
        return object
    gathered = runtime.collectives.all_gather_object(object)
    return [item for brought in gathered for item in (brought if _has_rows(brought) else [brought])]


def _has_rows(brought: Any) -> bool:
    return isinstance(brought, (list, tuple)) or (isinstance(brought, (torch.Tensor, np.ndarray)) and brought.ndim > 0)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Overwrite tensors with those of rank `from_process`, and return them. Called on all ranks; collective.

    Args:
        tensor: Nested tensors, of the same structure and shapes on all ranks. Each is changed in place.
        from_process: The rank whose values count.
    """
    runtime = state.current_or_single()
    if runtime.process.world_size == 1:
        return tensor
    collectives = runtime.collectives
    collectives.check("broadcast", tensor)

    def leaf(item: torch.Tensor) -> torch.Tensor:
        shared = item.detach()
        received = collectives.broadcast(shared.contiguous(), from_process)
        if received.data_ptr() != shared.data_ptr():  # was not contiguous, so the copy was filled
            shared.copy_(received)
        return item

    return recursively_apply(leaf, tensor, error_on_other_type=True)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite the list with that of rank `from_process`, and return it. Called on all ranks; collective."""
    runtime = state.current_or_single()
    if runtime.process.world_size > 1:
        object_list[:] = runtime.collectives.broadcast_object(object_list, from_process)
    return object_list


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Return the sum or mean of each tensor over all ranks. Called on all ranks; collective.

    Args:
        tensor: Nested tensors, of the same structure and shapes on all ranks.
        reduction: `"sum"`, `"mean"` or `"none"` (which only scales).
        scale: What the result is multiplied by.

    Raises:
        SettingError: (a `ValueError`) for another reduction.
    """
    if reduction not in ("sum", "mean", "none"):
        raise SettingError(
            explain(
                f"reduction={reduction!r} is not known.",
                accepted=("sum", "mean", "none"),
                remedy="Pass 'mean'.",
            )
        )
    runtime = state.current_or_single()
    collectives = runtime.collectives
    alone = runtime.process.world_size == 1 or reduction == "none"
    if alone and scale == 1.0:
        return tensor
    if not alone:
        collectives.check("reduce", tensor)

    def leaf(item: torch.Tensor) -> torch.Tensor:
        if not alone:
            item = collectives.all_reduce(item.detach().clone().contiguous(), mean=reduction == "mean")
        return item if scale == 1.0 else item * scale

    return recursively_apply(leaf, tensor, error_on_other_type=True)


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Pad each tensor along one dimension to the longest of all ranks. Called on all ranks; collective.

    Args:
        tensor: Nested tensors that differ between ranks in the size of `dim` only. Tensors without that dimension,
            and other leaves, come back unchanged.
        dim: The dimension to pad.
        pad_index: The value to pad with.
        pad_first: Pad at the beginning.
    """
    runtime = state.current_or_single()
    if runtime.process.world_size == 1:
        return tensor
    padded = [
        leaf for leaf in tree_leaves(tensor) if isinstance(leaf, torch.Tensor) and -leaf.dim() <= dim < leaf.dim()
    ]
    if not padded:
        return tensor
    # One exchange for all tensors, however many there are.
    sizes = torch.tensor([leaf.shape[dim] for leaf in padded], device=padded[0].device)
    collectives = runtime.collectives
    collectives.check("pad_across_processes", sizes)
    longest = iter(collectives.all_gather(sizes).view(-1, len(padded)).amax(0).tolist())

    def leaf(item: torch.Tensor) -> torch.Tensor:
        if not -item.dim() <= dim < item.dim():
            return item
        size = next(longest)
        return item if size == item.shape[dim] else _pad(item, dim, size, pad_index, pad_first)

    return recursively_apply(leaf, tensor)


def _pad(item: torch.Tensor, dim: int, size: int, pad_index: int, pad_first: bool) -> torch.Tensor:
    shape = list(item.shape)
    shape[dim] = size
    padded = item.new_full(shape, pad_index)
    start = size - item.shape[dim] if pad_first else 0
    padded.narrow(dim, start, item.shape[dim]).copy_(item)
    return padded


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Repeat the last row of each tensor until its size along `dim` divides by `num_processes`.

    Args:
        tensor: Nested tensors with `batch_size` rows along `dim`.
        batch_size: Their number of rows.
        num_processes: What the size shall divide by.
        dim: The dimension of the rows.
    """
    missing = -batch_size % num_processes

    def leaf(item: torch.Tensor) -> torch.Tensor:
        if missing == 0:
            return item
        last = item.narrow(dim, item.shape[dim] - 1, 1)
        return torch.cat([item, *[last] * missing], dim=dim)

    return recursively_apply(leaf, tensor, error_on_other_type=True)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Join a list of nested tensors of the same structure along one dimension, leaf by leaf."""
    if not data:
        raise SettingError("concatenate got nothing to join.")
    if not any(isinstance(item, torch.Tensor) for item in tree_leaves(data[0])) and not isinstance(
        data[0], (tuple, list, Mapping)
    ):
        raise WrongTypeError(
            explain(
                f"concatenate got items of type {type(data[0]).__name__}.",
                accepted="tensors, and containers of them",
            )
        )

    def leaf(*items: Any) -> Any:
        return torch.cat(items, dim=dim) if isinstance(items[0], torch.Tensor) else items[0]

    return tree_zip_map(leaf, *data)


def slice_tensors(
    data: Any,
    tensor_slice: slice | list[int],
    process_index: int | None = None,
    num_processes: int | None = None,
) -> Any:
    """Take the same rows of all tensors; other leaves stay. The last two arguments serve custom slicers only."""
    return recursively_apply(lambda item: item[tensor_slice], data)


def find_batch_size(data: Any) -> int | None:
    """Return the size along dimension 0 of the first tensor in `data`; `None` if there is none.

    Raises:
        WrongTypeError: (a `TypeError`) if `data` is a leaf and not a tensor.
    """
    if isinstance(data, (tuple, list, Mapping)) and len(data) == 0:
        return None
    for leaf in tree_leaves(data):
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[0]
    if not isinstance(data, (tuple, list, Mapping)):
        raise WrongTypeError(
            explain(
                f"a batch of type {type(data).__name__} has no size.",
                accepted="nested tensors",
            )
        )
    return None


def ignorant_find_batch_size(data: Any) -> int | None:
    """Return `find_batch_size(data)`, or `None` where it has none."""
    try:
        return find_batch_size(data)
    except TypeError:
        return None


def find_device(data: Any) -> torch.device | None:
    """Return the device of the first tensor in `data`; `None` if there is none."""
    for leaf in tree_leaves(data):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return None


def listify(data: Any) -> Any:
    """Turn tensors in nested data into lists of numbers."""

    def leaf(item: torch.Tensor) -> Any:
        item = item.detach().cpu()
        # Lists of Python numbers know no bfloat16; float holds all its values.
        return (item.float() if item.dtype is torch.bfloat16 else item).tolist()

    return recursively_apply(leaf, data)


def convert_to_fp32(tensor: Any) -> Any:
    """Return nested data with half-precision tensors in float32."""
    if isinstance(tensor, torch.Tensor):
        return tensor.float() if tensor.dtype in _HALF else tensor
    return recursively_apply(torch.Tensor.float, tensor, test_type=_is_half)


_HALF = frozenset((torch.float16, torch.bfloat16))


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in _HALF


def wait_for_everyone() -> None:
    """Return once every rank has come. Called on all ranks; collective."""
    state.current_or_single().collectives.barrier()
