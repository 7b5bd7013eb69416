"""Prepared loaders on one process: flags, epochs, attributes, skipping, saving a place."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accelerate.core import available
from accelerate.core.errors import MissingPackage, SettingError, UnsupportedCombination
from accelerate.data.dispatcher import DataLoaderDispatcher
from accelerate.data.loader import DataLoaderAdapter, DataLoaderShard, placement
from accelerate.data.prepare import get_sampler, prepare_data_loader
from accelerate.data.resume import SkipDataLoader, skip_first_batches
from accelerate.data.samplers import SeedableRandomSampler, SkipBatchSampler
from accelerate.data.stateful import make_stateful_loader
from accelerate.runtime.accumulation import GradientState
from tests.support.data_tables import Counting, SizedCounting


def prepare(loader, **options):
    return prepare_data_loader(loader, **{"device": "cpu", "put_on_device": True, "rng_types": ["generator"]} | options)


def numbers(loader):
    return [batch.tolist() for batch in loader]


def watched(loader):
    state = GradientState()
    return [(state.end_of_dataloader, state.remainder) for _ in loader]


def test_one_process_reads_what_the_plain_loader_reads():
    for make in (
        lambda: DataLoader(range(10), batch_size=3, shuffle=True),
        lambda: DataLoader(range(10), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(2)),
        lambda: DataLoader(range(10), batch_size=4, drop_last=True),
        lambda: DataLoader(Counting(10), batch_size=4),
        lambda: DataLoader(range(3), batch_size=None),
        lambda: DataLoader(torch.arange(6), batch_size=None, sampler=BatchSampler(range(6), 4, False)),
    ):
        torch.manual_seed(0)
        plain = make()
        expected = [list(map(torch.as_tensor, plain)) for _ in range(2)]
        torch.manual_seed(0)
        loader = prepare(make())
        got = [list(map(torch.as_tensor, loader)) for _ in range(2)]
        assert str(got) == str(expected)


def test_flags_are_true_on_the_last_batch_only():
    state = GradientState()
    loader = prepare(DataLoader(range(10), batch_size=4))
    assert watched(loader) == watched(loader) == [(False, 2), (False, 2), (True, 2)]
    assert (state.end_of_dataloader, state.remainder, state.in_dataloader) == (False, -1, False)
    assert watched(prepare(DataLoader(range(10), batch_size=4, drop_last=True))) == [(False, -1), (True, -1)]
    assert watched(prepare(DataLoader(range(8), batch_size=4))) == [(False, 0), (True, 0)]
    assert watched(prepare(DataLoader(Counting(6), batch_size=4), dispatch_batches=False)) == [(False, -1), (True, -1)]
    assert watched(prepare(DataLoader(Counting(6), batch_size=4))) == [(False, -1), (True, 2)]
    assert watched(skip_first_batches(loader, 2)) == [(True, 2)]


def test_remainder_counts_what_the_sampler_draws():
    loader = prepare(DataLoader(range(100), batch_size=4, sampler=SubsetRandomSampler(range(5))))
    assert watched(loader) == [(False, 1), (True, 1)]


def test_nested_loaders_and_breaking_out():
    state = GradientState()
    outer, inner = prepare(DataLoader(range(2))), prepare(DataLoader(range(1)))
    seen = []
    for _ in outer:
        seen.append(state.end_of_dataloader)
        for _ in inner:
            seen.append(state.end_of_dataloader)
        seen.append(state.end_of_dataloader)
    assert seen == [False, True, False, True, True, True]
    for _ in range(3):
        for _ in outer:
            break
        gc.collect()
        assert state.in_dataloader
    assert len(state.dataloader_references) == 2  # each pass that is broken off is forgotten when the next begins
    assert numbers(outer) == [[0], [1]]
    assert not state.in_dataloader


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_loop_that_ends_without_asking_for_more_has_ended_the_pass(dispatch):
    first, second = (prepare(DataLoader(range(4), batch_size=2), dispatch_batches=dispatch) for _ in range(2))
    for epoch in range(2):
        assert len(list(zip(first, second, strict=False))) == 2
        assert (first.position.epoch, second.position.epoch) == (epoch + 1, epoch + 1)


def test_an_error_while_reading_ends_the_pass():
    def refuse(samples):
        raise OSError("unreadable")

    loader = prepare(DataLoader(range(3), collate_fn=refuse))
    with pytest.raises(OSError, match="unreadable"):
        list(loader)
    assert not GradientState().in_dataloader


@pytest.mark.parametrize("dataset", [SizedCounting(0), Counting(0), []], ids=["sized", "unsized", "map"])
@pytest.mark.parametrize("dispatch", [False, True])
def test_loaders_without_batches_yield_nothing(dataset, dispatch):
    loader = prepare(DataLoader(dataset, batch_size=2), dispatch_batches=dispatch)
    assert numbers(loader) == []
    assert loader.iteration == 1
    assert not GradientState().in_dataloader


def test_epochs_reach_samplers_and_datasets():
    class Told(Counting):
        epochs: list[int] = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    loader = prepare(DataLoader(Told(2)))
    list(loader)
    list(loader)
    loader.set_epoch(7)
    list(loader)
    assert Told.epochs == [0, 1, 7, 7]
    assert loader.iteration == 8
    seedable = prepare(DataLoader(range(9), shuffle=True), use_seedable_sampler=True, data_seed=3)
    assert isinstance(seedable.get_sampler(), SeedableRandomSampler)
    first, second = numbers(seedable), numbers(seedable)
    assert first != second
    seedable.set_epoch(0)
    assert numbers(seedable) == first


def test_prepared_loader_stands_in_front_of_torchs():
    dataset = list(range(10))
    plain = DataLoader(dataset, batch_size=4, collate_fn=list)
    loader = prepare(plain)
    assert isinstance(loader, DataLoader)
    assert loader.dataset is dataset
    assert (loader.batch_size, loader.num_workers, loader.drop_last, len(loader)) == (None, 0, False, 3)
    assert loader.collate_fn is list
    assert loader.batch_sampler is plain.batch_sampler
    assert loader.multiprocessing_context is None
    assert (loader.total_batch_size, loader.total_dataset_length) == (4, 10)
    assert isinstance(get_sampler(loader), SequentialSampler)
    assert prepare(loader) is loader
    loader.collate_fn = tuple  # written where it is read
    assert next(iter(loader)) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="batch_sampler attribute should not be set"):
        loader.batch_sampler = None
    loader.set_sampler([3, 1, 2])
    assert list(loader) == [(3, 1, 2)]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loader.nonsense


def test_sampler_that_takes_the_place_of_a_batch_sampler_can_be_replaced():
    loader = prepare(DataLoader(torch.arange(6), batch_size=None, sampler=range(3)))
    loader.set_sampler([5])
    assert numbers(loader) == [5]


def test_workers_are_kept_and_torch_is_asked_for_them_once():
    loader = prepare(DataLoader(range(4), num_workers=1, persistent_workers=True, prefetch_factor=3))
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
    assert numbers(loader) == numbers(loader) == [[0], [1], [2], [3]]


def test_placement_is_decided_before_the_loop():
    assert placement(None, False) is None
    assert placement("cpu", False) is None
    assert placement(torch.device("cpu", 0), True) is None
    meta = DataLoaderShard(range(2), device="meta")
    assert [batch.device.type for batch in meta] == ["meta", "meta"]


def test_skipping():
    plain = DataLoader(range(6), batch_size=2)
    skipping = skip_first_batches(plain, 2)
    assert type(skipping) is DataLoader
    assert isinstance(skipping.batch_sampler, SkipBatchSampler)
    assert numbers(skipping) == numbers(skipping) == [[4, 5]]
    assert len(plain) == 3
    loader = prepare(plain)
    loader._is_accelerate_prepared = True
    loader.set_epoch(5)
    twice = skip_first_batches(skip_first_batches(loader, 1), 1)
    assert isinstance(twice, DataLoaderShard)
    assert (len(twice), numbers(twice), twice.iteration) == (1, [[4, 5]], 6)
    assert twice._is_accelerate_prepared
    assert twice.total_batch_size == 2
    for dispatch, kind in ((False, DataLoaderShard), (True, DataLoaderDispatcher), (None, SkipDataLoader)):
        source = DataLoader(SizedCounting(6), batch_size=2)
        source = source if dispatch is None else prepare(source, dispatch_batches=dispatch)
        skipping = skip_first_batches(skip_first_batches(source, 1), 1)
        assert type(skipping) is kind
        assert (len(skipping), numbers(skipping), numbers(skipping)) == (1, [[4, 5]], [[4, 5]])
    with pytest.raises(SettingError, match="num_batches=-1"):
        skip_first_batches(plain, -1)


def test_dispatcher_on_one_process_applies_the_users_slicing():
    def last_rows(batch, rows, process_index, num_processes):
        assert (rows, process_index, num_processes) == (slice(0, len(batch)), 0, 1)
        return batch[1:]

    loader = prepare(DataLoader(Counting(5), batch_size=3), slice_fn_for_dispatch=last_rows)
    assert numbers(loader) == [[1, 2], [4]]
    assert loader.total_batch_size == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dispatch_batches": True, "put_on_device": False}, UnsupportedCombination, "needs put_on_device=True"),
        ({"split_batches": True, "num_processes": 2, "process_index": 0}, SettingError, "batch_size=3 .*divide by 2"),
        ({"num_processes": 2, "process_index": 2}, SettingError, "process_index=2"),
        ({"rng_types": ["generators"], "num_processes": 2, "process_index": 0}, SettingError, "'generators'"),
    ],
)
def test_bad_arguments_are_explained(options, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        prepare(DataLoader(range(6), batch_size=3), **options)


def test_total_batch_size_of_batches_without_a_size():
    loader = prepare(DataLoader(range(3), batch_sampler=[[0], [1, 2]]))
    assert watched(loader) == [(False, -1), (True, -1)]
    with pytest.raises(SettingError, match="list .*has no batch_size"):
        _ = loader.total_batch_size


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(range(8), batch_size=2), lambda: DataLoader(Counting(8), batch_size=2)]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_stateful_loader_counts_only_what_the_loop_was_given(make, workers):
    pytest.importorskip("torchdata")

    def stateful():
        loader = make()
        loader.num_workers = workers
        if workers:
            loader.prefetch_factor = 2
        return prepare(loader, use_stateful_dataloader=True)

    loader = stateful()
    before = loader.state_dict()
    states = []
    for batch in loader:
        states.append((batch.tolist(), loader.state_dict()))
    after = loader.state_dict()
    whole = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [batch for batch, _ in states] == whole
    for given, (_, saved) in enumerate(states, start=1):
        again = stateful()
        again.load_state_dict(saved)
        assert again.state_dict() == saved
        # After the last batch the next epoch comes.
        assert numbers(again) == (whole[given:] or whole)
        assert numbers(again) == whole
    for saved in (before, after):
        again = stateful()
        again.load_state_dict(saved)
        assert numbers(again) == whole


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(range(8), batch_size=2), lambda: DataLoader(Counting(8), batch_size=2)]
)
def test_a_state_of_torchdata_alone_is_followed(make):
    pytest.importorskip("torchdata")
    loader = prepare(make(), use_stateful_dataloader=True)
    for step, _ in enumerate(loader):
        if step == 1:
            saved = loader.state_dict()
    del saved["position"]  # as a state from elsewhere
    again = prepare(make(), use_stateful_dataloader=True)
    again.load_state_dict(saved)
    assert numbers(again) == [[4, 5], [6, 7]]
    assert len(numbers(again)) == 4


class Placed(Counting):
    """Says how much of it was read, and goes on from there."""

    read = 0

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]

    def __iter__(self):
        while self.read < self.size:
            self.read += 1
            yield self.read - 1
        self.read = 0


class Ending(Placed):
    """Stays where a pass has ended, until the next one asks for its first sample."""

    continues = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.continues = True

    def __iter__(self):
        self.read, self.continues = self.read if self.continues else 0, False
        while self.read < self.size:
            self.read += 1
            yield self.read - 1


def test_torchdata_keeps_its_state_only_inside_a_pass_that_it_reads():
    pytest.importorskip("torchdata")
    loader = prepare(DataLoader(Placed(8), batch_size=2, num_workers=1), use_stateful_dataloader=True)
    kept = [loader.own_state() is not None]
    for step, _ in enumerate(loader, start=1):
        kept.append(loader.own_state() is not None)
        if step == 2:
            saved = loader.position_state()
    kept.append(loader.own_state() is not None)
    assert kept == [False, True, True, True, False, False]
    again = prepare(DataLoader(Placed(8), batch_size=2, num_workers=1), use_stateful_dataloader=True)
    for resumed in (again, loader):
        resumed.load_position_state(saved)
        assert resumed.own_state() is None, "that of the pass before"
        assert numbers(resumed) == [[4, 5], [6, 7]]


@pytest.mark.parametrize(("workers", "every", "steps"), [(1, 3, 1), (1, 3, 2), (2, 1, 1)])
def test_torchdata_keeps_no_state_of_a_pass_whose_workers_were_told_where_to_start(workers, every, steps):
    """Until a worker has given a batch of its own, torchdata knows of it that it is at the start."""
    pytest.importorskip("torchdata")

    def loader(**options):
        base = make_stateful_loader(Placed(32), batch_size=2, num_workers=workers, snapshot_every_n_steps=every)
        return prepare(base, use_stateful_dataloader=True, dispatch_batches=False, **options)

    def left_after(count, loader):
        batches = iter(loader)
        for _ in range(count):
            next(batches)
        return loader.position_state(), loader.own_state()

    saved, _ = left_after(3, loader(num_processes=2, process_index=0))
    moved, again = loader(), loader()  # on one process, where batches are others
    moved.load_position_state(saved)
    place, own = left_after(steps, moved)
    again.load_position_state(saved)
    whole = numbers(again)
    again = loader()
    again.load_position_state(place)
    if own is not None:
        again.load_own_state(own)
    assert numbers(again) == whole[steps:]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_lasting_workers_have_no_state_of_a_pass_before_their_first_batch(steps, every):
    """What torchdata keeps for such a worker is where the pass before ended."""
    pytest.importorskip("torchdata")

    def loader():
        base = make_stateful_loader(
            Ending(24), batch_size=3, num_workers=2, persistent_workers=True, snapshot_every_n_steps=every
        )
        return prepare(base, use_stateful_dataloader=True)

    first = loader()
    whole = numbers(first)
    batches = iter(first)
    for _ in range(steps):
        next(batches)
    again = loader()
    again.load_position_state(first.position_state())
    again.load_own_state(first.own_state())
    assert numbers(again) == whole[steps:]


@pytest.mark.parametrize("takes", ["another epoch", "a loader made by skipping"])
def test_a_state_of_torchdata_goes_with_its_place(takes):
    pytest.importorskip("torchdata")

    def stateful():
        return prepare(DataLoader(Placed(12), batch_size=2, num_workers=1), use_stateful_dataloader=True)

    loader = stateful()
    for step, _ in enumerate(loader, start=1):
        if step == 2:
            place, own = loader.position_state(), loader.own_state()
    again = stateful()
    again.load_position_state(place)
    again.load_own_state(own)
    if takes == "another epoch":
        again.set_epoch(1)
    else:
        skipping = skip_first_batches(again, 2)
        for step, batch in enumerate(skipping, start=3):
            assert batch.tolist() == [2 * step - 2, 2 * step - 1]
            assert again.own_state() is None, "it is not the one that reads"
    assert numbers(again) == [[start, start + 1] for start in range(0, 12, 2)]


def test_state_needs_torchdata(monkeypatch):
    loader = prepare(DataLoader(range(2)))
    for call in (loader.state_dict, lambda: loader.load_state_dict({})):
        with pytest.raises(SettingError, match="use_stateful_dataloader=True"):
            call()
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    available.is_installed.cache_clear()
    with pytest.raises(MissingPackage, match="pip install 'torchdata>=0.8'"):
        DataLoaderAdapter(range(2), use_stateful_dataloader=True)
    available.is_installed.cache_clear()


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_saved_place_lies_behind_skipped_batches(dispatch):
    pytest.importorskip("torchdata")

    def skipping():
        loader = prepare(
            DataLoader(Counting(10), batch_size=2), dispatch_batches=dispatch, use_stateful_dataloader=True
        )
        return skip_first_batches(loader, 2)

    loader = skipping()
    assert next(iter(loader)).tolist() == [4, 5]
    again = skipping()
    again.load_state_dict(loader.state_dict())
    assert numbers(again) == [[6, 7], [8, 9]]
    assert numbers(again) == [[4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("dataset", [range(10), Counting(10)], ids=["map", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_saved_place_of_a_loader_that_is_not_prepared_lies_behind_skipped_batches(dataset, workers):
    pytest.importorskip("torchdata")

    def skipping():
        return SkipDataLoader(dataset, 2, use_stateful_dataloader=True, batch_size=2, num_workers=workers)

    loader = skipping()
    states = [loader.state_dict()]
    for batch in loader:
        states.append(loader.state_dict())
    for given, saved in enumerate(states[:3]):
        again = skipping()
        again.load_state_dict(saved)
        assert numbers(again) == [[4, 5], [6, 7], [8, 9]][given:]
        assert numbers(again) == [[4, 5], [6, 7], [8, 9]]


def test_a_batch_of_none_is_not_the_end():
    def refuse_four(samples):
        return None if 4 in samples else torch.tensor(samples)

    loader = prepare(DataLoader(Counting(8), batch_size=2, collate_fn=refuse_four))
    assert isinstance(loader, DataLoaderDispatcher)
    assert [batch is None for batch in loader] == [False, False, True, False]


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_copies_of_a_loader_share_the_state(duplicate, dispatch):
    loader = prepare(DataLoader(range(6), batch_size=4), dispatch_batches=dispatch)
    for _ in loader:
        break
    assert [end for end, _ in watched(duplicate(loader))] == [False, True]
    assert watched(loader)[-1] == (True, 2)


@pytest.mark.parametrize("dispatch", [False, True])
def test_skipping_before_preparing(dispatch):
    loader = prepare(skip_first_batches(DataLoader(Counting(6), batch_size=2), 2), dispatch_batches=dispatch)
    assert numbers(loader) == numbers(loader) == [[4, 5]]
    with pytest.raises(SettingError, match=r"(?s)skip_first_batches\(2\).*Prepare first"):
        prepare(
            skip_first_batches(DataLoader(Counting(6), batch_size=2), 2),
            dispatch_batches=dispatch,
            num_processes=2,
            process_index=0,
        )


class SameBatches(BatchSampler):
    """Torch's batch sampler under another name."""


class OtherBatches(BatchSampler):
    """A batch sampler that says itself what it draws."""

    def __init__(self, batches, size):
        self.batches, self.batch_size, self.drop_last = batches, size, False

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_remainder_of_other_batch_samplers():
    def remainders(sampler):
        return [remainder for _, remainder in watched(prepare(DataLoader(range(100), batch_sampler=sampler)))]

    assert remainders(SameBatches(range(10), 4, False)) == [2, 2, 2]
    assert remainders(OtherBatches([[0, 1, 2, 3], [4, 5]], 4)) == [-1, -1]
    assert remainders(OtherBatches([list(range(99)), [99]], 99)) == [1, 1]


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("method", ["__iter__", "set_epoch"])
def test_an_error_before_the_first_batch_ends_the_pass(method, dispatch):
    class Refusing(Counting):
        pass

    def refuse(*arguments):
        raise OSError("gone")

    setattr(Refusing, method, refuse)
    loader = prepare(DataLoader(Refusing(3)), dispatch_batches=dispatch)
    with pytest.raises(OSError, match="gone"):
        list(loader)
    assert not GradientState().in_dataloader


def test_dispatched_batches_go_to_the_device_that_was_asked_for():
    loader = prepare(DataLoader(Counting(2)), device="meta")
    assert isinstance(loader, DataLoaderDispatcher)
    assert [batch.device.type for batch in skip_first_batches(loader, 1)] == ["meta"]


def test_what_preparing_cannot_keep_is_said():
    class Tenfold(DataLoader):
        def __iter__(self):
            return (10 * batch for batch in super().__iter__())

    with pytest.warns(UserWarning, match="Tenfold has an __iter__ of its own"):
        prepare(Tenfold(range(3)))
    sampler = WeightedRandomSampler([1.0] * 3, 3)
    with pytest.warns(UserWarning, match="use_seedable_sampler=True has no effect on WeightedRandomSampler"):
        prepare(DataLoader(range(3), sampler=sampler), use_seedable_sampler=True)
    prepare(DataLoader(range(3)), use_seedable_sampler=True)
    prepare(DataLoader(Counting(3)), use_seedable_sampler=True)
    two = {"num_processes": 2, "process_index": 0, "even_batches": False}
    with pytest.warns(UserWarning, match="even_batches=False has no effect on Counting"):
        prepare(DataLoader(Counting(3)), **two)
    with pytest.raises(SettingError, match="even_batches=False contradicts dispatch_batches=True"):
        prepare(DataLoader(range(3)), dispatch_batches=True, **two)
    prepare(DataLoader(range(3), drop_last=True), dispatch_batches=True, **two)
    prepare(DataLoader(range(3)), dispatch_batches=True, even_batches=False)


def test_a_loader_that_is_sharded_already_is_refused():
    def sharded(replicas):
        return DataLoader(range(8), sampler=DistributedSampler(range(8), replicas, 0, shuffle=False))

    with pytest.raises(SettingError, match="(?s)DistributedSampler with num_replicas=2.*over 2 processes.*Leave"):
        prepare(sharded(2), num_processes=2, process_index=0)
    assert numbers(prepare(sharded(1), num_processes=2, process_index=1)) == [[1], [3], [5], [7]]
    assert len(numbers(prepare(sharded(2)))) == 4


def test_a_stateful_loader_stays_stateful():
    pytest.importorskip("torchdata")
    given = make_stateful_loader(range(8), batch_size=2, snapshot_every_n_steps=3)
    for loader in (prepare(given), skip_first_batches(prepare(given), 1), skip_first_batches(given, 1)):
        assert loader.snapshot_every_n_steps == 3
        next(iter(loader))
        assert loader.state_dict()
