"""The grid: which runs are interrupted and resumed. Plain data, no code of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

MAP_ORDERS = (
    "plain",
    "seedable",
    "loader-generator",
    "weighted",
    "weighted-generator",
    "lazy",
    "numpy",
    "own-generator",
    "endless",
    "buckets",
)
STREAM_ORDERS = ("epoch", "global", "buffer", "epoch-buffer")
WORKERS = ("0", "2", "2-persistent")
HABITS = ("load", "recipe", "skip", "set-epoch")


@dataclass(frozen=True)
class Cell:
    """One run, and how it is resumed."""

    reads: str = "map"
    """`map`, `iterable`, or one of them with `dispatched-`: rank 0 reads for all."""

    order: str = "plain"
    """One of `MAP_ORDERS` or `STREAM_ORDERS`."""

    workers: str = "0"
    """Number of processes that read, and whether they stay."""

    ranks: int = 1

    loader: str = "torch"
    """`torch`'s own loader, or torchdata's `stateful` one."""

    keeps_state: bool = False
    """Whether an iterable dataset has a `state_dict` of its own."""

    augmented: bool = False
    """Whether reading a sample draws random numbers."""

    habit: str = "load"
    """`load`: only `load_state`. `set-epoch`: calls `set_epoch` before each epoch too. `recipe`: works out epoch and
    step, and calls `skip_first_batches` besides. `skip`: the same without `set_epoch`."""

    size: int = 14
    batch_size: int = 3

    @property
    def dispatched(self) -> bool:
        return self.reads.startswith("dispatched-")

    @property
    def iterable(self) -> bool:
        return self.reads.endswith("iterable")

    @property
    def num_workers(self) -> int:
        return int(self.workers[0])

    @property
    def persistent(self) -> bool:
        return self.workers.endswith("persistent")

    @property
    def endless(self) -> bool:
        return self.order == "endless"

    @property
    def counts_samples(self) -> bool:
        """Whether all batches but the last have one size, so that a position says how many samples were read."""
        return self.order != "buckets" and not (self.iterable and self.num_workers)

    @property
    def drawn_once(self) -> bool:
        """Whether each epoch has each sample once."""
        return not self.order.startswith(("weighted", "lazy", "endless"))

    def __str__(self) -> str:
        marks = ["state"] * self.keeps_state + ["augmented"] * self.augmented
        loader = [self.loader] * (self.loader != "torch")
        return "-".join([self.reads, self.order, *loader, *marks, f"w{self.workers}", f"r{self.ranks}", self.habit])


def grid() -> list[Cell]:
    """Return the full grid, without habits."""
    cells = [
        Cell(reads, order, workers, ranks)
        for reads, order, workers, ranks in product(("map", "dispatched-map"), MAP_ORDERS, WORKERS, (1, 2))
    ]
    cells += [
        Cell(reads, order, workers, ranks, keeps_state=keeps_state)
        for reads, order, workers, ranks, keeps_state in product(
            ("iterable", "dispatched-iterable"), STREAM_ORDERS, WORKERS, (1, 2), (False, True)
        )
    ]
    cells += [
        Cell(reads, order, workers, ranks, loader="stateful", keeps_state=reads.endswith("iterable"))
        for (reads, order), workers, ranks in product(
            [
                ("map", "plain"),
                ("map", "seedable"),
                ("map", "buckets"),
                ("dispatched-map", "plain"),
                ("iterable", "epoch"),
                ("dispatched-iterable", "epoch"),
            ],
            WORKERS,
            (1, 2),
        )
    ]
    cells += [
        Cell(reads, order, workers, ranks, augmented=True)
        for (reads, order), workers, ranks in product(
            [
                ("map", "plain"),
                ("map", "numpy"),
                ("map", "buckets"),
                ("dispatched-map", "plain"),
                ("iterable", "epoch"),
                ("dispatched-iterable", "epoch"),
                ("dispatched-iterable", "buffer"),
            ],
            WORKERS,
            (1, 2),
        )
    ]
    cells += [
        Cell(reads, "epoch", workers, ranks, loader="stateful", keeps_state=True, augmented=True)
        for reads, workers, ranks in product(("iterable", "dispatched-iterable"), WORKERS, (1, 2))
    ]
    return cells


def sample_of_grid() -> list[Cell]:
    """Return some twenty cells that between them have every value of every property, habits included."""
    return [
        Cell("map", "plain", "0", 1, habit="load"),
        Cell("map", "plain", "0", 2, habit="recipe"),
        Cell("map", "plain", "2-persistent", 1, augmented=True, habit="load"),
        Cell("map", "seedable", "2", 2, habit="skip"),
        Cell("map", "loader-generator", "0", 1, habit="recipe"),
        Cell("map", "weighted", "0", 2, habit="load"),
        Cell("map", "weighted-generator", "0", 1, habit="recipe"),
        Cell("map", "lazy", "0", 1, habit="load"),
        Cell("map", "numpy", "0", 2, augmented=True, habit="load"),
        Cell("map", "own-generator", "0", 1, habit="set-epoch"),
        Cell("map", "endless", "2", 1, habit="load"),
        Cell("map", "buckets", "0", 2, habit="recipe"),
        Cell("map", "plain", "2", 1, loader="stateful", habit="load"),
        Cell("iterable", "epoch", "2-persistent", 1, loader="stateful", keeps_state=True, habit="load"),
        Cell("dispatched-map", "plain", "0", 2, habit="load"),
        Cell("dispatched-map", "loader-generator", "0", 1, habit="load"),
        Cell("dispatched-map", "loader-generator", "0", 2, habit="recipe"),
        Cell("iterable", "epoch", "0", 2, habit="load"),
        Cell("iterable", "buffer", "0", 1, keeps_state=True, habit="recipe"),
        Cell("iterable", "epoch", "2", 1, loader="stateful", keeps_state=True, augmented=True, habit="recipe"),
        Cell("dispatched-iterable", "global", "0", 2, habit="recipe"),
        Cell("dispatched-iterable", "epoch-buffer", "2", 2, keeps_state=True, habit="load"),
    ]


def with_habits(cells: list[Cell]) -> list[Cell]:
    """Return each cell once for each habit that fits it."""
    return [replace(cell, habit=habit) for cell in cells for habit in HABITS]


@dataclass(frozen=True)
class Move:
    """A run that goes on with another number of ranks."""

    cell: Cell
    to: int

    def __str__(self) -> str:
        return f"{self.cell}-to-{self.to}"


def moves() -> list[Move]:
    """Return the grid of moves: 4 -> 1, 2, 3, 8 and 1 -> 4."""
    kinds = [Cell("map", order) for order in MAP_ORDERS if order != "endless"]
    kinds += [Cell("dispatched-map", "plain"), Cell("dispatched-map", "buckets")]
    kinds += [
        Cell(reads, order, keeps_state=keeps_state)
        for reads, order, keeps_state in product(("iterable", "dispatched-iterable"), STREAM_ORDERS, (False, True))
    ]
    kinds += [
        Cell("map", "plain", loader="stateful"),
        Cell("map", "plain", "2"),
        Cell("dispatched-iterable", "epoch", "2"),
    ]
    sized = [replace(kind, size=50, batch_size=2) for kind in kinds]
    return [
        Move(replace(kind, ranks=saved), to) for kind in sized for saved, to in [(4, 1), (4, 2), (4, 3), (4, 8), (1, 4)]
    ]


def sample_of_moves() -> list[Move]:
    """Return some moves, with each number of ranks and most kinds of order."""
    chosen = [
        ("map", "plain", 4, 3),
        ("map", "plain", 1, 4),
        ("map", "seedable", 4, 8),
        ("map", "weighted", 4, 2),
        ("map", "numpy", 4, 1),
        ("map", "buckets", 4, 3),
        ("dispatched-map", "plain", 4, 2),
        ("iterable", "epoch", 4, 3),
        ("dispatched-iterable", "buffer", 4, 2),
    ]
    return [Move(Cell(reads, order, ranks=saved, size=50, batch_size=2), to) for reads, order, saved, to in chosen]
