"""Walk nested containers.

Owns the rules for lists, tuples, namedtuples and mappings; knows nothing about what the leaves are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def is_namedtuple(data: object) -> bool:
    """Tell whether `data` is an instance of a namedtuple class."""
    return isinstance(data, tuple) and hasattr(data, "_asdict") and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Any) -> Any:
    """Make an object of the type of `obj` (list, tuple or namedtuple) from the items of `generator`."""
    if is_namedtuple(obj):
        return type(obj)(*list(generator))
    return type(obj)(generator)


def tree_map(leaf: Callable[[Any], Any], data: Any) -> Any:
    """Apply `leaf` to everything in `data` that is not a list, a tuple or a mapping.

    Containers keep their type; nothing is changed in place.
    """
    if isinstance(data, (list, tuple)):
        return honor_type(data, (tree_map(leaf, item) for item in data))
    if isinstance(data, Mapping):
        return rebuild_mapping(data, {key: tree_map(leaf, value) for key, value in data.items()})
    return leaf(data)


def rebuild_mapping(original: Any, items: dict[Any, Any]) -> Any:
    """Make a mapping of the type of `original` from `items`."""
    return make_mapping(type(original), default_factory(original), items)


def default_factory(mapping: Any) -> Any:
    """Return what fills missing places of a `defaultdict`; `None` for other mappings."""
    return mapping.default_factory if isinstance(mapping, defaultdict) else None


def make_mapping(kind: type, factory: Any, items: dict[Any, Any]) -> Any:
    """Make a mapping of type `kind` from `items`, where no original is at hand."""
    if kind is dict:
        return items
    if issubclass(kind, defaultdict):
        return kind(factory, items)
    return kind(items)


def tree_leaves(data: Any) -> Iterator[Any]:
    """Yield the leaves of `data` in the order in which `tree_map` visits them."""
    if isinstance(data, (list, tuple)):
        for item in data:
            yield from tree_leaves(item)
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tree_leaves(value)
    else:
        yield data


def tree_zip_map(leaf: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply `leaf` to the leaves that stand at the same place in containers of the same shape."""
    if isinstance(first, (list, tuple)):
        return honor_type(
            first,
            (tree_zip_map(leaf, *items) for items in zip(first, *others, strict=True)),
        )
    if isinstance(first, Mapping):
        return rebuild_mapping(
            first,
            {key: tree_zip_map(leaf, first[key], *(o[key] for o in others)) for key in first},
        )
    return leaf(first, *others)
