"""Prefetching on a device that is simulated: copies run when something waits for them, and not before."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from accelerate import hardware
from accelerate.core.tree import honor_type
from accelerate.data.prefetch import prefetched
from accelerate.hardware import Hardware
from accelerate.runtime.ops import send_to_device

DEVICE = torch.device("cpu")


class Stream:
    """Runs what was queued when an event on it is waited for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.queue = name, log, []

    def record_event(self) -> tuple[Stream, int]:
        return self, len(self.queue)

    def wait_event(self, event: tuple[Stream, int]) -> None:
        other, until = event
        self.log.append(f"{self.name} waits")
        for work in other.queue[:until]:
            work()
        other.queue[:until] = [lambda: None] * until


class OnDevice(torch.Tensor):
    """A tensor whose values come with its copy, and which knows the streams that use it."""

    @property
    def is_cpu(self) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        stream.log.append(f"recorded on {stream.name}")
        self.streams = [stream.name]


class Pinned(torch.Tensor):
    """A tensor in pinned memory."""


class Simulated(Hardware):
    """A family with a stream for copies."""

    def begin(self, log: list[str]) -> Simulated:
        side, loop = Stream("side", log), Stream("loop", log)
        vars(self).update(log=log, side=side, loop=loop, current=loop)
        return self

    def copy_stream(self, device: torch.device) -> Any:
        return self.side

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before = self.current
        vars(self)["current"] = stream
        yield
        vars(self)["current"] = before

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.log.append("pinned")
        return tensor.clone().as_subclass(Pinned)

    def place(self, batch: Any) -> Any:
        return send_to_device(_Movable.wrap(batch, self), DEVICE, non_blocking=True)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        kind = "pinned" if isinstance(tensor, Pinned) else "pageable"
        self.log.append(f"{kind} copy on {self.current.name}")
        source = tensor.as_subclass(torch.Tensor)
        target = torch.full_like(source, -1)
        if self.current is self.side:
            self.side.queue.append(lambda: target.copy_(source))
        else:
            target.copy_(source)
        return target.as_subclass(OnDevice)


class _Movable:
    """Stands for a tensor while a batch is moved, so that the move is simulated."""

    def __init__(self, tensor: torch.Tensor, device: Simulated) -> None:
        self.tensor, self.device = tensor, device

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        return self.device.copied(self.tensor)

    @classmethod
    def wrap(cls, batch: Any, device: Simulated) -> Any:
        if isinstance(batch, torch.Tensor):
            return cls(batch, device)
        if hasattr(batch, "move_with"):
            batch.move_with = device.copied
            return batch
        if isinstance(batch, (list, tuple)):
            return honor_type(batch, [cls.wrap(item, device) for item in batch])
        if isinstance(batch, dict):
            return {key: cls.wrap(item, device) for key, item in batch.items()}
        return batch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    found = Simulated("cpu", hardware.CPU.label).begin([])
    monkeypatch.setattr(hardware, "of", lambda device, origin: found)
    return found


def source(batches: list[Any], log: list[str]) -> Iterator[tuple[Any, int]]:
    for number, batch in enumerate(batches):
        log.append(f"read {number}")
        if isinstance(batch, Exception):
            raise batch
        yield batch, number


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((3,), float(number)) for number in range(count)]


def test_the_next_copy_is_under_way_while_a_batch_is_used(device: Simulated):
    for batch, number in prefetched(source(tensors(3), device.log), device.place, DEVICE):
        assert device.current is device.loop
        assert batch.tolist() == [number] * 3
        assert batch.streams == ["loop"]
        device.log.append(f"given {number}")
        del batch
    queued = ["pinned", "pinned copy on side"]
    taken = ["loop waits", "recorded on loop"]
    assert device.log == [
        *["read 0", *queued, "read 1", *queued, *taken, "given 0"],
        *["read 2", *queued, *taken, "given 1"],
        *[*taken, "given 2"],
    ]


def test_waiting_for_a_batch_does_not_wait_for_the_next_one(device: Simulated):
    items = prefetched(source(tensors(2), device.log), device.place, DEVICE)
    first = next(items)[0]
    assert first.tolist() == [0.0] * 3
    left = [work for work in device.side.queue if work.__closure__]
    assert len(left) == 1, "the copy of the second batch is still to run"


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches(device: Simulated, count: int):
    given = list(prefetched(source(tensors(count), device.log), device.place, DEVICE))
    assert [number for _, number in given] == list(range(count))


def test_what_comes_with_a_batch_stays_with_it(device: Simulated):
    items = ((torch.full((1,), float(n)), n, n == 3) for n in range(4))
    assert [(int(batch), n, last) for batch, n, last in prefetched(items, device.place, DEVICE)] == [
        (0, 0, False), (1, 1, False), (2, 2, False), (3, 3, True)
    ]  # fmt: skip


def test_an_error_comes_where_its_batch_would(device: Simulated):
    seen = []
    with pytest.raises(ValueError, match="boom"):
        for _, number in prefetched(source([*tensors(2), ValueError("boom")], device.log), device.place, DEVICE):
            seen.append(number)
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="first"):
        next(prefetched(source([ValueError("first")], device.log), device.place, DEVICE))


def test_an_error_of_a_copy_comes_where_its_batch_would(device: Simulated):
    def place(batch: torch.Tensor) -> Any:
        if batch[0] == 2:
            raise torch.OutOfMemoryError("no room")
        return device.place(batch)

    seen = []
    with pytest.raises(torch.OutOfMemoryError):
        for _, number in prefetched(source(tensors(4), device.log), place, DEVICE):
            seen.append(number)
    assert seen == [0, 1]


def test_breaking_off_leaves_the_source_one_ahead(device: Simulated):
    for _, number in prefetched(source(tensors(5), device.log), device.place, DEVICE):
        if number == 1:
            break
    assert [line for line in device.log if line.startswith("read")] == ["read 0", "read 1", "read 2"]


def test_a_batch_is_let_go_before_the_next_is_read(device: Simulated):
    def watched() -> Iterator[tuple[torch.Tensor]]:
        for number, batch in enumerate(tensors(4)):
            assert number < 2 or given[number - 2]() is None, "the batch given last but one is still held"
            yield (batch,)

    given: list[Any] = []
    for (batch,) in prefetched(watched(), device.place, DEVICE):
        given.append(weakref.ref(batch))
        del batch


# Kinds of batches ---------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["a", "b"])


class Encoding(collections.UserDict):
    """Moves itself as a whole, as the batches of tokenizers do."""

    move_with: Any = None

    def __init__(self, data: dict[str, Any], note: str) -> None:
        super().__init__(data)
        self.note = note

    def to(self, device: torch.device, non_blocking: bool = False) -> Encoding:
        self.data = {key: self.move_with(value) for key, value in self.data.items()}
        return self


class Graph:
    """Moves itself, and shows nobody its tensors."""

    move_with: Any = None

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Graph:
        self.tensor = self.move_with(self.tensor)
        return self


class Labelled(Encoding):
    """Has a tensor besides its items."""

    def __init__(self, data: dict[str, Any], labels: torch.Tensor) -> None:
        super().__init__(data, "")
        self.labels = labels


def only(batch: Any, device: Simulated) -> Any:
    return next(prefetched(iter([(batch,)]), device.place, DEVICE))[0]


def test_nested_batches_go_ahead_whole(device: Simulated):
    given = only({"pair": Pair(torch.ones(1), ["kept"]), "number": 3}, device)
    assert given["number"] == 3
    assert type(given["pair"]) is Pair
    assert given["pair"].a.tolist() == [1.0]
    assert given["pair"].b == ["kept"]
    assert device.log == ["pinned", "pinned copy on side", "loop waits", "recorded on loop"]


def test_mappings_that_move_themselves_are_pinned_and_stay_what_they_are(device: Simulated):
    batch = Encoding({"ids": torch.ones(2), "mask": torch.zeros(1)}, "note")
    given = only(batch, device)
    assert type(given) is Encoding
    assert given.note == "note"
    assert given["ids"].tolist() == [1.0, 1.0]
    assert device.log.count("pinned copy on side") == device.log.count("recorded on loop") == 2
    assert type(batch["ids"]) is torch.Tensor, "the loader's own object is left alone"


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(Graph(torch.ones(1)), id="opaque"),
        pytest.param(Labelled({"x": torch.ones(1)}, torch.ones(1)), id="tensors besides items"),
        pytest.param([torch.ones(1, requires_grad=True)], id="gradients"),
        pytest.param([torch.ones(1, device="meta")], id="on a device"),
        pytest.param([torch.ones(1).as_subclass(Pinned)], id="of a type of its own"),
    ],
)
def test_what_cannot_be_followed_is_copied_at_its_turn(device: Simulated, batch: Any):
    with torch.no_grad():
        only(batch, device)
    assert [line.split()[1:] for line in device.log] == [["copy", "on", "loop"]]


def test_sparse_tensors_are_copied_at_their_turn(device: Simulated):
    sparse = torch.eye(2).to_sparse()
    assert next(prefetched(iter([(sparse,)]), lambda batch: batch, DEVICE))[0] is sparse
    assert device.log == []


def test_packed_sequences_are_known(device: Simulated, monkeypatch: pytest.MonkeyPatch):
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    monkeypatch.setattr(PackedSequence, "pin_memory", lambda self: self)
    given = next(prefetched(iter([(packed,)]), lambda batch: batch, DEVICE))[0]
    assert type(given) is PackedSequence
    assert device.log == ["loop waits"]


# Families without streams -------------------------------------------------------------------------------------------


def test_without_a_stream_batches_are_placed_at_their_turn():
    log: list[str] = []

    def place(batch: Any) -> Any:
        log.append("placed")
        return batch

    for _, number in prefetched(source(tensors(2), log), place, torch.device("cpu")):
        log.append(f"given {number}")
    assert log == ["read 0", "placed", "given 0", "read 1", "placed", "given 1"]


def test_which_families_copy_ahead():
    assert [name for name, family in hardware.FAMILIES.items() if family.copies_ahead] == ["cuda"]
    assert hardware.CPU.copy_stream(torch.device("cpu")) is None
    assert hardware.named("meta").copy_stream(torch.device("meta")) is None
