"""How one read of the dispatcher is cut, and what of it is padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelerate.core.errors import SettingError
from accelerate.data.cutting import Cutter, Shares, count_rows
from accelerate.data.shards import Padding


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def cut(
    cutter: Cutter, *batches: Any, opening: list[Any] | None = None
) -> tuple[list[Any], Padding | None, int] | None:
    cutter.remember_opening(list(opening if opening is not None else batches))
    found = cutter.cut(list(batches))
    if found is None:
        return None
    pieces = [piece.tolist() if isinstance(piece, torch.Tensor) else piece for piece in found.pieces]
    return pieces, found.shares.padding(found.observed), found.observed


def cutter(count: int = 2, **options: Any) -> Cutter:
    return Cutter(**{"count": count, "split": False, "drop_last": False, "slice_fn": None} | options)


@pytest.mark.parametrize(
    ("shares", "observed", "expected"),
    [
        (Shares((3, 3), 6), 6, None),
        (Shares((3, 3), 6), 5, Padding((3, 3), (3, 2))),
        (Shares((3, 3), 6), 1, Padding((3, 3), (1, 0))),
        (Shares((2, 2, 2), 6), 3, Padding((2, 2, 2), (2, 1, 0))),
        (Shares((2, 2), 4), 5, None),  # one row was dropped
        (Shares((3, 1), 4), 4, Padding((3, 1), (3, 1))),
        (Shares((3, 1), 4), 3, Padding((3, 1), (3, 0))),
        # Own slicing: no rows at all, or the same rows for each shard.
        (Shares((-1, -1), 4), 4, None),
        (Shares((-1, -1), 4), 3, Padding((-1, -1), (-1, -1))),
        (Shares((4, 4), 4), 4, None),
        (Shares((4, 4), 4), 3, Padding((4, 4), (-1, -1))),
    ],
)
def test_what_is_padding_follows_from_the_rows_that_were_read(shares, observed, expected):
    assert shares.padding(observed) == expected


def test_full_steps_are_handed_out_as_they_were_read():
    first, second = numbers(0, 1), numbers(2, 3)
    found = cutter().cut([first, second])
    assert found is not None
    assert [piece is batch for piece, batch in zip(found.pieces, (first, second), strict=True)] == [True, True]
    assert found.shares.padding(found.observed) is None


def test_short_steps_are_topped_up_from_the_opening():
    opening = [numbers(0, 1), numbers(2, 3)]
    assert cut(cutter(), numbers(4), opening=opening) == ([[4], [0]], Padding((1, 1), (1, 0)), 1)
    assert cut(cutter(), numbers(4, 5), numbers(6), opening=opening) == (
        [[4, 5], [6, 0]],
        Padding((2, 2), (2, 1)),
        3,
    )
    assert cut(cutter(4), numbers(4), opening=opening) == (
        [[4], [0], [1], [2]],
        Padding((1,) * 4, (1, 0, 0, 0)),
        1,
    )
    assert cut(cutter(split=True), numbers(4, 5, 6), opening=[numbers(0, 1, 2, 3)]) == (
        [[4, 5], [6, 0]],
        Padding((2, 2), (2, 1)),
        3,
    )


def test_topping_up_takes_rows_of_as_many_batches_as_it_needs():
    four = cutter(4)
    four.remember_opening([torch.empty(0, dtype=torch.int64)])  # has nothing to keep
    four.remember_opening([numbers(0), numbers(1), numbers(2), numbers(3)])
    assert cut(four, numbers(4), opening=[numbers(9)]) == ([[4], [0], [1], [2]], Padding((1,) * 4, (1, 0, 0, 0)), 1)
    assert cut(cutter(4), numbers(0)) == ([[0]] * 4, Padding((1,) * 4, (1, 0, 0, 0)), 1)


def test_dropping_rows_pads_nothing():
    dropping = {"drop_last": True}
    assert cut(cutter(split=True, **dropping), numbers(0, 1, 2)) == ([[0], [1]], None, 3)
    assert cut(cutter(split=True, **dropping), numbers(0)) is None
    # One batch for each shard, of any size: nothing has to be dropped.
    assert cut(cutter(**dropping), numbers(0), numbers(1, 2)) == ([[0], [1, 2]], Padding((1, 2), (1, 2)), 3)


def rows(size: int, width: int, value: int = 0) -> torch.Tensor:
    return torch.full((size, width), value)


def shapes(found: Any) -> list[tuple[int, ...]]:
    return [tuple(piece.shape) for piece in found.pieces]


def test_batches_that_cannot_be_joined_are_handed_out_whole():
    found = cutter().cut([rows(3, 2), rows(1, 5)])
    assert found is not None
    assert shapes(found) == [(3, 2), (1, 5)]
    assert found.shares.padding(found.observed) == Padding((3, 1), (3, 1))
    # Where there are too few, a copy of the first completes them.
    found = cutter(3).cut([rows(3, 2, 7), rows(1, 5, 8)])
    assert found is not None
    assert shapes(found) == [(3, 2), (1, 5), (3, 2)]
    assert found.shares.padding(found.observed) == Padding((3, 1, 3), (3, 1, 0))
    assert found.pieces[2].unique().tolist() == [7]
    # Batches of other structure cannot be joined either.
    one, two = {"x": rows(2, 1)}, {"x": rows(1, 1), "y": rows(1, 1)}
    found = cutter().cut([one, two])
    assert found is not None
    assert found.pieces == [one, two]
    found = cutter().cut([[rows(2, 1), rows(2, 1)], [rows(1, 1)]])
    assert found is not None
    assert [count_rows(piece) for piece in found.pieces] == [2, 1]
    found = cutter().cut([{"x": rows(2, 1), "y": rows(2, 1)}, {"x": rows(1, 1), "y": torch.tensor(1)}])
    assert found is not None
    assert found.shares.rows == (2, 1)


def test_batches_without_rows_are_nobodys_share():
    found = cutter().cut([rows(0, 2), rows(3, 5, 1)])
    assert found is not None
    assert shapes(found) == [(3, 5), (3, 5)]
    assert found.shares.padding(found.observed) == Padding((3, 3), (3, 0))
    assert cutter().cut([rows(0, 2), rows(0, 5)]) is None
    assert cutter(drop_last=True).cut([rows(0, 2), rows(3, 5)]) is None


def test_a_batch_of_another_width_than_the_opening_is_topped_up_with_its_own_rows():
    for split, batches in ((True, [torch.tensor([[1, 1], [2, 2], [3, 3]])]), (False, [rows(1, 2, 1), rows(2, 2, 2)])):
        pair = cutter(split=split)
        pair.remember_opening([rows(4, 1)])
        found = pair.cut(batches)
        assert found is not None
        assert shapes(found) == [(2, 2), (2, 2)]
        assert found.shares.padding(found.observed) == Padding((2, 2), (2, 1))
        assert found.pieces[1][1].tolist() == [1, 1]


def by_rows(batch: Any, mine: slice, process_index: int, num_processes: int) -> Any:
    return batch[mine]


def by_columns(batch: Any, mine: slice, process_index: int, num_processes: int) -> Any:
    return batch[:, process_index : process_index + 1]


def test_own_slicing_is_understood_where_it_gives_rows():
    def padding(slice_fn: Any, batch: Any) -> Any:
        own = cutter(split=True, slice_fn=slice_fn)
        own.remember_opening([rows(4, 2)])
        found = own.cut([batch])
        assert found is not None
        return found.shares.padding(found.observed)

    assert padding(by_rows, rows(4, 2)) is None
    assert padding(by_rows, rows(3, 2)) == Padding((2, 2), (2, 1))
    assert padding(by_columns, rows(4, 2)) is None
    assert padding(by_columns, rows(3, 2)) == Padding((4, 4), (-1, -1))
    assert padding(lambda batch, mine, **_: "text", rows(3, 2)) == Padding((-1, -1), (-1, -1))


def test_own_slicing_needs_batches_that_can_be_joined():
    with pytest.raises(SettingError, match=r"slice_fn_for_dispatch.*\(3, 2\), \(1, 5\).*\n.*\n.*drop_last=True"):
        cutter(slice_fn=by_rows).cut([rows(3, 2), rows(1, 5)])


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(SettingError, match="type str .* has no tensor with rows"):
        cutter().cut(["text", "text"])
