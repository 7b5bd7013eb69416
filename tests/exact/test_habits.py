"""Habits of scripts that a loop over one loader does not show: shared generators, limits, streams of every make."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, Dataset, IterableDataset, Sampler

from accelerate import Accelerator
from accelerate.core.errors import CheckpointError
from accelerate.utils import DataLoaderConfiguration, set_seed
from tests.support.ranks import run_on_ranks

EPOCHS = 3
EVERY = 3
"""Of how many checkpoints one is resumed from. `tests/exact/test_resume.py` resumes from all."""


class Script:
    """A run of a script on one rank: what it notes, and the checkpoints it saves or loads."""

    def __init__(self, folder: Path, resume: str | None, config: dict[str, Any]) -> None:
        self.accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**config))
        set_seed(1234 if resume is None else 987)
        self.folder, self.resume, self.log = folder, resume, []

    def prepare(self, *loaders: DataLoader[Any]) -> Any:
        """Prepare, and load the checkpoint if this run resumes."""
        prepared = self.accelerator.prepare(*loaders)
        if self.resume is not None:
            self.accelerator.load_state(self.folder / self.resume)
        return prepared

    def note(self, what: Any) -> None:
        self.log.append(what)

    def save(self) -> None:
        if self.resume is None:
            self.accelerator.save_state(self.folder / str(len(self.log)))


def run(body: Callable[[Script], None], folder: Path, resume: str | None, config: dict[str, Any]) -> list[Any] | str:
    script = Script(folder, resume, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create|use_seedable_sampler")
        try:
            body(script)
        except CheckpointError as error:
            return str(error)
    return script.log


def outcomes(
    body: Callable[[Script], None], folder: Path, ranks: int = 1, **config: Any
) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield, for each checkpoint of an uninterrupted run, what was to come on each rank, and what came."""
    whole = run_on_ranks(run, ranks, body, folder, None, config)
    names = sorted((path.name for path in folder.iterdir()), key=int)
    assert len(names) > 2
    for name in [*names[1::EVERY], names[-1]]:
        yield name, [log[int(name) :] for log in whole], run_on_ranks(run, ranks, body, folder, name, config)


def assert_exact(body: Callable[[Script], None], folder: Path, ranks: int = 1, **config: Any) -> None:
    for name, expected, came in outcomes(body, folder, ranks, **config):
        assert came == expected, f"resumed from {name}"


both = pytest.mark.parametrize("ranks", [1, 2])


# Generators ------------------------------------------------------------------------------------------------------


def shares_a_generator(script: Script) -> None:
    generator = torch.Generator().manual_seed(5)
    data = torch.arange(12)
    training, evaluation = script.prepare(
        DataLoader(data, batch_size=3, shuffle=True, generator=generator),
        DataLoader(data + 100, batch_size=4, shuffle=True, generator=generator),
    )
    for epoch in range(training.position.epoch, EPOCHS):
        for step, batch in enumerate(training, start=training.position.step):
            script.note((epoch, batch.tolist()))
            if step == 1:
                for other in evaluation:
                    script.note(other.tolist())
                script.save()


@both
def test_a_generator_that_evaluation_shares(ranks, tmp_path):
    assert_exact(shares_a_generator, tmp_path, ranks)


def leaves_epochs_early(script: Script) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = script.prepare(DataLoader(torch.arange(12), batch_size=2, shuffle=True, generator=generator))
    done = 0 if script.resume is None else int(script.resume)
    for epoch in range(done // 2, EPOCHS):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            script.note((epoch, batch.tolist()))
            if step == 1:
                break
        script.save()


@both
def test_epochs_that_are_left_early_are_not_repeated(ranks, tmp_path):
    assert_exact(leaves_epochs_early, tmp_path, ranks)


def evaluates_some_batches(script: Script) -> None:
    training, evaluation = script.prepare(
        DataLoader(torch.arange(12), batch_size=3), DataLoader(torch.arange(100, 112), batch_size=2)
    )
    for epoch in range(training.position.epoch, EPOCHS):
        for batch in training:
            script.note((epoch, batch.tolist()))
            for number, other in enumerate(evaluation):
                script.note(other.tolist())
                if number == 1:
                    break
            script.save()


@both
def test_an_evaluation_of_some_batches_always_begins_at_the_first(ranks, tmp_path):
    assert_exact(evaluates_some_batches, tmp_path, ranks)


class Augmented(Dataset[Any]):
    """Draws for the second half of its samples only, or from a generator of its own."""

    def __init__(self, own: bool = False) -> None:
        self.generator = np.random.default_rng(3) if own else None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, float]:
        if self.generator is not None:
            return index, self.generator.random()
        return index, torch.rand(()).item() if index >= 6 else 0.0


def reads_augmented(script: Script, own: bool = False) -> None:
    loader = script.prepare(DataLoader(Augmented(own), batch_size=2))
    for epoch in range(loader.position.epoch, EPOCHS):
        for indices, drawn in loader:
            script.note((epoch, indices.tolist(), drawn.tolist()))
            torch.rand(2)  # training draws too
            script.save()


@pytest.mark.parametrize("dispatched", [False, True])
@both
def test_samples_of_which_only_some_are_augmented(ranks, dispatched, tmp_path):
    assert_exact(reads_augmented, tmp_path, ranks, dispatch_batches=dispatched)


def test_ranks_draw_different_augmentation_though_the_first_batches_draw_none(tmp_path):
    logs = run_on_ranks(run, 2, reads_augmented, tmp_path, None, {})
    drawn = [[value for _, _, values in log for value in values if value] for log in logs]
    assert [len(values) for values in drawn] == [6, 12]
    assert not set(drawn[0]) & set(drawn[1])


def reads_its_own(script: Script) -> None:
    reads_augmented(script, own=True)


def test_a_generator_of_the_datasets_own(tmp_path):
    assert_exact(reads_its_own, tmp_path)


@pytest.mark.parametrize(("workers", "dispatched"), [(2, False), (0, True)])
def test_a_generator_of_the_datasets_own_that_cannot_be_saved_is_named(workers, dispatched, tmp_path):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatched))
    loader = accelerator.prepare(DataLoader(Augmented(own=True), batch_size=2, num_workers=workers))
    next(iter(loader))
    with pytest.warns(UserWarning, match="Augmented holds a random generator of its own"):
        accelerator.save_state(tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator.save_state(tmp_path / "two")  # said once


class Counting(Sampler[int]):
    """Another order in each pass, by a number that it keeps."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.passes)).tolist())


def test_going_back_in_one_process_resets_numbers_that_were_not_yet_changed(tmp_path):
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=4, sampler=Counting()))
    accelerator.save_state(tmp_path / "start")
    first = [batch.tolist() for batch in loader]
    accelerator.load_state(tmp_path / "start")
    assert [batch.tolist() for batch in loader] == first


def shuffles_by_torch_only(own: bool) -> list[Any]:
    torch.manual_seed(0)
    random.seed(None)
    np.random.seed(None)
    loader = Accelerator().prepare(DataLoader(Randomly() if own else torch.arange(12), sampler=None, batch_size=3))
    return [batch.tolist() for batch in loader]


class Randomly(IterableDataset[int]):
    """An order that is drawn from torch's global generator when the first sample is asked for."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(12).tolist()


def test_an_order_follows_from_the_generator_that_was_seeded_alone():
    assert shuffles_by_torch_only(own=True) == shuffles_by_torch_only(own=True)


# Streams ---------------------------------------------------------------------------------------------------------


class Shuffled(IterableDataset[int]):
    """Shuffles with a generator of its own, by the epoch it was told, or so that nobody can repeat it."""

    def __init__(self, kind: str, start: int = 0) -> None:
        self.kind, self.start, self.epoch = kind, start, 0
        self.generator = random.Random(4)  # noqa: S311

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.start, self.start + 12))
        if self.kind == "own":
            self.generator.shuffle(order)
        elif self.kind == "epoch":
            random.Random(self.epoch).shuffle(order)  # noqa: S311
        else:
            random.SystemRandom().shuffle(order)
        yield from order


class Wrapped(IterableDataset[int]):
    """Reads from another dataset."""

    def __init__(self, inner: IterableDataset[int]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)


def drawing_collate(samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw for each batch, as masking tokens does."""
    return torch.tensor(samples), torch.rand(len(samples)) + random.random()


STREAMS: dict[str, Callable[[], DataLoader[Any]]] = {
    "own": lambda: DataLoader(Shuffled("own"), batch_size=3),
    "own in workers": lambda: DataLoader(Shuffled("own"), batch_size=3, num_workers=1),
    "wrapped": lambda: DataLoader(Wrapped(Shuffled("own")), batch_size=3),
    "chained": lambda: DataLoader(ChainDataset([Shuffled("own"), Shuffled("own", 50)]), batch_size=3),
    "lasting workers": lambda: DataLoader(Shuffled("epoch"), batch_size=3, num_workers=1, persistent_workers=True),
    "drawing collate": lambda: DataLoader(Shuffled("epoch"), batch_size=3, collate_fn=drawing_collate),
}


def reads_a_stream(script: Script, kind: str) -> None:
    loader = script.prepare(STREAMS[kind]())
    for epoch in range(loader.position.epoch, EPOCHS):
        for batch in loader:
            whole = batch if isinstance(batch, torch.Tensor) else torch.cat([part.double() for part in batch])
            script.note((epoch, whole.tolist()))
            torch.rand(2)
            script.save()
    loader.base_dataloader._iterator = None  # forked ranks leave without finalising


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("ranks", "dispatched"), [(1, False), (2, False), (2, True)])
def test_streams_of_every_make(ranks, dispatched, kind, tmp_path):
    def body(script: Script) -> None:
        reads_a_stream(script, kind)

    assert_exact(body, tmp_path, ranks, dispatch_batches=dispatched)


@pytest.mark.parametrize(("ranks", "dispatched"), [(1, False), (2, False), (2, True)])
def test_a_stream_that_gives_other_samples_is_refused_on_all_ranks(ranks, dispatched, tmp_path):
    refused = 0
    for name, expected, came in outcomes(reads_an_unrepeatable_one, tmp_path, ranks, dispatch_batches=dispatched):
        if len(expected[0]) % (4 if ranks == 1 else 2):  # in the middle of an epoch
            assert all("Unrepeatable" in text and "Going on would repeat some samples" in text for text in came), name
            refused += 1
    assert refused


class Unrepeatable(Shuffled):
    """Its order cannot be drawn again."""


def reads_an_unrepeatable_one(script: Script) -> None:
    loader = script.prepare(DataLoader(Unrepeatable("system"), batch_size=3))
    try:
        for epoch in range(loader.position.epoch, EPOCHS):
            for batch in loader:
                script.note((epoch, batch.tolist()))
                script.save()
    except RuntimeError as error:  # rank 0's, where it reads for all
        raise CheckpointError(str(error)) from error


class Unequal(IterableDataset[int]):
    """Two workers, of which one has three times as much as the other."""

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        yield from range(36) if info.id == 0 else range(100, 112)


def continue_unequal(folder: Path, resume: str | None, steps: int | None, name: str) -> list[int]:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    loader = accelerator.prepare(DataLoader(Unequal(), batch_size=2, num_workers=2))
    if resume is not None:
        accelerator.load_state(folder / resume)
    seen: list[int] = []
    for number, batch in enumerate(loader, start=1):
        real = batch if loader.padding is None else batch[: loader.padding.real[loader.shard_index]]
        seen += real.tolist()
        if number == steps:
            accelerator.save_state(folder / name)
            break
    return seen


@pytest.mark.parametrize(
    "moves", [[(1, 3), (2, 1), (2, None)], [(2, 4), (1, None)], [(3, 1), (2, 2), (1, 3), (2, None)]]
)
def test_workers_with_unequal_parts_on_changing_numbers_of_ranks(moves, tmp_path):
    seen: list[int] = []
    for stage, (ranks, steps) in enumerate(moves):
        resume = None if stage == 0 else str(stage - 1)
        for part in run_on_ranks(continue_unequal, ranks, tmp_path, resume, steps, str(stage)):
            seen += part
    assert sorted(seen) == [*range(36), *range(100, 112)]


# Loading at the wrong time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatched", [False, True])
def test_a_loop_does_not_go_on_after_load_state_inside_it(dispatched, tmp_path):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatched))
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=2))
    with pytest.raises(CheckpointError, match="Break out of the loop after load_state"):
        for number, _ in enumerate(loader):
            if number == 0:
                accelerator.save_state(tmp_path / "one")
            else:
                accelerator.load_state(tmp_path / "one")
    assert [batch.tolist() for batch in loader] == [[2, 3], [4, 5], [6, 7]]


def test_a_place_that_a_look_at_one_batch_has_used_up_is_named(tmp_path):
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=2))
    next(iter(loader))
    accelerator.save_state(tmp_path / "one")
    accelerator.load_state(tmp_path / "one")
    assert next(iter(loader)).tolist() == [2, 3]
    with pytest.warns(UserWarning, match="left after one batch"):
        assert len(list(loader)) == 4


@pytest.mark.parametrize("strict", [True, False])
def test_an_evaluation_of_a_checkpoint_reads_all_of_its_data(strict, tmp_path):
    """The place of the training loader is not that of the only one that the evaluation prepares."""
    accelerator = Accelerator()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    training, evaluation = (DataLoader(torch.arange(12), batch_size=2) for _ in range(2))
    training, *_ = accelerator.prepare(training, evaluation, model, optimizer)
    next(iter(training))
    accelerator.save_state(tmp_path / "one")
    accelerator.free_memory()

    model, loader = accelerator.prepare(torch.nn.Linear(1, 1), DataLoader(torch.arange(12), batch_size=2))
    with pytest.warns(UserWarning, match="its loaders begin at their start"):
        accelerator.load_state(tmp_path / "one", strict=strict)
    assert len(list(loader)) == 6


@pytest.mark.parametrize("strict", [True, False])
def test_a_run_that_never_prepared_an_optimizer_continues(strict, tmp_path):
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(torch.arange(12), batch_size=2))
    next(iter(loader))
    accelerator.save_state(tmp_path / "one")
    accelerator.free_memory()

    loader = accelerator.prepare(DataLoader(torch.arange(12), batch_size=2))
    accelerator.load_state(tmp_path / "one", strict=strict)
    assert torch.cat(list(loader)).tolist() == list(range(2, 12))


def test_a_loader_that_cannot_continue_begins_anew_where_that_is_asked_for(tmp_path):
    accelerator = Accelerator()
    model = torch.nn.Linear(1, 1)
    loader, model, optimizer = accelerator.prepare(
        DataLoader(torch.arange(12), batch_size=2), model, torch.optim.SGD(model.parameters())
    )
    next(iter(loader))
    accelerator.save_state(tmp_path / "one")
    accelerator.free_memory()

    model = torch.nn.Linear(1, 1)
    other, model, optimizer = accelerator.prepare(
        DataLoader(torch.arange(8), batch_size=2), model, torch.optim.SGD(model.parameters())
    )
    with pytest.raises(CheckpointError, match="has 8 samples to read, and had 12"):
        accelerator.load_state(tmp_path / "one")
    with pytest.warns(UserWarning, match="Loader 0 starts anew"):
        accelerator.load_state(tmp_path / "one", strict=False)
    assert len(list(other)) == 4


def test_loaders_that_are_prepared_too_late_are_named(tmp_path):
    accelerator = Accelerator()
    accelerator.prepare(DataLoader(torch.arange(8)))
    accelerator.save_state(tmp_path / "one")
    accelerator.free_memory()
    with pytest.warns(UserWarning, match="loaders: 1, prepared here: 0"):
        accelerator.load_state(tmp_path / "one")
