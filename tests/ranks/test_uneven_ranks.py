"""Ranks that run out of batches at different times: training joins them, and nothing waits for ever."""

from __future__ import annotations

import copy
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers load it: here, and not in each of the processes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator, PartialState, utils
from accelerate.data.agreement import AgreementError
from accelerate.session.uneven import UnevenStepError
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, GradScalerKwargs

from ..support.ranks import run_on_ranks

SECONDS = 30
"""What no test comes near, unless something hangs."""


def fresh(even: bool = False, **options: Any) -> Accelerator:
    """Return an Accelerator as the first of this process; the process group stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=even), **options)


def unit() -> nn.Linear:
    """Return y = w x with w = 1."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def numbers(count: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(torch.arange(1.0, count + 1)[:, None], **options)  # pyright: ignore[reportArgumentType]


def seconds(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


# Joining ---------------------------------------------------------------------------------------------------------------


Joined = tuple[float, list[list[float]]]
GRID = [(accumulation, precision) for accumulation in (1, 2, 3) for precision in ("no", "bf16", "fp16")]


def joined(count: int, accumulation: int, precision: str) -> Joined:
    accelerator = fresh(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[GradScalerKwargs(init_scale=4.0)],
    )
    model = unit()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), numbers(count))
    windows: list[list[float]] = []
    window: list[float] = []
    with accelerator.join_uneven_inputs([model]):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).sum())
                optimizer.step()
                optimizer.zero_grad()
            window.append(batch.item())
            if accelerator.sync_gradients:
                windows.append(window)
                window = []
    assert not window, "the end of the loader ends its window"
    return model.module.weight.item(), windows


def joined_each_way(count: int) -> list[Joined]:
    return [joined(count, accumulation, precision) for accumulation, precision in GRID]


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (7, 2), (1, 2), (4, 3), (5, 3)])
def test_joining_uses_each_sample_once(count: int, ranks: int) -> None:
    for (accumulation, precision), *results in zip(
        GRID, *run_on_ranks(joined_each_way, ranks, count, timeout=SECONDS), strict=True
    ):
        windows = [windows for _, windows in results]
        assert sorted(sample for rank in windows for window in rank for sample in window) == list(range(1, count + 1))
        # A window ends on all ranks where the first one has nothing more; ranks that are done add nothing to later ones.
        expected = 1.0
        for step in range(max(map(len, windows))):
            held = [rank[step] for rank in windows if step < len(rank)]
            assert len({len(window) for window in held}) == 1
            assert all(len(window) <= accumulation for window in held)
            expected -= sum(sum(window) / len(window) for window in held) / ranks
        rel = 1e-5 if precision == "no" else 1e-2
        assert [weight for weight, _ in results] == [pytest.approx(expected, rel=rel)] * ranks
        assert len({weight for weight, _ in results}) == 1


def stepping_together() -> list[Any]:
    accelerator = fresh(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=4.0, growth_interval=1)])
    model = unit()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, numbers(5))
    found = []
    for _ in range(3):
        with accelerator.join_uneven_inputs([model]):
            for batch in loader:
                accelerator.backward(model(batch).sum())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        (moments,) = optimizer.state.values()
        found.append(
            (
                model.module.weight.item(),
                {key: value.item() for key, value in moments.items()},
                scheduler.get_last_lr(),
                optimizer.param_groups[0]["lr"],
                accelerator.scaler.get_scale(),
            )
        )
    return found


def test_ranks_step_alike_after_joining() -> None:
    first, second = run_on_ranks(stepping_together, 2, timeout=SECONDS)
    assert first == second
    assert [state[1]["step"] for state in first] == [3.0, 6.0, 9.0]


# Training without joining ----------------------------------------------------------------------------------------------


def trains(count: int, accumulation: int) -> tuple[int, str]:
    accelerator = fresh(gradient_accumulation_steps=accumulation)
    model = nn.Sequential(unit(), nn.BatchNorm1d(1))  # whose buffers travel in forward
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), numbers(count, batch_size=2)
    )
    steps = 0
    try:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).sum())
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
    except UnevenStepError as error:
        return steps, str(error)
    return steps, "done"


@pytest.mark.parametrize(("ranks", "without"), [(2, "rank 1 has"), (3, "ranks 1, 2 have")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_backward_without_all_ranks_raises_at_once(ranks: int, without: str, accumulation: int) -> None:
    count = 4 * ranks + 2  # two full steps, then one batch for rank 0
    first, *others = run_on_ranks(trains, ranks, count, accumulation, timeout=SECONDS)
    steps, text = first
    assert steps == 2
    assert text.startswith(f"backward was called in a step in which {without} no batch (even_batches=False)")
    assert "join_uneven_inputs([model])" in text
    assert "even_batches=True" in text
    assert others == [(2, "done")] * (ranks - 1)


def test_training_goes_on_where_all_ranks_have_batches() -> None:
    assert run_on_ranks(trains, 2, 8, 1, timeout=SECONDS) == [(2, "done")] * 2


def goes_on_elsewhere(then: str) -> str:
    accelerator = fresh()
    model = unit()
    model, loader = accelerator.prepare(model, numbers(3))
    try:
        for batch in loader:
            accelerator.backward(model(batch).sum())
        if then == "gather":
            accelerator.gather(torch.ones(1))
        elif then == "epoch":
            for batch in loader:
                accelerator.backward(model(batch).sum())
    except RuntimeError as error:  # the rank that left finds that the other one has gone
        return type(error).__name__
    return "done"


@pytest.mark.parametrize(
    ("then", "other"), [("nothing", "done"), ("gather", "RuntimeError"), ("epoch", "RuntimeError")]
)
def test_a_rank_that_left_does_not_wait_for_one_that_raised(then: str, other: str) -> None:
    found: list[Any] = []
    took = seconds(lambda: found.extend(run_on_ranks(goes_on_elsewhere, 2, then, timeout=SECONDS)))
    assert found == ["UnevenStepError", other]
    assert took < 20


# Other collectives in such a step --------------------------------------------------------------------------------------


def take_turns(accelerator: Accelerator) -> None:
    with accelerator.main_process_first():
        pass


CALLS: dict[str, tuple[str, Callable[[Accelerator], Any]]] = {
    "gather": ("gather", lambda accelerator: accelerator.gather(torch.ones(1))),
    "reduce": ("reduce", lambda accelerator: accelerator.reduce(torch.ones(1))),
    "pad": ("pad_across_processes", lambda accelerator: accelerator.pad_across_processes(torch.ones(1))),
    "wait_for_everyone": ("barrier", lambda accelerator: accelerator.wait_for_everyone()),
    "check_trigger": ("reduce", lambda accelerator: accelerator.check_trigger()),
    "utils.gather": ("gather", lambda accelerator: utils.gather(torch.ones(1))),
    "utils.gather_object": ("all_gather_object", lambda accelerator: utils.gather_object([1])),
    "utils.broadcast": ("broadcast", lambda accelerator: utils.broadcast(torch.ones(1))),
    "utils.broadcast_object_list": ("broadcast_object", lambda accelerator: utils.broadcast_object_list([1])),
    "PartialState": ("barrier", lambda accelerator: PartialState().wait_for_everyone()),
    "main_process_first": ("barrier", lambda accelerator: take_turns(accelerator)),
    "save_model": ("all_gather_object", lambda accelerator: accelerator.save_model(unit(), tempfile.mkdtemp())),
    "save_state": ("broadcast_object", lambda accelerator: accelerator.save_state(tempfile.mkdtemp())),
    "prepare": ("prepare", lambda accelerator: accelerator.prepare(unit())),
}
SAVES = {"save_model", "save_state"}
"""What is left out in a step with all ranks, which write to a folder of each here."""


def collective(join: bool) -> dict[str, tuple[list[str], list[float]]]:
    found = {}
    for name, (_, call) in CALLS.items():
        accelerator = fresh()
        model = unit()
        model, loader = accelerator.prepare(model, numbers(5, batch_size=2))
        said = []
        with accelerator.join_uneven_inputs([model]) if join else nullcontext():
            for step, batch in enumerate(loader):
                if join:
                    accelerator.backward(model(batch).sum())
                try:
                    if step or name not in SAVES:
                        call(accelerator)
                    said.append("done")
                except UnevenStepError as error:
                    said.append(str(error))
        # After the loop all ranks come together again, and meet in the same operation.
        found[name] = said, accelerator.gather(torch.tensor([float(accelerator.process_index)])).tolist()
    return found


@pytest.mark.parametrize("join", [False, True])
def test_collectives_without_all_ranks_raise_at_once(join: bool) -> None:
    first, second = run_on_ranks(collective, 2, join, timeout=SECONDS)
    assert list(first) == list(CALLS)
    for name, (said, gathered) in first.items():
        assert said[0] == "done"
        assert said[1].startswith(f"{CALLS[name][0]} was called in a step in which rank 1 has no batch")
        assert "join_uneven_inputs" not in said[1], "it would not help"
        assert second[name] == (["done"], gathered)
        assert gathered == [0.0, 1.0]


def no_guard() -> tuple[bool, bool]:
    accelerator = fresh(even=True)
    talk = accelerator.state._runtime.collectives
    accelerator.prepare(numbers(5, batch_size=2), unit())
    before = talk.guard is None
    fresh().prepare(numbers(5, batch_size=2))
    return before, talk.guard is None


def test_runs_without_uneven_loaders_are_not_asked() -> None:
    assert run_on_ranks(no_guard, 2, timeout=SECONDS) == [(True, False)] * 2


def evaluates_inside(join: bool, shuffle: bool) -> tuple[list[int], str, float]:
    accelerator = fresh()
    model = unit()
    model, training, evaluation = accelerator.prepare(
        model, numbers(5, batch_size=2), numbers(8, batch_size=2, shuffle=shuffle)
    )
    seen, said = [], ""
    with accelerator.join_uneven_inputs([model]) if join else nullcontext():
        for batch in training:
            if join:
                accelerator.backward(model(batch).sum())
            try:
                seen.append(sum(len(accelerator.gather_for_metrics(some)) for some in evaluation))
            except UnevenStepError as error:
                said = str(error)
    return seen, said, accelerator.gather(torch.ones(1)).sum().item()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("join", [False, True])
def test_evaluation_inside_a_step_without_all_ranks_raises_at_once(join: bool, shuffle: bool) -> None:
    first, second = run_on_ranks(evaluates_inside, 2, join, shuffle, timeout=SECONDS)
    operation = "broadcast_object" if shuffle else "gather_for_metrics"  # the order is rank 0's
    assert first[1].startswith(f"{operation} was called in a step in which rank 1 has no batch")
    assert (first[0], first[2]) == ([8], 2.0)
    assert second == ([8], "", 2.0)


def zips_uneven_loaders() -> list[Any]:
    accelerator = fresh()
    loaders = accelerator.prepare(numbers(5, batch_size=2), numbers(6, batch_size=2))
    return [
        accelerator.gather_for_metrics(batches[0], dataloader=loaders[0]).flatten().tolist()
        for batches in zip(*loaders, strict=False)
    ]


def test_loops_side_by_side_that_the_same_rank_has_left_go_on() -> None:
    first, second = run_on_ranks(zips_uneven_loaders, 2, timeout=SECONDS)
    assert first == [[1.0, 2.0, 3.0, 4.0], [5.0]]
    assert second == [[1.0, 2.0, 3.0, 4.0]]


# Evaluation ------------------------------------------------------------------------------------------------------------


def evaluates(graph: bool) -> list[tuple[list[float], float]]:
    found = []
    for count in (1, 2, 3, 5):
        accelerator = fresh()
        model = nn.Sequential(unit(), nn.BatchNorm1d(1, affine=False))  # whose buffers travel in forward
        model, optimizer, loader, training = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.0), numbers(count), numbers(4, batch_size=2)
        )
        seen: list[float] = []
        for _ in range(2):
            model.train()
            for batch in training:
                accelerator.backward(model(batch).sum())
                optimizer.step()
            model.eval()
            with torch.set_grad_enabled(graph):
                for batch in loader:
                    seen += accelerator.gather_for_metrics(model(batch)[:, 0] * 0 + batch[:, 0]).tolist()
        found.append((seen, accelerator.gather(torch.ones(1)).sum().item()))
    return found


@pytest.mark.parametrize("graph", [False, True])
def test_evaluation_goes_on_without_all_ranks(graph: bool) -> None:
    first, second = run_on_ranks(evaluates, 2, graph, timeout=SECONDS)
    for count, (seen, ranks), (_, same) in zip((1, 2, 3, 5), first, second, strict=True):
        assert seen == [float(sample) for sample in range(1, count + 1)] * 2
        assert ranks == same == 2.0


def copied() -> tuple[float, float, float]:
    accelerator = fresh()
    model, loader = accelerator.prepare(unit(), numbers(3))
    for batch in loader:
        with torch.no_grad():
            model(batch)
    other = copy.deepcopy(model)
    nn.init.constant_(other.module.weight, 5.0)
    again = pickle.loads(pickle.dumps(other))
    nn.init.constant_(again.module.weight, 7.0)
    return tuple(each(torch.ones(1, 1)).item() for each in (model, other, again))  # pyright: ignore[reportReturnType]


def test_copies_of_a_model_compute_with_their_own_weights() -> None:
    assert run_on_ranks(copied, 2, timeout=SECONDS) == [(1.0, 5.0, 7.0)] * 2


# Loaders that end by agreement -----------------------------------------------------------------------------------------


class Shards(IterableDataset[torch.Tensor]):
    def __init__(self, shards: list[list[float]]) -> None:
        self.shards = shards
        self.num_shards = len(shards)

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.shards[index::num_shards])

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        for shard in self.shards if info is None else self.shards[info.id :: info.num_workers]:
            yield from (torch.tensor([sample]) for sample in shard)


RAGGED = [[1.0], [2.0, 3.0, 4.0, 5.0], [6.0, 7.0], [8.0, 9.0, 10.0, 11.0, 12.0], [], [13.0, 14.0, 15.0]]


def by_agreement(workers: int) -> tuple[list[float], int]:
    accelerator = fresh(even=True)
    model = unit()
    model, loader = accelerator.prepare(model, DataLoader(Shards(RAGGED), batch_size=2, num_workers=workers))
    seen, steps = [], 0
    for _ in range(2):
        for batch in loader:
            accelerator.backward(model(batch).sum())  # in every step with all ranks
            assert batch.shape == accelerator.gather(batch)[:2].shape
            seen += accelerator.gather_for_metrics(batch)[:, 0].tolist()
            steps += 1
    return seen, steps


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_prepared_shards_train_and_measure_each_sample_once(ranks: int, workers: int) -> None:
    results = run_on_ranks(by_agreement, ranks, workers, timeout=SECONDS)
    assert all(result == results[0] for result in results)
    seen, steps = results[0]
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:]) == [float(sample) for sample in range(1, 16)]
    assert steps % 2 == 0


def leaves_alone(then: str) -> str:
    accelerator = fresh(even=True)
    loader = accelerator.prepare(DataLoader(Shards([[1.0, 2.0, 3.0, 4.0]] * 2), batch_size=1))
    with pytest.raises(AgreementError) as caught:
        for place, _ in enumerate(loader):
            if place == 1 and accelerator.process_index == 1:
                break
        if then == "epoch":
            list(loader)
        else:
            accelerator.wait_for_everyone()
    return str(caught.value)


@pytest.mark.parametrize("then", ["epoch", "barrier"])
def test_a_rank_that_leaves_a_loop_alone_is_found_out(then: str) -> None:
    first, second = run_on_ranks(leaves_alone, 2, then, timeout=SECONDS)
    assert first == second
    assert first.startswith("Rank 1 left the loop over a loader at another step than the others")
