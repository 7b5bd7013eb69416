"""The self test behind `accelerate test`, also a script of its own.

Checks on the user's own machine that processes meet, that data is shared out exactly once, and that training gives
what plain torch gives. Uses the public interface only, as a script of the user would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed

SAMPLES = 48
BATCH_SIZE = 4
STEPS = 6
EPOCHS = 2
LEARNING_RATE = 0.05
TOLERANCES = {"no": 1e-4, "bf16": 5e-2, "fp16": 5e-2, "fp8": 1.0}
"""How far weights may be from those of plain torch in fp32. Training moves them by 1.5."""


class SelfTestError(RuntimeError):
    """A check of the self test failed."""


def require(condition: object, what: str) -> None:
    """Raise unless `condition` holds."""
    if not condition:
        raise SelfTestError(f"The self test failed: {what}.")


def main() -> None:
    """Run all checks. Called on all ranks."""
    accelerator = Accelerator()
    accelerator.print(f"Processes: {accelerator.num_processes}, {accelerator.distributed_type} on {accelerator.device}")
    for check in CHECKS:
        check(accelerator)
        accelerator.wait_for_everyone()
        accelerator.print(f"  passed: {check.__name__.removeprefix('check_')}")
    accelerator.print(f"All {len(CHECKS)} checks passed on {accelerator.num_processes} process(es).")
    accelerator.end_training()


def check_state(accelerator: Accelerator) -> None:
    """Every process has a rank of its own, and exactly one is the main one."""
    ranks = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device))
    require(sorted(ranks.tolist()) == list(range(accelerator.num_processes)), f"the ranks are {ranks.tolist()}")
    mains = accelerator.gather(torch.tensor([int(accelerator.is_main_process)], device=accelerator.device))
    require(mains.sum() == 1, f"{int(mains.sum())} processes take themselves for the main one")


def check_collectives(accelerator: Accelerator) -> None:
    """What one process sends is what the others receive."""
    rank, count, device = (accelerator.process_index, accelerator.num_processes, accelerator.device)
    mine = torch.full((2,), float(rank), device=device)
    expected = torch.arange(count, device=device).repeat_interleave(2).float()
    require(torch.equal(accelerator.gather(mine), expected), "gather mixes up the ranks")
    require(
        torch.equal(accelerator.reduce(mine, "sum"), torch.full_like(mine, sum(range(count)))), "reduce sums wrongly"
    )
    require(torch.equal(broadcast(mine.clone(), 0), torch.zeros_like(mine)), "broadcast does not send rank 0's tensor")
    padded = accelerator.pad_across_processes(torch.ones(rank + 1, device=device))
    require(padded.shape == (count,) and padded.sum() == rank + 1, "pad_across_processes pads wrongly")


def check_processes(accelerator: Accelerator) -> None:
    """Work that is split between processes is done once."""
    with accelerator.split_between_processes(list(range(2 * accelerator.num_processes))) as share:
        values = accelerator.gather(torch.tensor(share, device=accelerator.device))
    require(values.tolist() == list(range(2 * accelerator.num_processes)), "split_between_processes loses work")


def check_loaders(accelerator: Accelerator) -> None:
    """A pass over a prepared loader shows every sample once, shuffled or not, even when shares are uneven."""
    for samples in (SAMPLES, SAMPLES - 5):
        for shuffle in (False, True):
            numbers = TensorDataset(torch.arange(samples))
            loader = accelerator.prepare(DataLoader(numbers, batch_size=BATCH_SIZE, shuffle=shuffle))
            seen = [number for (batch,) in loader for number in accelerator.gather_for_metrics(batch).tolist()]
            require(
                sorted(seen) == list(range(samples)),
                f"{samples} samples (shuffle={shuffle}) are seen as {sorted(seen)}",
            )


def _problem(samples: int) -> tuple[torch.nn.Module, TensorDataset]:
    set_seed(42)
    inputs = torch.randn(samples, 3)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1
    return torch.nn.Linear(3, 1), TensorDataset(inputs, targets)


def _train_plainly(samples: int, batch_size: int, skipped: Sequence[bool]) -> torch.Tensor:
    """Return the weights that plain torch gives, without the steps that were skipped."""
    model, data = _problem(samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    left_out = iter(skipped)
    for _ in range(EPOCHS):
        for inputs, targets in DataLoader(data, batch_size=batch_size):
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            if not next(left_out):
                optimizer.step()
            optimizer.zero_grad()
    return _flat(model)


def _train_prepared(accelerator: Accelerator, samples: int, batch_size: int) -> tuple[torch.Tensor, list[bool]]:
    """Return the weights, and which steps the scaler of fp16 left out to find its scale."""
    plain_model, data = _problem(samples)
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), lr=LEARNING_RATE)
    model, optimizer, loader = accelerator.prepare(
        plain_model, plain_optimizer, DataLoader(data, batch_size=batch_size)
    )
    skipped = []
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                if accelerator.sync_gradients:
                    skipped.append(optimizer.step_was_skipped)
                optimizer.zero_grad()
    found = _flat(accelerator.unwrap_model(model))
    accelerator.free_memory()
    return found, skipped


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])


def check_training(accelerator: Accelerator) -> None:
    """Training on all processes gives the weights that plain torch gives with the same batches."""
    _compare(accelerator, BATCH_SIZE)


def check_accumulation(accelerator: Accelerator) -> None:
    """Batches half as large, twice as many of them accumulated, give the same weights."""
    before = accelerator.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = 2 * before
    try:
        _compare(accelerator, BATCH_SIZE // 2)
    finally:
        accelerator.gradient_accumulation_steps = before


def _compare(accelerator: Accelerator, batch_size: int) -> None:
    # What one step of plain torch sees is what all processes see between two steps of the optimizer.
    seen_per_step = batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    samples = STEPS * seen_per_step
    found, skipped = _train_prepared(accelerator, samples, batch_size)
    require(not all(skipped), f"every step was left out in {accelerator.mixed_precision}: no scale was found")
    expected = _train_plainly(samples, seen_per_step, skipped)
    difference = float((found - expected).abs().max())
    tolerance = TOLERANCES[accelerator.mixed_precision]
    require(difference <= tolerance, f"weights differ from plain torch by {difference:g}, more than {tolerance:g}")
    alike = accelerator.gather(found.to(accelerator.device)).view(accelerator.num_processes, -1)
    require(torch.equal(alike, alike[:1].expand_as(alike)), "the processes ended with different weights")


CHECKS = (check_state, check_collectives, check_processes, check_loaders, check_training, check_accumulation)
"""What is checked, in this order; `accelerate test` runs these too."""


if __name__ == "__main__":
    main()
