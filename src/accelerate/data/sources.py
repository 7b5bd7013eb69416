"""Whether a dataset can be shared out where it is read, or shares itself out.

Owns what is known of data that comes in shards: Hugging Face `datasets`, webdataset, MosaicML streaming, litdata, Ray,
torch's data pipes, and anything that follows the same protocol. None of these packages is imported: a dataset tells
by its attributes and the names of its classes. Never iterates anything and never talks to other ranks.

[Note: three kinds of sources]
Reading everything on every rank and taking each rank's rows is right for any dataset that gives all ranks the same
samples, and costs as many times the reading as there are ranks. A dataset in shards can do better: each rank opens its
own ones. And a dataset that was given its rank already must not be shared out a second time, which would leave most of
its samples out, silently. Of sources of the last two kinds no rank knows how much the others have: their loaders end
by agreement, see `data.agreement`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from types import FunctionType
from typing import Any
from uuid import uuid4

from torch.utils.data import IterableDataset, IterDataPipe

from ..core.errors import SettingError, explain


class SourceKind(Enum):
    """How the samples of a dataset come to their ranks. See [Note: three kinds of sources]."""

    PLAIN = "plain"
    """Every rank can read all samples, and takes its rows of them."""

    SPLIT = "split"
    """The dataset of the `Source` reads this rank's shards only."""

    ALREADY = "already"
    """The dataset knows its rank by itself, and gives this rank's samples only."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a loader is to read from on one rank."""

    kind: SourceKind
    dataset: Any
    """What to read, in the place of the dataset that was given; of kind `PLAIN`, the whole of it."""

    reason: str = ""
    """Why this kind was chosen, for the log."""

    order: str = ""
    """What its samples are shuffled by, besides torch's generators. Shares of one order need the same on all ranks."""

    @property
    def ragged(self) -> bool:
        """Whether ranks may run out at different times, so that they have to agree on the end."""
        return self.kind is not SourceKind.PLAIN


def plan_source(dataset: Any, index: int, count: int, *, whole: bool = False) -> Source:
    """Decide how one data shard reads a dataset. The dataset is left as it is.

    A dataset may say itself whether it gives each rank its own samples, with an attribute `shards_itself`: `True`
    or `False`. That beats everything found out here.

    Args:
        dataset: Any dataset.
        index: Which data shard, from 0 on.
        count: How many data shards there are. For 1 the source is the whole dataset, if it shares nothing out itself.
        whole: Do not share it out at the source, although that may be possible.

    Raises:
        SettingError: (a `ValueError`) if the dataset was split for another rank or number of ranks, is of fewer shards
            than there are ranks and can be read in no other way, or has stages of which it cannot be told whether they
            share it out; or for a map-style one that says it shares itself out.
    """
    own = getattr(dataset, "shards_itself", None)
    if own is not None:
        if own and count > 1 and not isinstance(dataset, IterableDataset):
            raise _indexed_shares(dataset, count)
        if own:
            return Source(SourceKind.ALREADY, dataset, "its attribute shards_itself is True")
        return Source(SourceKind.PLAIN, dataset, "its attribute shards_itself is False")
    if not isinstance(dataset, IterableDataset):
        return Source(SourceKind.PLAIN, dataset, "it is map-style: a sampler shares it out")
    if (share := _declared_share(dataset)) is not None:
        _check_share(dataset, share, (index, count))
        return Source(SourceKind.ALREADY, dataset, f"it was split for rank {share[0]} of {share[1]}")
    if (why := _shares_itself(dataset)) is not None:
        return Source(SourceKind.ALREADY, dataset, why)
    if _is_a(dataset, "webdataset", "DataPipeline"):
        return _plan_webdataset(dataset, index, count, whole)
    return _plan_sharded(dataset, index, count, whole)


def _indexed_shares(dataset: Any, count: int) -> SettingError:
    return SettingError(
        explain(
            f"{type(dataset).__name__} has shards_itself = True and is map-style: over {count} data shards, indices say "
            "which samples are read, and each share of its own would be shared out again.",
            accepted="shards_itself = True on iterable datasets, which end by agreement",
            remedy="Make it an IterableDataset over this rank's samples, or give all ranks the whole dataset and leave "
            "shards_itself out.",
        )
    )


# Data that knows its rank ----------------------------------------------------------------------------------------------


_KNOW_THEIR_RANK = (("streaming", "StreamingDataset"), ("litdata", "StreamingDataset"), ("ray", "IterableDataset"))
"""Package and class (by the end of its name) of datasets that find out their rank by themselves."""


def _shares_itself(dataset: Any) -> str | None:
    for package, name in _KNOW_THEIR_RANK:
        if _is_a(dataset, package, name):
            return f"datasets of {package} know their rank"
    # Torch's loader tells the filter its rank, in the workers too, as long as it sees the pipe itself.
    if isinstance(dataset, IterDataPipe) and any(_is_filter(pipe) for pipe in _pipes(dataset)):
        return "it has a sharding_filter, which torch's loader tells its rank"
    return None


def _is_filter(pipe: Any) -> bool:
    return callable(getattr(pipe, "apply_sharding", None))


def _pipes(pipe: Any) -> Iterator[Any]:
    """Yield a data pipe and those it reads from."""
    from torch.utils.data.graph import traverse_dps

    graphs = [traverse_dps(pipe)]
    while graphs:
        for below, graph in graphs.pop().values():
            yield below
            graphs.append(graph)


def _declared_share(dataset: Any) -> tuple[int, int] | None:
    """Return (rank, number of ranks) that a dataset was given by hand."""
    split = getattr(dataset, "_distributed", None)  # of datasets, after split_dataset_by_node
    if split is not None and hasattr(split, "world_size"):
        return split.rank, split.world_size
    # A shard of ours, or of others in the same words.
    rank, ranks = (getattr(dataset, name, None) for name in ("process_index", "num_processes"))
    if isinstance(rank, int) and isinstance(ranks, int) and ranks > 1:
        return rank, ranks
    return None


def _check_share(dataset: Any, share: tuple[int, int], expected: tuple[int, int]) -> None:
    if share == expected:
        return
    raise SettingError(
        explain(
            f"{type(dataset).__name__} was split for rank {share[0]} of {share[1]} (by split_dataset_by_node or alike), and "
            f"this process reads data shard {expected[0]} of {expected[1]}: samples would be lost or come twice.",
            accepted=f"a dataset split for rank {expected[0]} of {expected[1]}, or one that is not split",
            remedy="Leave the splitting to prepare(), or use accelerator.process_index and accelerator.num_processes; "
            "set dataset.shards_itself = True if this share is meant.",
        )
    )


# Data in shards --------------------------------------------------------------------------------------------------------


def _plan_sharded(dataset: Any, index: int, count: int, whole: bool) -> Source:
    """Plan what offers `shard(num_shards, index)` and `num_shards` or `n_shards`."""
    order = _order_of_examples(dataset)
    source = Source(SourceKind.PLAIN, dataset, "it is to be read whole") if whole else _shards_of(dataset, index, count)
    return replace(source, order=order)


def _shards_of(dataset: Any, index: int, count: int) -> Source:
    shards = next((found for name in ("num_shards", "n_shards") if (found := getattr(dataset, name, None))), None)
    if not isinstance(shards, int) or not callable(getattr(dataset, "shard", None)):
        return Source(SourceKind.PLAIN, dataset, "it is not known to come in shards")
    if count == 1:
        return Source(SourceKind.PLAIN, dataset, "there is one data shard")
    if shards % count:
        return Source(SourceKind.PLAIN, dataset, f"its {shards} shards do not divide by {count}")
    if getattr(dataset, "_starting_state_dict", None) is not None:
        return Source(SourceKind.PLAIN, dataset, "it was given a place to start from, which shards would not know")
    if (stage := _counts_over_shards(dataset)) is not None:
        return Source(SourceKind.PLAIN, dataset, f"{stage} gives other samples when its shards are read apart")
    split = dataset.shard(num_shards=count, index=index)
    return Source(SourceKind.SPLIT, split, f"{shards} shards, {shards // count} for each of {count}")


_COUNTING = ("TakeExamplesIterable", "SkipExamplesIterable", "CyclingMultiSourcesExamplesIterable")


def _counts_over_shards(dataset: Any) -> str | None:
    """Return the stage of a Hugging Face dataset whose result depends on what comes out of all shards before it.

    `take(5)` in two shards takes the first samples of each. What ends when one of several sources is exhausted ends
    elsewhere.
    """
    for stage in _stages_of(dataset):
        # Only the one strategy that reads all there is, once.
        harmless = getattr(stage, "stopping_strategy", None) == "all_exhausted_without_replacement"
        name = next((kind.__name__ for kind in type(stage).__mro__ if kind.__name__ in _COUNTING), None)
        if name is not None and not harmless:
            return name.removesuffix("ExamplesIterable")
    return None


def has_state(dataset: Any) -> bool:
    """Tell whether a dataset can save where it is, and all of it.

    The state of a Hugging Face dataset that is shuffled leaves out what is in the buffer: it goes on without those.
    """
    shuffled = any(type(stage).__name__.startswith("BufferShuffled") for stage in _stages_of(dataset))
    return not shuffled and all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


def _order_of_examples(dataset: Any) -> str:
    """Return the generators that a Hugging Face dataset shuffles by: without a seed, each rank has others."""
    found: list[Any] = [getattr(stage, "generator", None) for stage in _stages_of(dataset)]
    found.append(getattr(getattr(dataset, "_shuffling", None), "generator", None))  # before version 5
    return "".join(repr(one.bit_generator.state) for one in found if hasattr(one, "bit_generator"))


def _stages_of(dataset: Any) -> Iterator[Any]:
    """Yield the stages of a Hugging Face dataset, from the last one on."""
    stages = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if stage is not None:
            yield stage
            stages += [getattr(stage, "ex_iterable", None), *getattr(stage, "ex_iterables", ())]


# Webdataset ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EveryNth:
    """A stage of a webdataset pipeline: this rank's shards out of those before it."""

    index: int
    count: int

    def __call__(self, shards: Iterable[Any]) -> Iterator[Any]:
        """Return every `count`-th shard from `index` on."""
        return islice(shards, self.index, None, self.count)


_NODE_STAGES = ("single_node_only", "split_by_node")
_SHUFFLES = ("_shuffle", "detshuffle")
_READERS = ("webdataset.tariterators", "webdataset.cache")


def _plan_webdataset(dataset: Any, index: int, count: int, whole: bool) -> Source:
    """Share a pipeline out where it lists its shards, before anything that shuffles differently on each rank."""
    stages: list[Any] = list(dataset.pipeline)
    names = [_origin(stage)[1] for stage in stages]
    own = [place for place, name in enumerate(names) if name in _NODE_STAGES]
    foreign = _foreign_stages(stages)
    if not own and foreign and _is_a(dataset, "webdataset", "WebDataset"):
        # It has such a stage, unless the user put this one in its place.
        return Source(SourceKind.ALREADY, dataset, f"its nodesplitter is {foreign[0]}")
    without = [stage for place, stage in enumerate(stages) if place not in own]
    if names[0] == "ResampledShards":
        return Source(SourceKind.ALREADY, _with_stages(dataset, without), "each rank draws its own shards")
    if not own and foreign and count > 1:
        raise _unknown_stage(dataset, foreign[0])
    urls = getattr(stages[0], "urls", None)
    if count == 1 or whole or (not own and urls is None):
        reason = "there is one data shard" if count == 1 else "it is to be read whole, or lists no shards"
        return Source(SourceKind.PLAIN, _with_stages(dataset, without), reason, _order_of_pipeline(stages))
    if urls is not None and len(urls) < count:
        raise SettingError(
            explain(
                f"{type(dataset).__name__} has {len(urls)} shards for {count} data-parallel ranks: some would read nothing.",
                accepted=f"at least {count} shards",
                remedy="Write more and smaller shards, start fewer processes, or pass dispatch_batches=True.",
            )
        )
    shuffles = [place for place, name in enumerate(names) if name in _SHUFFLES]
    without.insert(min([*own[:1], *shuffles]) if own else 1, EveryNth(index, count))
    order = "" if (seed := getattr(stages[0], "seed", None)) is None else repr(seed)
    return Source(SourceKind.SPLIT, _with_stages(dataset, without), f"every {count}th of its shards", order)


def _origin(stage: Any) -> tuple[str, str]:
    """Return the module and the name of what a stage runs."""
    runs = getattr(stage, "f", stage)  # of a function that webdataset curried
    named = runs if isinstance(runs, FunctionType) else type(runs)
    return str(named.__module__), named.__name__


def _foreign_stages(stages: list[Any]) -> list[str]:
    """Name what is not webdataset's between the list of shards and the opening of them."""
    found = []
    for module, name in map(_origin, stages[1:]):
        if module in _READERS:
            break
        if module.partition(".")[0] != "webdataset":
            found.append(name)
    return found


def _order_of_pipeline(stages: list[Any]) -> str:
    """Return the seeds that a pipeline shuffles by; the time and the process decide where there is none."""
    found = [getattr(stages[0], "seed", None)]
    for stage in stages:
        if _origin(stage)[1] == "detshuffle":
            found.append(stage.seed)
        elif _origin(stage)[1] == "_shuffle":
            seed = stage.kw.get("seed")
            found.append(uuid4().hex if seed is None else seed)
    return repr(found)


def _unknown_stage(dataset: Any, name: str) -> SettingError:
    return SettingError(
        explain(
            f"The pipeline of {type(dataset).__name__} passes its shards through {name}, which is not webdataset's own: "
            "whether that gives each rank other shards cannot be told.",
            accepted="a dataset that says so in its attribute shards_itself",
            remedy=f"Set dataset.shards_itself = True if {name} depends on the rank, and False if it does not.",
        )
    )


def _with_stages(dataset: Any, stages: list[Any]) -> Any:
    if len(stages) == len(dataset.pipeline) and all(map(_same, stages, dataset.pipeline)):
        return dataset
    changed = copy.copy(dataset)
    changed.pipeline = stages
    return changed


def _same(one: Any, other: Any) -> bool:
    return one is other


def _is_a(dataset: Any, package: str, name: str) -> bool:
    """Tell whether a class of `package` whose name ends in `name` is among those a dataset derives from."""
    return any(
        kind.__module__.partition(".")[0] == package and kind.__name__.endswith(name) for kind in type(dataset).__mro__
    )
