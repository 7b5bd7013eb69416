"""On a GPU: batches that are copied ahead arrive whole, whatever the streams do, and beside the computation."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerate import Accelerator
from accelerate.data.prefetch import prefetched
from accelerate.hardware import FAMILIES
from accelerate.runtime.ops import send_to_device
from accelerate.utils import DataLoaderConfiguration

pytestmark = pytest.mark.gpu

ROWS = 1 << 20
"""Numbers in a batch: 4 MiB, so that copies take long enough to be overtaken."""


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def place(batch: Any) -> Any:
    return send_to_device(batch, cuda(), non_blocking=True)


def ahead(batches: Any, placing: Callable[[Any], Any] = place) -> Iterator[Any]:
    for (batch,) in prefetched(((batch,) for batch in batches), placing, cuda()):
        yield batch
        del batch  # or this frame would hold it while the next one is copied


def numbered(count: int) -> Iterator[torch.Tensor]:
    """Yield batches that differ in every number, and from each other."""
    for number in range(count):
        yield torch.arange(ROWS, dtype=torch.int32) * 1000 + number


def keep_busy(milliseconds: float) -> None:
    """Queue work on the current stream that takes about that long; the host goes on at once."""
    torch.cuda._sleep(int(milliseconds * cycles_per_millisecond()))


_CYCLES: list[float] = []


def cycles_per_millisecond() -> float:
    if not _CYCLES:
        torch.cuda._sleep(1_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(100_000_000)
        end.record()
        torch.cuda.synchronize()
        _CYCLES.append(100_000_000 / begin.elapsed_time(end))
    return _CYCLES[0]


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """Begin and end without queued work, so that no test waits for another one's."""
    cycles_per_millisecond()
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


# Every value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "stream of the loop"])
def test_memory_is_not_used_again_before_the_kernels_that_read_it_ran(pinned: bool, own_stream: bool) -> None:
    # The loop queues work and lets go of its batch long before that work runs: the next copies find the memory free.
    count, found = 24, []
    batches = (batch.pin_memory() if pinned else batch for batch in numbered(count))
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.current_stream()):
        for batch in ahead(batches):
            assert batch.device == cuda()
            keep_busy(15)
            found.append(batch.clone())
            del batch
        torch.cuda.synchronize()
    assert len(found) == count
    for copied, expected in zip(found, numbered(count), strict=True):
        assert torch.equal(copied.cpu(), expected)


def test_a_batch_is_waited_for_when_its_copy_is_late() -> None:
    found = []

    def late(batch: torch.Tensor) -> torch.Tensor:
        keep_busy(30)  # on the stream of the copies
        return place(batch)

    for batch in ahead(numbered(8), late):
        found.append(batch.clone())
        del batch
    torch.cuda.synchronize()
    for copied, expected in zip(found, numbered(8), strict=True):
        assert torch.equal(copied.cpu(), expected)


def test_pinned_memory_is_not_used_again_before_it_was_copied() -> None:
    # Copies wait behind work on their stream, while the host pins batch after batch.
    found = []

    def late(batch: torch.Tensor) -> torch.Tensor:
        assert batch.is_pinned()
        keep_busy(20)
        return place(batch)

    for batch in ahead(numbered(16), late):
        found.append(batch)
    torch.cuda.synchronize()
    for copied, expected in zip(found, numbered(16), strict=True):
        assert torch.equal(copied.cpu(), expected)


def test_breaking_off_and_beginning_again() -> None:
    for _ in range(6):
        found = []
        for number, batch in enumerate(ahead(numbered(6))):
            keep_busy(5)
            found.append(batch.clone())
            del batch
            if number == 2:
                break
        torch.cuda.synchronize()
        for copied, expected in zip(found, numbered(3), strict=True):
            assert torch.equal(copied.cpu(), expected)


class Encoding(collections.UserDict):
    def to(self, device: torch.device, non_blocking: bool = False) -> Encoding:
        self.data = {key: value.to(device, non_blocking=non_blocking) for key, value in self.data.items()}
        return self


class Graph:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Graph:
        return Graph(self.tensor.to(device, non_blocking=non_blocking))


def test_kinds_of_batches() -> None:
    packed = pack_sequence([torch.arange(3.0), torch.arange(2.0)])
    batches = [
        {"x": [torch.arange(5), "text"], "n": 3},
        Encoding({"ids": torch.arange(7)}),
        packed,
        Graph(torch.arange(9)),
        torch.eye(4).to_sparse(),
        torch.arange(4, device=cuda()),
        torch.empty(0),
        torch.ones(2, dtype=torch.bfloat16)[::2],
    ]
    nested, encoding, sequence, graph, sparse, there, empty, strided = list(ahead(batches))
    assert nested["x"][0].tolist() == list(range(5))
    assert nested["x"][0].is_cuda
    assert (nested["x"][1], nested["n"]) == ("text", 3)
    assert type(encoding) is Encoding
    assert encoding["ids"].is_cuda
    assert encoding["ids"].tolist() == list(range(7))
    assert sequence.data.is_cuda
    assert torch.equal(sequence.data.cpu(), packed.data)
    assert graph.tensor.is_cuda
    assert graph.tensor.tolist() == list(range(9))
    assert torch.equal(sparse.cpu().to_dense(), torch.eye(4))
    assert there.data_ptr() == batches[5].data_ptr()
    assert empty.is_cuda
    assert strided.tolist() == [1.0]


def test_an_error_comes_where_its_batch_would() -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield from numbered(2)
        raise ValueError("boom")

    seen = []
    with pytest.raises(ValueError, match="boom"):
        for batch in ahead(broken()):
            seen.append(batch[0].item())
    assert seen == [0, 1]


# Beside the computation ------------------------------------------------------------------------------------------------


def milliseconds(batches: Iterator[Any], work: float) -> float:
    """Return how long the device took for a loop with `work` milliseconds of work for each batch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in batches:
        keep_busy(work)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def test_copies_run_beside_the_computation() -> None:
    count = 12
    batches = [torch.zeros(1 << 26).pin_memory() for _ in range(2)] * (count // 2)  # of 256 MiB
    one_by_one = [place(batch) for batch in batches[:2]]
    torch.cuda.synchronize()
    del one_by_one
    copying = milliseconds(map(place, batches), 0)
    work = copying / count
    in_turn = milliseconds(map(place, batches), work)
    milliseconds(ahead(batches), work)  # finds the memory that it takes to run ahead
    beside = milliseconds(ahead(batches), work)
    # In turn both take their time; beside each other all but the first copy are hidden.
    assert in_turn > 1.7 * copying, (copying, in_turn, beside)
    assert beside < 0.75 * in_turn, (copying, in_turn, beside)


def test_the_host_does_not_wait_for_copies() -> None:
    batches = [torch.zeros(1 << 26).pin_memory() for _ in range(3)]
    list(ahead(batches))
    torch.cuda.synchronize()
    keep_busy(300)
    begin = time.perf_counter()
    for _ in ahead(batches):
        pass
    assert time.perf_counter() - begin < 0.15, "the loop's stream was busy for 0.3 s, and the host waited for it"


def test_all_copies_share_one_stream() -> None:
    family = FAMILIES["cuda"]
    stream = family.copy_stream(cuda())
    assert stream == family.copy_stream(torch.device("cuda")) == family.copy_stream(cuda())
    assert stream != torch.cuda.current_stream()
    list(ahead(numbered(4)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(5):
        for _ in ahead(numbered(4)):
            pass
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before


def test_one_batch_more_is_in_memory() -> None:
    size = ROWS * 4
    list(ahead(numbered(3)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in ahead(numbered(10)):
        torch.cuda.synchronize()
        del batch
    # The one in use and the one under way. A third would be one that is held and not used any more.
    assert torch.cuda.max_memory_allocated() - before <= 2 * size
    assert torch.cuda.memory_allocated() == before


# Prepared loaders ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(25.0)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"pin_memory": True}, {"num_workers": 2}, {"num_workers": 2, "pin_memory": True}],
    ids=["plain", "pinned", "workers", "workers pinned"],
)
@pytest.mark.parametrize("kind", ["map", "iterable", "dispatched"])
def test_prepared_loaders_give_every_sample(kind: str, options: dict[str, Any], prefetch: bool) -> None:
    if kind == "iterable" and options.get("num_workers"):
        pytest.skip("each worker would read the whole stream")
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(prefetch=prefetch, dispatch_batches=kind == "dispatched")
    )
    data = Stream() if kind == "iterable" else TensorDataset(torch.arange(25.0))
    loader = accelerator.prepare(DataLoader(data, batch_size=4, **options))
    for _ in range(2):
        seen, last = [], []
        for batch in loader:
            values = batch if kind == "iterable" else batch[0]
            assert values.device == accelerator.device
            keep_busy(2)
            seen.append(values.clone())
            last.append(accelerator.gradient_state.end_of_dataloader)
        assert torch.cat(seen).tolist() == list(range(25))
        assert last == [False] * 6 + [True]


def test_prepared_loaders_copy_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    family = FAMILIES["cuda"]
    monkeypatch.setattr(
        type(family), "on_stream", lambda self, stream: used.append(stream) or torch.cuda.stream(stream)
    )
    for prefetch in (True, False):
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(prefetch=prefetch))
        list(accelerator.prepare(DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)))
        assert used == ([family.copy_stream(cuda())] * 2 if prefetch else [])
        used.clear()
