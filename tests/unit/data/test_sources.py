"""How a dataset is shared out: found out without importing the package it is from."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator
from accelerate.data.sources import EveryNth, SourceKind, has_state, plan_source

PLAIN, SPLIT, ALREADY = SourceKind.PLAIN, SourceKind.SPLIT, SourceKind.ALREADY


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class Shards(Stream):
    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards
        self.num_shards = len(shards)

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.shards[index::num_shards])

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.shards)


class OldShards(Shards):
    """Says how many shards it has in the older word."""

    def __init__(self, shards: list[list[int]]) -> None:
        super().__init__(shards)
        self.n_shards = self.__dict__.pop("num_shards")

    def shard(self, num_shards: int, index: int) -> OldShards:
        return OldShards(self.shards[index::num_shards])


def kind_of(dataset: Any, index: int = 0, count: int = 2) -> SourceKind:
    return plan_source(dataset, index, count).kind


# The protocol ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Shards, OldShards])
@pytest.mark.parametrize(("num_shards", "count"), [(2, 2), (6, 2), (6, 3), (4, 4)])
def test_shards_that_divide_are_shared_out_at_the_source(kind: Any, num_shards: int, count: int) -> None:
    shards = [[10 * number, 10 * number + 1] for number in range(num_shards)]
    sources = [plan_source(kind(shards), index, count) for index in range(count)]
    assert {source.kind for source in sources} == {SPLIT}
    assert all(source.ragged for source in sources)
    assert all(source.dataset.shards == shards[index::count] for index, source in enumerate(sources))
    read = [sample for source in sources for sample in source.dataset]
    assert sorted(read) == sorted(itertools.chain(*shards))
    assert f"{num_shards} shards" in sources[0].reason


@pytest.mark.parametrize(("num_shards", "count"), [(7, 3), (1, 2), (2, 4), (0, 2), (4, 1)])
def test_shards_that_do_not_divide_are_read_by_all(num_shards: int, count: int) -> None:
    dataset = Shards([[number] for number in range(num_shards)])
    source = plan_source(dataset, 0, count)
    assert (source.kind, source.dataset, source.ragged) == (PLAIN, dataset, False)


def test_what_is_not_known_to_come_in_shards_is_read_by_all() -> None:
    assert kind_of(Stream()) is PLAIN
    assert kind_of([1, 2, 3]) is PLAIN
    half = Stream()
    half.num_shards = 4  # pyright: ignore[reportAttributeAccessIssue] - and no way to have one of them
    assert kind_of(half) is PLAIN
    mapped: Any = SimpleNamespace(num_shards=4, shard=lambda num_shards, index: None)
    assert kind_of(mapped) is PLAIN, "map-style data is a sampler's"


def test_a_dataset_may_say_itself_that_it_shares_out() -> None:
    dataset = Shards([[1], [2]])
    dataset.shards_itself = True  # pyright: ignore[reportAttributeAccessIssue]
    source = plan_source(dataset, 1, 2)
    assert (source.kind, source.dataset, source.ragged) == (ALREADY, dataset, True)
    dataset.shards_itself = False  # pyright: ignore[reportAttributeAccessIssue]
    assert kind_of(dataset) is PLAIN


def test_map_style_data_cannot_say_that_it_shares_itself_out() -> None:
    mapped: Any = SimpleNamespace(shards_itself=True)
    with pytest.raises(ValueError, match=r"SimpleNamespace has shards_itself = True and is map-style"):
        plan_source(mapped, 0, 2)
    assert kind_of(mapped, 0, 1) is ALREADY, "alone there is nothing to share out"


# Known by their classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("streaming.base.dataset", "StreamingDataset"),
        ("litdata.streaming.dataset", "StreamingDataset"),
        ("ray.data._internal.torch_iterable_dataset", "TorchIterableDataset"),
        ("ray.train.huggingface.transformers._transformers_utils", "RayTorchIterableDataset"),
    ],
)
def test_datasets_that_find_out_their_rank_are_never_shared_out_again(module: str, name: str) -> None:
    base = type(name, (Shards,), {"__module__": module})
    derived = type("Mine", (base,), {})
    assert kind_of(derived([[1], [2]])) is ALREADY
    other = type(name, (Shards,), {"__module__": "my_" + module})
    assert kind_of(other([[1], [2]])) is SPLIT


def test_shards_made_by_hand_are_never_shared_out_again() -> None:
    dataset = Stream()
    dataset.num_processes, dataset.process_index = 2, 1  # pyright: ignore[reportAttributeAccessIssue]
    assert kind_of(dataset, 1, 2) is ALREADY
    with pytest.raises(ValueError, match=r"split for rank 1 of 2 .* this process reads data shard 0 of 2"):
        plan_source(dataset, 0, 2)
    with pytest.raises(ValueError, match=r"split for rank 1 of 2 .* this process reads data shard 1 of 4"):
        plan_source(dataset, 1, 4)
    dataset.shards_itself = True  # pyright: ignore[reportAttributeAccessIssue]
    assert kind_of(dataset, 1, 4) is ALREADY, "said to be meant"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_data_pipe_with_a_sharding_filter_is_shared_out_by_torch() -> None:
    from torch.utils.data.datapipes.iter import IterableWrapper

    pipe = IterableWrapper(range(6))
    assert kind_of(pipe) is PLAIN
    assert kind_of(pipe.sharding_filter()) is ALREADY
    assert kind_of(pipe.sharding_filter().map(str)) is ALREADY


# datasets --------------------------------------------------------------------------------------------------------------


def examples(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for place in range(3):
            yield {"id": 10 * shard + place}


@pytest.fixture(scope="module", autouse=True)
def datasets_is_loaded() -> None:
    """Use the package before any test: it loads torch's compiler, which sets a variable that each test watches."""
    with contextlib.suppress(ImportError):
        importlib.import_module("datasets").IterableDataset.from_generator(examples, gen_kwargs={"shards": [0]})


def hugging_face(num_shards: int = 6) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.IterableDataset.from_generator(examples, gen_kwargs={"shards": list(range(num_shards))})


def ids(dataset: Any) -> list[int]:
    return [example["id"] for example in dataset]


def all_ids(num_shards: int) -> list[int]:
    return [example["id"] for example in examples(list(range(num_shards)))]


def test_datasets_are_shared_out_by_their_shards() -> None:
    dataset = hugging_face()
    sources = [plan_source(dataset, index, 3) for index in range(3)]
    assert {source.kind for source in sources} == {SPLIT}
    assert sorted(itertools.chain(*(ids(source.dataset) for source in sources))) == all_ids(6)
    assert kind_of(dataset, 0, 4) is PLAIN
    assert ids(plan_source(dataset, 0, 4).dataset) == all_ids(6)


def test_datasets_split_their_part_over_workers_themselves() -> None:
    found = []
    for index in range(3):
        loader = DataLoader(plan_source(hugging_face(), index, 3).dataset, batch_size=2, num_workers=2)
        found += [number for batch in loader for number in batch["id"].tolist()]
    assert sorted(found) == all_ids(6)


def test_shards_of_shuffled_datasets_follow_the_epoch() -> None:
    shuffled = hugging_face().shuffle(seed=3, buffer_size=4)
    orders = []
    for epoch in range(2):
        parts = [plan_source(shuffled, index, 2).dataset for index in range(2)]
        for part in parts:
            part.set_epoch(epoch)
        orders.append([ids(part) for part in parts])
        assert sorted(itertools.chain(*orders[-1])) == all_ids(6)
    assert orders[0] != orders[1]


def test_the_state_of_a_shuffled_dataset_leaves_its_buffer_out_and_is_not_used() -> None:
    assert has_state(hugging_face())
    assert has_state(hugging_face().map(dict))
    assert not has_state(hugging_face().shuffle(seed=3, buffer_size=4))
    assert not has_state(hugging_face().shuffle(seed=3, buffer_size=4).map(dict))
    assert not has_state(range(3))


def test_a_shuffled_dataset_is_taken_up_where_it_was(tmp_path: Path) -> None:
    dataset = hugging_face(20).shuffle(seed=3, buffer_size=8)

    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(dataset, batch_size=2))
    whole = []
    for number, batch in enumerate(loader):
        whole.append(batch["id"].tolist())
        if number == 19:
            accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    assert [batch["id"].tolist() for batch in loader] == whole[20:]


def test_datasets_split_by_node_are_never_shared_out_again() -> None:
    dataset = hugging_face()
    from datasets.distributed import split_dataset_by_node

    split = split_dataset_by_node(dataset, rank=1, world_size=3)
    source = plan_source(split, 1, 3)
    assert (source.kind, source.dataset) == (ALREADY, split)
    for index, count in ((0, 3), (1, 2), (0, 1)):
        with pytest.raises(ValueError, match=rf"split for rank 1 of 3 .* data shard {index} of {count}"):
            plan_source(split, index, count)


def test_stages_that_count_over_all_shards_are_read_whole() -> None:
    dataset = hugging_face(4)
    from datasets import concatenate_datasets, interleave_datasets

    exact = "all_exhausted_without_replacement"
    assert kind_of(dataset.take(5)) is PLAIN
    assert kind_of(dataset.skip(5)) is PLAIN
    assert kind_of(dataset.skip(5).shuffle(seed=0, buffer_size=3)) is PLAIN
    assert kind_of(interleave_datasets([dataset, dataset])) is PLAIN
    assert kind_of(interleave_datasets([dataset, dataset], probabilities=[0.5, 0.5], seed=0)) is PLAIN
    assert kind_of(interleave_datasets([dataset, dataset], stopping_strategy=exact)) is SPLIT
    assert kind_of(concatenate_datasets([dataset, dataset])) is SPLIT
    assert kind_of(concatenate_datasets([dataset, dataset.take(2)])) is PLAIN
    assert kind_of(dataset.batch(2)) is SPLIT
    # Why: the shards of the first five are not shards of which each rank takes its first ones.
    apart = sorted(itertools.chain(*(ids(dataset.take(5).shard(2, index)) for index in range(2))))
    assert apart != sorted(ids(dataset.take(5)))


def test_the_generators_of_shuffled_datasets_are_told() -> None:
    def order(**options: Any) -> str:
        return plan_source(hugging_face().shuffle(buffer_size=4, **options).map(None), 0, 2).order

    assert plan_source(hugging_face(), 0, 2).order == ""
    assert order(seed=3) == order(seed=3) != order(seed=4)
    assert order() != order(), "each rank would have its own"
    assert (
        plan_source(hugging_face().shuffle(seed=3), 0, 4).order
        == plan_source(hugging_face().shuffle(seed=3), 1, 4).order
    )
    whole = plan_source(hugging_face(), 0, 2, whole=True)
    assert (whole.kind, ids(whole.dataset)) == (PLAIN, all_ids(6))


def test_a_dataset_that_was_told_where_to_start_is_read_whole() -> None:
    dataset = hugging_face()
    dataset.load_state_dict(dataset.state_dict())
    assert kind_of(dataset) is PLAIN


# webdataset ------------------------------------------------------------------------------------------------------------


def tars(folder: Path, count: int) -> list[str]:
    """Write shards of 1, 2, 3, 1, 2, ... samples whose keys are numbers."""
    keys, names = itertools.count(), []
    for number in range(count):
        names.append(str(folder / f"{number:03}.tar"))
        with tarfile.open(names[-1], "w") as archive:
            for key in itertools.islice(keys, 1 + number % 3):
                info = tarfile.TarInfo(f"{key:04}.txt")
                info.size = 1
                archive.addfile(info, BytesIO(b"x"))
    return names


def keys_of(dataset: Any) -> list[int]:
    return [int(sample["__key__"]) for sample in dataset]


def web(urls: list[str], **options: Any) -> Any:
    wds = pytest.importorskip("webdataset")
    return wds.WebDataset(urls, **{"shardshuffle": False, **options})


# It leaves the files of its shards to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_every_nth() -> None:
    parts = [list(EveryNth(index, 3)(range(7))) for index in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


@leaves_files_open
@pytest.mark.parametrize("shuffle", [False, 10])
@pytest.mark.parametrize("splitter", ["single_node_only", "split_by_node", None])
def test_webdataset_is_shared_out_where_it_lists_its_shards(
    tmp_path: Path, splitter: str | None, shuffle: bool | int
) -> None:
    wds = pytest.importorskip("webdataset")
    urls = tars(tmp_path, 7)
    found = []
    for index in range(3):
        # Each rank shuffles with another seed, as it does without one.
        options = {} if splitter == "single_node_only" else {"nodesplitter": splitter and getattr(wds, splitter)}
        dataset = web(urls, shardshuffle=shuffle, seed=index, **options)
        stages = list(dataset.pipeline)
        source = plan_source(dataset, index, 3)
        assert source.kind is SPLIT
        assert dataset.pipeline == stages, "the dataset is left as it is"
        found.append(keys_of(source.dataset))
    assert sorted(itertools.chain(*found)) == list(range(13))
    assert all(found)


@leaves_files_open
def test_webdataset_over_workers(tmp_path: Path) -> None:
    urls, found = tars(tmp_path, 7), []
    for index in range(3):
        loader = DataLoader(plan_source(web(urls), index, 3).dataset, batch_size=None, num_workers=2)
        found += [int(sample["__key__"]) for sample in loader]
    assert sorted(found) == list(range(13))


@leaves_files_open
def test_webdataset_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on rank 0 of two when it reads for all: the default pipeline refuses there.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = web(tars(tmp_path, 3))
    with pytest.raises(ValueError, match="nodesplitter"):
        keys_of(dataset)
    source = plan_source(dataset, 0, 1)
    assert source.kind is PLAIN
    assert keys_of(source.dataset) == list(range(6))


def every_second(shards: Any) -> Any:
    return itertools.islice(shards, 0, None, 2)


def test_webdataset_that_splits_in_its_own_way_is_left_alone(tmp_path: Path) -> None:
    urls = tars(tmp_path, 4)
    for splitter, name in ((every_second, "every_second"), (EveryNth(0, 2), "EveryNth")):
        dataset = web(urls, nodesplitter=splitter)
        source = plan_source(dataset, 0, 2)
        assert (source.kind, source.dataset) == (ALREADY, dataset), "whatever its name is"
        assert name in source.reason
    assert kind_of(web(urls, resampled=True)) is ALREADY


def pipeline(urls: list[str], *stages: Any, **options: Any) -> Any:
    wds = pytest.importorskip("webdataset")
    return wds.DataPipeline(wds.SimpleShardList(urls, **options), *stages, wds.tarfile_to_samples())


def test_a_pipeline_with_an_unknown_stage_before_its_samples_has_to_say_what_that_does(tmp_path: Path) -> None:
    dataset = pipeline(tars(tmp_path, 4), every_second)
    with pytest.raises(ValueError, match="passes its shards through every_second") as caught:
        plan_source(dataset, 0, 2)
    assert "shards_itself = True if every_second depends on the rank" in str(caught.value)
    assert kind_of(dataset, 0, 1) is PLAIN
    dataset.shards_itself = True
    assert kind_of(dataset) is ALREADY
    later = dataset.pipeline[:1] + dataset.pipeline[2:] + [every_second]
    assert kind_of(pytest.importorskip("webdataset").DataPipeline(*later)) is SPLIT, "samples are each rank's business"


@leaves_files_open
def test_a_pipeline_that_shuffles_before_it_splits_is_split_before_it_shuffles(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    urls = tars(tmp_path, 7)
    for _ in range(3):  # the time seeds the shuffle
        dataset = pipeline(urls, wds.shuffle(7), wds.split_by_node, wds.split_by_worker)
        found = [keys_of(plan_source(dataset, index, 3).dataset) for index in range(3)]
        assert sorted(itertools.chain(*found)) == list(range(13))


def test_what_a_pipeline_is_shuffled_by_is_told_where_ranks_have_to_agree(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    urls = tars(tmp_path, 4)

    def orders(*stages: Any, whole: bool = False, **options: Any) -> set[str]:
        made = (pipeline(urls, *stages, wds.split_by_node, **options) for _ in range(2))
        return {plan_source(dataset, 0, 2, whole=whole).order for dataset in made}

    assert orders() == {""}
    assert orders(wds.shuffle(4)) == {""}, "split before that"
    assert orders(seed=3) == {"3"}
    assert len(orders(seed=True)) == 2, "the time"
    assert len(orders(wds.shuffle(4), whole=True)) == 2
    assert len(orders(wds.shuffle(4, seed=0), whole=True)) == 1
    assert orders(wds.detshuffle(4, seed=5), whole=True) == {"[None, 5]"}
    assert plan_source(pipeline(urls, wds.split_by_node), 0, 2, whole=True).kind is PLAIN


def test_webdataset_of_fewer_shards_than_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"WebDataset has 2 shards for 3 data-parallel ranks") as caught:
        plan_source(web(tars(tmp_path, 2)), 0, 3)
    assert "Accepted: at least 3 shards." in str(caught.value)


# Ray -------------------------------------------------------------------------------------------------------------------


def test_rays_own_wrapper() -> None:
    module = pytest.importorskip("ray.data._internal.torch_iterable_dataset")
    assert kind_of(module.TorchIterableDataset(lambda: iter(range(3)))) is ALREADY
    assert torch.tensor(list(module.TorchIterableDataset(lambda: iter(range(3))))).tolist() == [0, 1, 2]
