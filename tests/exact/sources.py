"""What is read: datasets that return their own indices, and samplers that draw in every way users do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, WeightedRandomSampler, get_worker_info

FEATURES = 4

Sample = tuple[int, torch.Tensor]


def sample(index: int, augmented: bool) -> Sample:
    """Return the index and its features, which no other index has."""
    features = torch.arange(FEATURES, dtype=torch.float32).mul_(0.1 * index + 1).sin_()
    if augmented:
        features += torch.rand(FEATURES) + random.random() + float(np.random.rand())
    return index, features


class Numbers(Dataset[Sample]):
    """`size` samples; `augmented` draws from torch, Python and numpy for each."""

    def __init__(self, size: int, augmented: bool = False) -> None:
        self.size, self.augmented = size, augmented

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return sample(index, self.augmented)


class Stream(IterableDataset[Sample]):
    """`size` samples, one after the other, dealt to workers in turn.

    Args:
        size: Number of samples.
        order: `"epoch"` shuffles with the epoch as seed, `"global"` with torch's global generator when a pass begins,
            `"buffer"` through a small buffer with Python's, `"epoch-buffer"` through one seeded by the epoch.
        augmented: Draw for each sample too.
    """

    def __init__(self, size: int, order: str, augmented: bool = False) -> None:
        self.size, self.order, self.augmented = size, order, augmented
        # In shared memory, as `datasets` has it: worker processes that stay have a copy of the dataset.
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self.shared_epoch.item())

    def set_epoch(self, epoch: int) -> None:
        self.shared_epoch.fill_(epoch)

    def indices(self) -> Iterator[int]:
        if self.order == "epoch":
            yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        elif self.order == "global":
            # Workers have streams of their own, so each shuffles its own share.
            yield from self.share(torch.randperm(self.size).tolist())
        else:
            draw = random if self.order == "buffer" else random.Random(self.epoch)
            buffer: list[int] = []
            for index in self.share(range(self.size)) if self.order == "buffer" else range(self.size):
                buffer.append(index)
                if len(buffer) == 5:
                    yield buffer.pop(draw.randrange(5))
            while buffer:
                yield buffer.pop(draw.randrange(len(buffer)))

    def share(self, indices: Any) -> Iterator[int]:
        worker = get_worker_info()
        for index in indices:
            if worker is None or index % worker.num_workers == worker.id:
                yield index

    def __iter__(self) -> Iterator[Sample]:
        shared_already = self.order in ("global", "buffer")
        for index in self.indices() if shared_already else self.share(self.indices()):
            yield sample(index, self.augmented)


class StatefulStream(Stream):
    """A `Stream` that says where it is, and goes on from there without reading what came before."""

    read = 0

    def __init__(self, size: int, order: str, augmented: bool = False) -> None:
        super().__init__(size, order, augmented)
        self.order_of_pass: list[int] | None = None
        self.place = 0
        self.continues = False

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order_of_pass, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order_of_pass, self.place = state["order"], state["place"]
        self.continues = True

    def __iter__(self) -> Iterator[Sample]:
        if not self.continues or self.order_of_pass is None:
            shared_already = self.order in ("global", "buffer")
            self.order_of_pass = list(self.indices() if shared_already else self.share(self.indices()))
            self.place = 0
        self.continues = False
        order = self.order_of_pass
        while self.place < len(order):
            self.place += 1
            StatefulStream.read += 1
            yield sample(order[self.place - 1], self.augmented)


class Indices(Sampler[int]):
    """The frame of a user's own sampler."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


class Lazy(Indices):
    """Draws each index with Python's generator when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield random.randrange(self.size)


class NumpyOrder(Indices):
    """Draws a permutation with numpy's generator when a pass begins."""

    def __iter__(self) -> Iterator[int]:
        yield from np.random.permutation(self.size).tolist()


class OwnGenerator(Indices):
    """Draws with a torch generator of its own, under the usual name."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=self.generator).tolist()


class Endless(Sampler[int]):
    """Never ends: shuffles again and again, with Python's generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from random.sample(range(self.size), self.size)


class Hidden(Indices):
    """Draws with a generator that nobody can find."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        draw = random.Random(seed)
        self.shuffle = lambda order: draw.shuffle(order)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        self.shuffle(order)
        yield from order


class Unrepeatable(Indices):
    """Draws with the machine's noise: no state can bring an order back."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        random.SystemRandom().shuffle(order)
        yield from order


class Buckets(Sampler[list[int]]):
    """A batch sampler: batches of 1 to 4 neighbours, shuffled with Python's generator."""

    def __init__(self, size: int) -> None:
        self.batches, start = [], 0
        while start < size:
            length = len(self.batches) * 3 % 4 + 1
            self.batches.append(list(range(start, min(start + length, size))))
            start += length

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.batches)
        random.shuffle(order)
        yield from order


def sampling(order: str, size: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Return the arguments that make a `DataLoader` sample in this order.

    Args:
        order: A name.
        size: Of the dataset.
        batch_size: Of a batch, where the order does not make batches itself.
        seed: For generators that the user makes. A resumed run gets another one than the run before: what a
            checkpoint does not bring back must show.
    """
    weights = [1.0 + index % 3 for index in range(size)]
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, Any] = {
        "in-order": dict,
        "plain": lambda: {"shuffle": True},
        "seedable": lambda: {"shuffle": True},
        "loader-generator": lambda: {"shuffle": True, "generator": generator},
        "weighted": lambda: {"sampler": WeightedRandomSampler(weights, size)},
        "weighted-generator": lambda: {"sampler": WeightedRandomSampler(weights, size, generator=generator)},
        "lazy": lambda: {"sampler": Lazy(size)},
        "numpy": lambda: {"sampler": NumpyOrder(size)},
        "own-generator": lambda: {"sampler": OwnGenerator(size, seed)},
        "endless": lambda: {"sampler": Endless(size)},
        "hidden": lambda: {"sampler": Hidden(size, seed)},
        "unrepeatable": lambda: {"sampler": Unrepeatable(size)},
        "buckets": lambda: {"batch_sampler": Buckets(size)},
    }
    arguments = orders[order]()
    return arguments if "batch_sampler" in arguments else {"batch_size": batch_size, **arguments}
