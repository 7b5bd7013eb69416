"""The observed tables of sharded data, and where this library differs from them on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

TABLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "dataloader_tables.json").read_text()
)


class Counting(IterableDataset):
    """0, 1, 2, ... without a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class SizedCounting(Counting):
    """0, 1, 2, ... with a length."""

    def __len__(self) -> int:
        return self.size


def parse_cell(key: str) -> dict[str, Any]:
    """Read a key such as `"n=1,bs=3,P=2,split=0"` or `"map n=10 bs=4 dispatch=None"`."""
    kind, *rest = key.replace(",", " ").split()
    words: dict[str, Any] = {"kind": kind} if "=" not in kind else {}
    for word in rest if words else [kind, *rest]:
        name, value = word.split("=")
        words[name] = {"None": None, "True": True, "False": False}[value] if value[0].isalpha() else int(value)
    return words


@dataclass(frozen=True)
class Difference:
    """A cell that is another one here, with the reason."""

    table: str
    """Beginning of the table's name."""

    reason: str
    applies: Callable[[dict[str, Any], Any], bool]
    change: Callable[[dict[str, Any], Any], None]


def _true_lengths(cell: dict[str, Any], observed: Any) -> None:
    observed["len"] = [len(batches) for batches in observed["batches"]]


def _dispatched_batch_size(cell: dict[str, Any], observed: Any) -> None:
    observed["total_batch_size"] = cell["bs"] * (1 if cell["split"] else cell["P"])


def _no_batches(cell: dict[str, Any], observed: Any) -> None:
    observed.clear()
    sized = cell["kind"] != "iter"
    observed.update(
        type="DataLoaderDispatcher",
        len=0 if sized else "TypeError",
        total_dataset_length=cell["n"] if sized else "TypeError",
        total_batch_size="AttributeError",  # corrected by the next row
        after_loop=[False, -1],
        rank_batches=[[] for _ in range(cell["P"])],
        end_flags=[],
        remainder=[],
    )


def _true_share(cell: dict[str, Any], observed: Any) -> None:
    share = cell["bs"] // cell["P"]
    rounds = cell["n"] // cell["bs"] if cell["drop_last"] else -(-cell["n"] // cell["bs"])
    observed["total_dataset_length"] = rounds * share
    observed["len"] = rounds


DIFFERENCES = (
    Difference(
        "BatchSamplerShard",
        "len() of split batches without topping up counted a batch that this rank never yields",
        lambda cell, observed: bool(cell["split"] and not cell["even"] and not cell["drop_last"]),
        _true_lengths,
    ),
    Difference(
        "prepared",
        "a dispatcher without any batch raised TypeError on several ranks",
        lambda cell, observed: "error" in observed,
        _no_batches,
    ),
    Difference(
        "prepared",
        "total_batch_size of a dispatcher raised AttributeError",
        lambda cell, observed: observed["type"] == "DataLoaderDispatcher",
        _dispatched_batch_size,
    ),
    Difference(
        "prepared",
        "len() of a split iterable dataset with a length did not agree with the batches it yields, so torch warned",
        lambda cell, observed: (
            cell["kind"] == "iterlen" and bool(cell["split"]) and observed["type"] == "DataLoaderShard"
        ),
        _true_share,
    ),
)


def expected_cell(table: str, key: str, **more: Any) -> tuple[dict[str, Any], Any]:
    """Return the settings of a cell, and what is expected of it here."""
    cell, expected = parse_cell(key) | more, copy.deepcopy(TABLES[table][key])
    for difference in DIFFERENCES:
        if table.startswith(difference.table) and difference.applies(cell, expected):
            difference.change(cell, expected)
    return cell, expected
