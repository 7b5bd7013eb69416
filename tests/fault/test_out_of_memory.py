"""One rank alone runs out of memory while the others wait for it in a collective: nobody hangs, all go on together.

Real gloo ranks with DDP. The error is a real one: more memory is asked for than any machine has.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP needs it; imported once here, and shared by all ranks
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.runtime import attempts
from accelerate.topology import connect
from accelerate.utils import find_executable_batch_size
from tests.support.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""What a run may take on a busy machine. The group would wait for half an hour."""


def run_out() -> None:
    torch.empty(2**50)


class Greedy(nn.Module):
    """Three layers; runs out of memory on chosen ranks, at one step, in forward or in the middle of backward."""

    def __init__(self, where: str, at_step: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.where, self.left = where, at_step
        self.layers[1].weight.register_hook(lambda gradient: self.at("backward"))

    def at(self, place: str) -> None:
        if self.left == 0 and place == self.where:
            run_out()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.at("forward")
        for layer in self.layers:
            inputs = layer(inputs)
        self.left = None if self.left is None else self.left - (self.where == "forward")
        return inputs


def steps(batch_size: int, count: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(batch_size * count * 4, 64)), batch_size=batch_size)


def learn(accelerator: Accelerator, batch_size: int, model: nn.Module) -> float:
    """Train some steps; returns the sum of a weight, equal on all ranks."""
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), steps(batch_size)
    )
    for (inputs,) in loader:
        accelerator.backward(model(inputs).mean())
        optimizer.step()
        optimizer.zero_grad()
    return next(model.parameters()).sum().item()


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("accelerate.runtime.memory")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# One rank alone -------------------------------------------------------------------------------------------------------


def train(unlucky: list[int], where: str, at_step: int, told: bool) -> tuple[list[int], Any, list[str]]:
    accelerator = Accelerator()
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=32, accelerator=accelerator if told else None)
    def run(batch_size: int) -> Any:
        tried.append(batch_size)
        fails = batch_size > 26 and accelerator.process_index in unlucky
        return batch_size, learn(accelerator, batch_size, Greedy(where, at_step if fails else None))

    with logged() as lines:
        size, weight = run()
    # The accelerator from outside still talks, and trains.
    gathered = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
    assert gathered == list(range(accelerator.num_processes))
    accelerator.wait_for_everyone()
    weights = accelerator.gather(torch.tensor([weight, learn(accelerator, 2, nn.Linear(64, 1))])).view(-1, 2)
    assert (weights == weights[0]).all()
    return tried, size, lines


@pytest.mark.parametrize(
    ("ranks", "unlucky", "where", "at_step", "told"),
    [
        (2, [1], "forward", 0, True),
        (2, [1], "forward", 3, False),
        (2, [0], "backward", 0, True),
        (4, [1], "forward", 2, True),
        (4, [3], "backward", 0, False),
        (4, [0, 2], "backward", 0, True),
        (3, [0, 1, 2], "forward", 1, True),
    ],
)
def test_all_ranks_go_on_with_one_size(ranks: int, unlucky: list[int], where: str, at_step: int, told: bool) -> None:
    results = run_on_ranks(train, ranks, unlucky, where, at_step, told, timeout=SECONDS)
    names = ", ".join(map(str, unlucky))
    for rank, (tried, size, lines) in enumerate(results):
        assert tried == [32, 28, 25]
        assert size == 25
        expected = [
            f"batch size 32 ran out of memory on process {names} (",
            f"size 28 ran out of memory on process {names} (",
        ]
        assert len(lines) == (2 if rank == 0 else 0), "the main process tells, the others do not"
        assert all(part in line for part, line in zip(expected, lines, strict=False))
        assert all("can't allocate memory" in line for line in lines)
        assert not lines or [line[-15:] for line in lines] == ["The next is 28.", "The next is 25."]


def in_a_subgroup() -> list[int]:
    accelerator = Accelerator()
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=2, reduce_batch_size_fn=lambda: 1)
    def run(batch_size: int) -> None:
        tried.append(batch_size)
        pair = dist.new_group([0, 1])
        if batch_size == 2 and accelerator.process_index == 0:
            run_out()
        if accelerator.process_index < 2:
            dist.all_reduce(torch.ones(1), group=pair)
        dist.barrier()

    run()
    return tried


def test_ranks_inside_a_group_of_their_own_are_released() -> None:
    assert run_on_ranks(in_a_subgroup, 3) == [[2, 1]] * 3


def done_before() -> tuple[list[int], list[float], int]:
    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    tried: list[int] = []
    drawn: list[float] = []

    @find_executable_batch_size(starting_batch_size=2, reduce_batch_size_fn=lambda: 1)
    def run(batch_size: int) -> int:
        tried.append(batch_size)
        drawn.append(torch.rand(()).item())
        if batch_size == 2 and accelerator.process_index == 1:
            time.sleep(0.5)
            run_out()
        return batch_size

    return tried, drawn, run()


def test_a_rank_that_had_finished_runs_again() -> None:
    for tried, drawn, size in run_on_ranks(done_before, 2):
        assert (tried, size) == ([2, 1], 1)
        assert drawn[0] == drawn[1], "an attempt that failed leaves no trace in the random states"


# Agreement ----------------------------------------------------------------------------------------------------------


def proposals() -> tuple[list[int], list[int]]:
    accelerator = Accelerator()
    rank = accelerator.process_index
    together: list[int] = []
    alone: list[int] = []

    @find_executable_batch_size(starting_batch_size=64 - rank, reduce_batch_size_fn=lambda: 20 + rank)
    def run(batch_size: int) -> None:
        together.append(batch_size)
        if batch_size > 20:
            run_out()

    @find_executable_batch_size(starting_batch_size=10, agree=False)
    def by_itself(batch_size: int) -> None:
        alone.append(batch_size)
        if rank == 1 and batch_size > 8:
            run_out()

    run()
    by_itself()
    return together, alone


def test_the_smallest_proposal_counts_unless_each_decides_by_itself() -> None:
    assert run_on_ranks(proposals, 3) == [([62, 20], [10]), ([62, 20], [10, 9, 8]), ([62, 20], [10])]


def nothing_fits() -> str:
    accelerator = Accelerator()

    @find_executable_batch_size(starting_batch_size=2)
    def run(batch_size: int) -> None:
        if accelerator.process_index == 1:
            run_out()
        accelerator.wait_for_everyone()

    with pytest.raises(RuntimeError) as caught:
        run()
    accelerator.wait_for_everyone()
    return str(caught.value)


def test_nothing_fits_on_one_rank() -> None:
    assert run_on_ranks(nothing_fits, 2) == ["No executable batch size found, reached zero."] * 2


def another_error(where: str) -> str:
    accelerator = Accelerator()

    def propose() -> int:
        if where == "proposal" and accelerator.process_index == 1:
            raise KeyError("boom")
        return 1

    @find_executable_batch_size(starting_batch_size=2, reduce_batch_size_fn=propose)
    def run(batch_size: int) -> None:
        if where == "proposal":
            run_out()
        if accelerator.process_index == 1:
            raise KeyError("boom")

    with pytest.raises((KeyError, RuntimeError)) as caught:
        run()
    return repr(caught.value)


@pytest.mark.parametrize("where", ["function", "proposal"])
def test_an_error_of_one_rank_is_told_to_the_others(where: str) -> None:
    first, second = run_on_ranks(another_error, 2, where)
    assert second == "KeyError('boom')"
    assert "RankFailed" in first
    assert "process 1 failed with KeyError: 'boom'" in first


def lost_connection(dies: int) -> str:
    accelerator = Accelerator()

    @find_executable_batch_size(starting_batch_size=2)
    def run(batch_size: int) -> None:
        if accelerator.process_index == dies:
            os._exit(0)
        accelerator.wait_for_everyone()

    with pytest.raises(RuntimeError) as caught:
        run()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("dies", [0, 1])  # rank 0 keeps the store
def test_a_rank_that_dies_is_not_taken_for_one_that_ran_out(dies: int) -> None:
    text = run_on_ranks(lost_connection, 2, dies)[1 - dies]
    assert "onnection" in text
    assert not text.startswith(("RankFailed", "DistNetworkError")), "the rank's own error, not that of the store"


def one_rank_calls() -> str:
    accelerator = Accelerator()
    if accelerator.process_index == 1:
        return ""
    connect.group_timeout = lambda: timedelta(seconds=0.3)

    @find_executable_batch_size
    def run(batch_size: int) -> int:
        return batch_size

    with pytest.raises(RuntimeError) as caught:
        run()
    return str(caught.value)


def test_a_call_on_some_ranks_only_ends_with_the_groups_timeout() -> None:
    text = run_on_ranks(one_rank_calls, 2)[0]
    assert "no word from process 1" in text
    assert "agree=False" in text


# Upward, and the global batch ---------------------------------------------------------------------------------------


def bisect(limits: list[int]) -> tuple[list[int], list[int], list[str]]:
    accelerator = Accelerator()
    limit = limits[accelerator.process_index]
    probed: list[int] = []
    ran: list[int] = []

    def two_steps(batch_size: int) -> None:
        probed.append(batch_size)
        learn(accelerator, 1, Greedy("forward", 1 if batch_size > limit else None))

    @find_executable_batch_size(starting_batch_size=128, probe=two_steps, accelerator=accelerator)
    def run(batch_size: int) -> None:
        ran.append(batch_size)
        learn(accelerator, 1, Greedy("forward", 1 if batch_size > limit else None))

    with logged() as lines:
        run()
    return probed, ran, lines


def test_the_search_goes_up_again_on_all_ranks() -> None:
    results = run_on_ranks(bisect, 2, [128, 100])
    for probed, ran, lines in results:
        assert probed == [128, 64, 96, 112, 104, 100]
        assert ran == [100]
    assert [line.split(" (")[0] for line in results[0][2]] == [
        f"two_steps: batch size {size} ran out of memory on process 1" for size in (128, 112, 104)
    ]


def kept() -> tuple[list[tuple[int, int]], int, int]:
    accelerator = Accelerator(gradient_accumulation_steps=3)
    tried: list[tuple[int, int]] = []
    updates = 0

    @find_executable_batch_size(starting_batch_size=16, accelerator=accelerator, keep_global_batch=True)
    def run(batch_size: int) -> None:
        nonlocal updates
        tried.append((batch_size, accelerator.gradient_accumulation_steps))
        updates = 0
        data = DataLoader(TensorDataset(torch.ones(192, 64)), batch_size=batch_size)
        model = Greedy("forward", 1 if batch_size > 6 and accelerator.process_index == 1 else None)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), data)
        for (inputs,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).mean())
                optimizer.step()
                optimizer.zero_grad()
                updates += accelerator.sync_gradients

    run()
    return tried, updates, accelerator.gradient_accumulation_steps


def test_the_global_batch_is_kept_by_accumulating_more() -> None:
    # 16 * 3 = 48 samples of each process in a step; 192 samples for 2 processes make 2 steps.
    assert run_on_ranks(kept, 2) == [([(16, 3), (12, 4), (8, 6), (6, 8)], 2, 3)] * 2


# Groups that cannot be broken off -----------------------------------------------------------------------------------


def unbreakable(where: str) -> tuple[list[int], str]:
    connect.can_break_off = lambda: False
    if where == "not counted":
        connect.collectives_begun = lambda: None
    attempts.UNBREAKABLE_PATIENCE_SECONDS = 1.0
    accelerator = Accelerator()
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=2, reduce_batch_size_fn=lambda: 1)
    def run(batch_size: int) -> None:
        tried.append(batch_size)
        accelerator.wait_for_everyone()
        if batch_size == 2 and (where in ("all", "not counted") or accelerator.process_index == 1):
            run_out()
        if where == "one waits":
            time.sleep(3)
        elif where == "one went on":
            dist.all_reduce(torch.ones(1), async_op=True)

    try:
        run()
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        return tried, str(error)
    return tried, ""


def test_without_breaking_off_ranks_that_ran_out_at_one_place_go_on() -> None:
    assert run_on_ranks(unbreakable, 2, "all") == [([2, 1], "")] * 2


@pytest.mark.parametrize("where", ["one waits", "one went on", "not counted"])
def test_without_breaking_off_ranks_that_cannot_go_on_say_so(where: str) -> None:
    for rank, (tried, text) in enumerate(run_on_ranks(unbreakable, 2, where)):
        assert tried == [2]
        told = "process 1 failed with no word from process 0" if (where, rank) == ("one waits", 0) else "can't allocate"
        assert told in text


def in_debug_mode() -> bool:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    Accelerator()
    return connect.can_break_off()


def test_groups_that_torch_wraps_for_debugging_cannot_be_broken_off() -> None:
    assert run_on_ranks(in_debug_mode, 2) == [False, False]


# The end of the process ---------------------------------------------------------------------------------------------


def test_processes_end_with_status_0_afterwards(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.fault.test_out_of_memory import train\n"
        "tried, size = train([1], 'backward', 0, False)[:2]\n"
        "os.write(1, f'{tried} {size}\\n'.encode())  # in one piece: both processes write to one pipe\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[32, 28, 25] 25") == 2
