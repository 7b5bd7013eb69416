"""What cannot be resumed exactly is refused on every rank. Nothing goes on with other samples without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accelerate.core.errors import CheckpointError
from accelerate.data.protocol import DispatchError
from tests.exact import training
from tests.exact.cells import Cell
from tests.exact.training import EPOCHS, Step
from tests.support.ranks import run_on_ranks


def outcome(cell: Cell, folder: Path, name: str, in_epoch: int) -> list[Step] | str:
    """Return what a resumed run saw, or why it was refused."""
    try:
        return training.resumed(cell, folder, name, in_epoch, trains=False).steps
    except CheckpointError as error:
        return f"refused: {error}"
    except DispatchError as error:  # what rank 0 met while it read for all
        assert "CheckpointError" in str(error)
        return f"refused: {error}"


def outcomes(saved: Cell, loaded: Cell, folder: Path) -> dict[str, list[Any]]:
    """Return for checkpoints of one cell, up to the second epoch, what happens when another one resumes from them."""
    whole = run_on_ranks(training.uninterrupted, saved.ranks, saved, folder, False)
    in_epoch = training.steps_of_first_epoch(whole[0])
    names = [name for name in training.names(folder) if training.steps_in(name) <= in_epoch + 1]
    found = {name: run_on_ranks(outcome, loaded.ranks, loaded, folder, name, in_epoch) for name in names}
    return {"whole": whole, **found}


def inside_an_epoch(name: str, in_epoch: int) -> bool:
    return bool(training.steps_in(name) % in_epoch)


def refused(results: list[Any]) -> bool:
    """Tell whether all ranks refused, which they have to do together."""
    said = [isinstance(result, str) for result in results]
    assert all(said) or not any(said), results
    return all(said)


PLAIN = Cell("map", "plain")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (PLAIN, replace(PLAIN, size=15)),
        (PLAIN, replace(PLAIN, size=13)),
        (replace(PLAIN, ranks=2), replace(PLAIN, ranks=2, size=17)),
        (replace(PLAIN, order="seedable"), replace(PLAIN, order="seedable", size=15)),
        (replace(PLAIN, order="buckets"), replace(PLAIN, order="buckets", size=16)),
        (replace(PLAIN, reads="dispatched-map", ranks=2), replace(PLAIN, reads="dispatched-map", ranks=2, size=17)),
    ],
    ids=["longer", "shorter", "two-ranks", "seedable", "buckets", "dispatched"],
)
def test_a_dataset_of_another_length_is_refused_inside_an_epoch(saved, loaded, tmp_path):
    found = outcomes(saved, loaded, tmp_path)
    in_epoch = training.steps_of_first_epoch(found.pop("whole")[0])
    inside = {name: refused(results) for name, results in found.items() if inside_an_epoch(name, in_epoch)}
    assert inside
    assert all(inside.values()), inside


@pytest.mark.parametrize("keeps_state", [False, True])
def test_a_stream_that_ends_before_the_place_is_refused(keeps_state, tmp_path):
    saved = Cell("dispatched-iterable", "epoch-buffer", keeps_state=keeps_state)
    found = outcomes(saved, replace(saved, size=6, keeps_state=False), tmp_path)
    assert refused(found["3"])
    assert refused(found["4"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_order_that_cannot_be_drawn_again_is_refused_inside_an_epoch(ranks, tmp_path):
    if ranks == 2:  # only rank 0 draws, as ranks that draw by themselves would not agree in the first place
        cell = Cell("dispatched-map", "unrepeatable", ranks=2)
    else:
        cell = Cell("map", "unrepeatable")
    found = outcomes(cell, cell, tmp_path)
    whole = found.pop("whole")
    in_epoch = training.steps_of_first_epoch(whole[0])
    for name, results in found.items():
        assert refused(results) is inside_an_epoch(name, in_epoch), name
        if not refused(results):
            epochs_left = EPOCHS - training.steps_in(name) // in_epoch
            assert len(results[0]) == epochs_left * in_epoch


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (replace(PLAIN, order="hidden"), replace(PLAIN, order="hidden")),
        (PLAIN, replace(PLAIN, order="in-order")),
        (PLAIN, replace(PLAIN, order="numpy")),
        (PLAIN, replace(PLAIN, batch_size=2)),
        (replace(PLAIN, order="buckets"), PLAIN),
    ],
    ids=["hidden-generator", "not-shuffled", "another-sampler", "another-batch-size", "no-batch-sampler"],
)
def test_another_loader_never_goes_on_with_other_samples(saved, loaded, tmp_path):
    found = outcomes(saved, loaded, tmp_path)
    whole = found.pop("whole")
    in_epoch = training.steps_of_first_epoch(whole[0])
    inside = [name for name in found if inside_an_epoch(name, in_epoch)]
    for name in inside:
        if not refused(found[name]):
            epoch = training.steps_in(name) // in_epoch
            expected = [step.indices for step in whole[0].steps[training.steps_in(name) :] if step.epoch == epoch]
            got = [step.indices for step in found[name][0] if step.epoch == epoch]
            assert sum(got, ()) == sum(expected, ()), name
