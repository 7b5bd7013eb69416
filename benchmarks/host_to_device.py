"""Time a loop over a prepared loader on a GPU, with and without prefetching, beside the work alone and by hand.

    python benchmarks/host_to_device.py [--mebibytes 64] [--batches 40]

The work on each batch is made as long as a plain copy of it, which is where copying beside it gains most: at best the
loop takes half as long. Prints the median of the rounds for pageable and for pinned batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration


class Batches(Dataset):
    """Few large batches, made before, so that reading takes no time."""

    def __init__(self, count: int, mebibytes: int, pinned: bool) -> None:
        made = [torch.zeros(mebibytes * 2**18) for _ in range(4)]
        self.made, self.count = [batch.pin_memory() if pinned else batch for batch in made], count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.made[index % len(self.made)]


def milliseconds(batches: Iterable[torch.Tensor], work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    count = 0
    for _ in batches:
        work()
        count += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1000 / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=64, help="size of a batch")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    device = torch.device("cuda", torch.cuda.current_device())
    print("| batches  | copies alone | work alone | by hand | prefetch=False | prefetch=True |  (ms for each batch)")
    print("|----------|--------------|------------|---------|----------------|---------------|")
    for pinned in (False, True):
        data = Batches(options.batches, options.mebibytes, pinned)

        def by_hand(data: Batches = data) -> Iterable[torch.Tensor]:
            return (batch.to(device, non_blocking=True) for batch in DataLoader(data, batch_size=None))

        def prepared(prefetch: bool, data: Batches = data) -> Iterable[torch.Tensor]:
            configuration = DataLoaderConfiguration(prefetch=prefetch, non_blocking=True)
            return Accelerator(dataloader_config=configuration).prepare(DataLoader(data, batch_size=None))

        copying = statistics.median(milliseconds(by_hand(), lambda: None) for _ in range(3))
        side = 4096
        left = torch.zeros(side, side, device=device)
        once = statistics.median(milliseconds(range(20), lambda left=left: left @ left) for _ in range(3))
        times = max(1, round(copying / once))

        def work(left: torch.Tensor = left, times: int = times) -> None:
            for _ in range(times):
                left @ left

        forms: list[Callable[[], Iterable[torch.Tensor]]] = [
            lambda: range(options.batches),  # type: ignore[list-item, return-value]
            by_hand,
            lambda: prepared(False),
            lambda: prepared(True),
        ]
        rounds = [[milliseconds(form(), work) for form in forms] for _ in range(options.rounds)]
        alone, hand, without, with_it = map(statistics.median, zip(*rounds, strict=True))
        name = "pinned" if pinned else "pageable"
        print(f"| {name:8} | {copying:12.2f} | {alone:10.2f} | {hand:7.2f} | {without:14.2f} | {with_it:13.2f} |")


if __name__ == "__main__":
    main()
