"""From where a pass over a stream is read on, and what is noted of its batches: without processes."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from accelerate.data.trail import Left, Trail, Way, another_batch, find_way, glimpse, same


@pytest.mark.parametrize(
    ("left", "per_batch", "per_step", "workers", "reads_alone", "counts", "way"),
    [
        # In this process: past samples, and the last batch again where it can be compared.
        (Left(40, 4, 4, 0, is_comparable=True), 4, 4, 0, False, False, Way(36, 1, 36)),
        (Left(40, 4, 4, 0), 4, 4, 0, False, False, Way(40, 0, 40)),
        (Left(40, 8, 8, 0), 4, 4, 0, False, False, Way(40, 0, 40)),  # on another number of ranks
        (Left(40, 4, 4, 0), 8, 8, 0, False, False, Way(40, 0, 40)),
        (Left(40, 8, 4, 0, is_comparable=True), 4, 16, 0, True, False, Way(36, 1, 36)),  # rank 0 reads them for all
        (Left(40, 8, 8, 0), 4, 8, 0, True, True, Way(40, 0, 40)),  # in batches of another size
        (Left(0, 4, 4, 0, is_comparable=True), 4, 4, 0, False, False, Way(0, 0, 0)),
        (Left(40, 4, 4, 0), 4, 4, 0, False, True, Way(0, 10)),
        (Left(40, 8, 8, 0), 4, 4, 0, False, True, Way(40, 0, 40)),
        # In worker processes: past batches, since workers take turns.
        (Left(40, 4, 4, 2), 4, 4, 2, False, False, Way(0, 10)),
        (Left(40, 8, 4, 2), 4, 16, 2, True, False, Way(0, 10)),
        (Left(40, 8, 8, 2, by_worker=[16, 24]), 4, 8, 2, True, False, Way([16, 24], 0, 40)),
        (Left(40, 8, 8, 2, by_worker=[16, 24]), 4, 4, 2, False, False, Way([16, 24], 0, 40)),
        (Left(40, 4, 4, 2, starts=[16, 8], started=24, by_worker=[24, 16]), 4, 4, 2, False, False, Way([16, 8], 4, 24)),
        (
            Left(40, 4, 4, 2, starts=[16, 8], started=24, by_worker=[24, 16]),
            8,
            8,
            2,
            False,
            False,
            Way([24, 16], 0, 40),
        ),
        # What cannot be told.
        (Left(40, 8, 8, 2), 4, 4, 2, False, False, None),
        (Left(40, 8, 8, 2), 4, 8, 2, True, False, None),
        (Left(40, 4, 4, 2), 4, 4, 3, False, False, None),
        (Left(40, 4, 4, 0), 4, 4, 2, False, False, None),
    ],
)
def test_the_way_to_a_place(left, per_batch, per_step, workers, reads_alone, counts, way):
    assert find_way(left, per_batch, per_step, workers, reads_alone=reads_alone, counts=counts) == way


def test_a_trail_counts_what_each_worker_gave_up_to_the_loop():
    trail = Trail(0, 2, 4)
    for worker in (0, 1, 0, 0):  # the second is exhausted
        trail.note(torch.zeros(2), worker, 4)
    assert trail.by_worker(4) == [12, 4]
    assert trail.by_worker(2) == [4, 4]  # two were read ahead
    assert trail.by_worker(5) is None
    trail.begin()
    trail.note(torch.zeros(2), 1, 3)
    assert trail.by_worker(1) == [12, 7]


def test_a_trail_goes_on_from_what_workers_had_read():
    assert Trail([8, 4], 2, 4).by_worker(0) == [8, 4]
    assert Trail(None, 2, 4).by_worker(0) is None
    assert Trail(0, 0, 4).by_worker(0) is None
    unknown = Trail(0, 2, 4)
    unknown.note(torch.zeros(2), None, 4)
    assert unknown.by_worker(1) is None


def test_a_trail_tells_what_was_seen_some_batches_back():
    trail = Trail(0, 0, 1)
    for number in range(400):
        trail.note(number, None, 1)
    assert (trail.seen(400), trail.seen(399), trail.seen(300)) == (["399"], ["398"], ["299"])
    assert trail.seen(401) is None
    assert trail.seen(100) is None


BATCHES = [
    torch.arange(6).view(2, 3),
    torch.arange(6).view(3, 2),
    torch.arange(1, 7).view(2, 3),
    torch.arange(6.0).view(2, 3),
    torch.arange(4000),
    torch.arange(4000).flip(0),
    [torch.zeros(2), torch.ones(2)],
    {"x": torch.zeros(2), "y": ["a", "b"]},
    {"x": torch.zeros(2), "y": ["a", "c"]},
    np.arange(3),
    np.arange(4),
    torch.zeros(0),
    "text",
    b"bytes",
    3,
    3.5,
    object(),
    None,
]


def test_glimpses_tell_batches_apart():
    for one, batch in enumerate(BATCHES):
        for other, another in enumerate(BATCHES):
            assert same(glimpse(batch), glimpse(another)) == (one == other), (batch, another)


class Dispatching(torch.Tensor):
    """A tensor that does not show its values."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(str(func))


def strange_batches() -> dict[str, Any]:
    """Batches whose values cannot be looked at, or hold places in memory, made anew."""
    rows = [torch.arange(2.0), torch.arange(3.0)]
    objects = np.array([object(), "a", 1, [2]], dtype=object)
    fields = np.array([(object(), 1)], dtype=[("one", object), ("two", int)])
    itself = np.empty(1, dtype=object)
    itself[0] = itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some that they are prototypes, and of others that they are old
        return {
            "nested": torch.nested.nested_tensor(rows),
            "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
            "quantized": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            "sparse": torch.eye(2).to_sparse(),
            "meta": torch.empty(2, device="meta"),
            "bits": torch.empty(2, dtype=torch.bits8),
            "half bytes": torch.empty(2, dtype=torch.uint4),
            "subclass": torch.Tensor._make_subclass(Dispatching, torch.ones(2)),
            "objects": objects,
            "fields": fields,
            "itself": itself,
        }


@pytest.mark.parametrize("name", list(strange_batches()))
def test_a_glimpse_of_what_cannot_be_looked_at_raises_nothing_and_is_the_same_again(name):
    first, second = strange_batches(), strange_batches()  # both live, so what they hold is at other places
    taken = glimpse(first[name])
    assert same(taken, glimpse(second[name]))
    assert same(taken, json.loads(json.dumps(taken)))  # a checkpoint can hold it


def test_plain_values_in_arrays_of_objects_tell_batches_apart():
    one, other = (np.array([object(), name], dtype=object) for name in "ab")
    assert not same(glimpse(one), glimpse(other))


def test_a_glimpse_is_taken_before_the_batch_changes_and_needs_no_gradient():
    batch = torch.ones(3, requires_grad=True)
    taken = glimpse(batch)
    with torch.no_grad():
        batch.mul_(2)
    assert not same(taken, glimpse(batch))


def test_numbers_may_differ_as_they_do_between_machines_but_not_more():
    one, near, far = (
        torch.tensor([0.5, float("nan")]),
        torch.tensor([0.5 + 1e-5, float("nan")]),
        torch.tensor([0.6, 0.0]),
    )
    assert same(glimpse(one), glimpse(near))
    assert not same(glimpse(one), glimpse(far))
    assert not same(glimpse(torch.tensor([1000])), glimpse(torch.tensor([1001])))


def test_another_batch_is_explained():
    assert another_batch(None, torch.ones(2), [], 4) is None
    assert another_batch(glimpse(torch.ones(2)), torch.ones(2), [], 4) is None
    text = another_batch(glimpse(torch.ones(2)), torch.zeros(2), [], 4)
    assert text is not None
    assert "list does not give the samples again" in text
    assert "call set_epoch() on the loader" in text
