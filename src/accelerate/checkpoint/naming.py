"""Optimizer states under the names of parameters.

Owns the two directions: PyTorch numbers the parameters of an optimizer in the order in which it got them, and a
checkpoint keeps them by name, so that another order, or another number of processes, finds each state again. Pure:
dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..core.errors import CheckpointError, explain

Key = str | int
"""The name of a parameter; its number in the optimizer where no model is known to hold it."""


def parameter_names(models: Sequence[torch.nn.Module]) -> dict[int, str]:
    """Return the names of all parameters by `id()`: as in the model, and behind `model_1..` and so on for further ones.

    No part of a name is empty in torch, so two dots cannot be met in a name of the first model.
    """
    names: dict[int, str] = {}
    for index, model in enumerate(models):
        prefix = f"model_{index}.." if index else ""
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), prefix + name)
    return names


def keys_of(optimizer: Any, names: Mapping[int, str]) -> list[list[Key]] | None:
    """Return what the parameters of each group are called, or `None` for an optimizer that keeps its state otherwise."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        return None
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbered = iter([names.get(id(parameter), number) for number, parameter in enumerate(parameters)])
    return [[next(numbered) for _ in group["params"]] for group in groups]


def to_names(state: Any, keys: Sequence[Sequence[Key]] | None) -> Any:
    """Return an optimizer's `state_dict()` with names in place of numbers; one of another form is returned as it is.

    Raises:
        CheckpointError: If two parameters have the same name: one's state would be lost.
    """
    groups = _groups_of(state)
    if keys is None or groups is None or list(map(len, groups)) != list(map(len, keys)):
        return state
    renamed = dict(zip(chain(*groups), chain(*keys), strict=True))
    if twice := [key for key, count in Counter(renamed.values()).items() if count > 1]:
        raise CheckpointError(
            explain(
                f"The optimizer holds several parameters that are called {twice[0]!r}.",
                remedy="Give the modules other names.",
            )
        )
    return _renamed(state, renamed, [list(group) for group in keys], state["param_groups"])


def to_numbers(state: Any, keys: Sequence[Sequence[Key]] | None, source: str, *, groups_may_move: bool = True) -> Any:
    """Return a saved state with the numbers that an optimizer with these keys gives to the same names.

    Groups are found again by the parameters in them, so that each keeps its own options. Where no name is known on
    one of the two sides, numbers are compared, as PyTorch does.

    Args:
        state: As read from a checkpoint.
        keys: What the parameters of each group are called now.
        source: Where the state was read, for errors.
        groups_may_move: Whether groups may come in another order than was saved. A scheduler keeps what it knows of
            them by their place, and would give each the rate of another one.

    Raises:
        CheckpointError: If the optimizer holds other parameters than were saved, divides them otherwise, or orders the
            groups otherwise where they may not move.
    """
    saved = _groups_of(state)
    if keys is None or saved is None or not (_is_named(saved) and _is_named(keys)):
        return state if saved is None else _renamed(state, *_by_place(saved), state["param_groups"])
    _check_same(set(chain(*saved)), set(chain(*keys)), source)
    order = _match_groups(keys, saved, source)
    if order != sorted(order) and not groups_may_move:
        raise CheckpointError(
            explain(
                f"The groups of the optimizer are in another order than in {source}. Schedulers know groups by their "
                "place, and registered objects may.",
                remedy="Make the groups in the order of the save. The first parameters of each: "
                + ", ".join(str(group[0]) if group else "none" for group in saved[:20])
                + ".",
            )
        )
    numbers = {key: number for number, key in enumerate(chain(*keys))}
    groups: list[list[Key]] = [[numbers[key] for key in group] for group in keys]
    # The optimizer's own list of names is in its own order.
    options = [{**state["param_groups"][place]} for place in order]
    for group in options:
        group.pop("param_names", None)
    return _renamed(state, numbers, groups, options)


def _groups_of(state: Any) -> list[list[Key]] | None:
    """Return the keys of each group of a state of PyTorch's form, or `None`."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return None
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        return None
    return [group["params"] for group in groups]


def _is_named(groups: Sequence[Sequence[Key]]) -> bool:
    return any(isinstance(key, str) for key in chain(*groups))


def _by_place(groups: Sequence[Sequence[Key]]) -> tuple[dict[Key, Key], list[list[Key]]]:
    numbers: dict[Key, Key] = {key: number for number, key in enumerate(chain(*groups))}
    return numbers, [[numbers[key] for key in group] for group in groups]


def _renamed(state: Any, renamed: Mapping[Any, Key], keys: Sequence[Sequence[Key]], groups: Sequence[Any]) -> Any:
    return {
        **state,
        "state": {renamed.get(key, key): kept for key, kept in state["state"].items()},
        "param_groups": [{**group, "params": list(names)} for group, names in zip(groups, keys, strict=True)],
    }


def _check_same(saved: set[Key], now: set[Key], source: str) -> None:
    problems = [
        f"{what}: {', '.join(map(str, sorted(names, key=str)[:5]))}{' ...' if len(names) > 5 else ''}"
        for what, names in (("saved and not in it", saved - now), ("in it and not saved", now - saved))
        if names
    ]
    if problems:
        raise CheckpointError(
            explain(
                f"The optimizer holds other parameters than {source} ({'; '.join(problems)}).",
                remedy="Give it the parameters that it had when the checkpoint was saved.",
            )
        )


def _match_groups(keys: Sequence[Sequence[Key]], saved: Sequence[Sequence[Key]], source: str) -> list[int]:
    """Return for each group the place of the saved one with the same parameters."""
    left = {place: set(group) for place, group in enumerate(saved)}
    order = []
    for number, group in enumerate(keys):
        place = next((place for place, names in left.items() if names == set(group)), None)
        if place is None:
            raise CheckpointError(
                explain(
                    f"Group {number} of the optimizer (with {', '.join(map(str, group[:3]))}{', ...' * (len(group) > 3)}) "
                    f"is none of the groups in {source}: parameters are divided otherwise.",
                    remedy="Divide them into groups as when the checkpoint was saved.",
                )
            )
        order.append(place)
        del left[place]
    return order
