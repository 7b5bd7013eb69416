"""On a GPU: placement, mixed precision with overflow, NCCL, random states and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradScalerKwargs,
    find_executable_batch_size,
    gather,
    gather_object,
    send_to_device,
    set_seed,
)

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def data(count: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 8, generator=generator), torch.arange(count) % 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


# Placement ------------------------------------------------------------------------------------------------------------


def test_models_and_batches_go_to_the_current_device() -> None:
    accelerator = Accelerator()
    assert accelerator.device == torch.device("cuda", torch.cuda.current_device())
    assert accelerator.distributed_type is DistributedType.NO
    model, loader = accelerator.prepare(network(), DataLoader(data(), batch_size=8))
    assert {parameter.device for parameter in model.parameters()} == {accelerator.device}
    for inputs, labels in loader:
        assert inputs.device == labels.device == accelerator.device
    assert accelerator.gather({"a": [inputs]})["a"][0] is inputs


def test_placement_can_be_left_to_the_script() -> None:
    accelerator = Accelerator(device_placement=False)
    model, loader = accelerator.prepare(network(), DataLoader(data(), batch_size=8))
    assert next(model.parameters()).device.type == "cpu"
    assert next(iter(loader))[0].device.type == "cpu"


def test_cpu_by_choice_and_too_late() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.device == torch.device("cpu")
    assert next(accelerator.prepare(network()).parameters()).device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    device = Accelerator().device
    with pytest.raises(ValueError, match=f"cpu=True contradicts {device}, on which this process"):
        Accelerator(cpu=True)


def test_optimizer_state_follows_the_model() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert {moment.device for moment in moments} == {accelerator.device}
    accelerator.backward(model(torch.ones(1, 8, device=accelerator.device)).sum())
    optimizer.step()


def test_pinned_batches_move_without_waiting_and_arrive_whole() -> None:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(non_blocking=True))
    loader = accelerator.prepare(DataLoader(data(), batch_size=8, pin_memory=True))
    batches = [inputs for inputs, _ in loader]
    assert {batch.device for batch in batches} == {accelerator.device}
    assert torch.equal(torch.cat(batches).cpu(), data().tensors[0])


def test_nested_data_is_sent() -> None:
    accelerator = Accelerator()
    sent = send_to_device({"x": [torch.ones(1)], "kept": torch.ones(1)}, accelerator.device, skip_keys="kept")
    assert sent["x"][0].is_cuda
    assert not sent["kept"].is_cuda


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_skips_the_step_and_the_schedule(fused: bool) -> None:
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    model = network().to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    inputs = torch.ones(4, 8, device=accelerator.device)

    def step(factor: float) -> None:
        accelerator.backward(model(inputs).sum() * factor)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    step(1.0)
    assert not accelerator.optimizer_step_was_skipped
    assert scheduler.get_last_lr() == [0.05]
    before = snapshot(model)
    step(float("inf"))
    assert accelerator.optimizer_step_was_skipped
    assert unchanged(model, before)
    assert scheduler.get_last_lr() == [0.05]
    assert accelerator.scaler is not None
    assert accelerator.scaler.get_scale() == 512.0
    step(1.0)
    assert not accelerator.optimizer_step_was_skipped
    assert not unchanged(model, before)
    assert scheduler.get_last_lr() == [0.025]


def test_overflow_of_one_optimizer_leaves_the_other_alone() -> None:
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    first, second = network(), network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    first, second, one, two = accelerator.prepare(first, second, *optimizers)
    before = snapshot(first), snapshot(second)
    inputs = torch.ones(4, 8, device=accelerator.device)
    accelerator.backward(first(inputs).sum() * float("inf"))
    accelerator.backward(second(inputs).sum())
    one.step()
    two.step()
    assert (one.step_was_skipped, two.step_was_skipped) == (True, False)
    assert unchanged(first, before[0])
    assert not unchanged(second, before[1])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forward_computes_in_half_and_returns_full_precision(precision: str, dtype: torch.dtype) -> None:
    accelerator = Accelerator(mixed_precision=precision)
    seen: list[torch.dtype] = []
    model = network()
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model = accelerator.prepare(model)
    assert model(torch.ones(1, 8, device=accelerator.device)).dtype is torch.float32
    assert seen == [dtype]
    assert next(model.parameters()).dtype is torch.float32
    assert (accelerator.scaler is not None) is (precision == "fp16")
    with accelerator.autocast():
        assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).dtype is dtype


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("steps", [1, 4])
def test_losses_equal_a_plain_loop(precision: str, steps: int) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model = network().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        loader = DataLoader(data(48), batch_size=8)
        losses = []
        for _ in range(2):
            for number, (inputs, labels) in enumerate(loader, start=1):
                with torch.autocast("cuda", dtype, enabled=dtype is not None):
                    scores = model(inputs.cuda())
                loss = nn.functional.cross_entropy(scores.float(), labels.cuda())
                losses.append(loss.detach())
                window = min(steps, len(loader) - (number - 1) // steps * steps)  # the last one is short
                scaler.scale(loss / window).backward()
                if number % steps == 0 or number == len(loader):
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        return losses, snapshot(model)

    def with_accelerator() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=steps)
        model = network()
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DataLoader(data(48), batch_size=8)
        )
        losses = []
        for _ in range(2):
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    losses.append(loss.detach())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        return losses, snapshot(model)

    for ours, reference in zip(with_accelerator(), by_hand(), strict=True):
        assert len(ours) == len(reference)
        assert all(torch.equal(one, other) for one, other in zip(ours, reference, strict=True))


# Processes ------------------------------------------------------------------------------------------------------------


def on_nccl() -> None:
    """Run by torchrun, on each rank."""
    accelerator = Accelerator()
    local_rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    assert accelerator.device == torch.device("cuda", local_rank)
    assert accelerator.state.backend == "nccl"
    assert accelerator.distributed_type is DistributedType.MULTI_GPU
    rank = torch.tensor([float(accelerator.process_index)], device=accelerator.device)
    # The operations themselves, which one process would not need.
    talk = accelerator.state._runtime.collectives
    assert talk.all_gather(rank).tolist() == [float(other) for other in range(size)]
    assert talk.all_gather(rank.bfloat16()).dtype is torch.bfloat16
    assert talk.all_reduce(torch.ones_like(rank)).item() == size
    assert talk.broadcast(rank.clone(), size - 1).item() == size - 1
    received = talk.scatter(torch.empty_like(rank), [rank + other for other in range(size)] if not rank else None)
    assert received.item() == accelerator.process_index
    assert talk.all_gather(rank.cpu()).tolist() == [float(other) for other in range(size)], "tensors on the CPU travel"
    assert talk.all_gather_object({"rank": local_rank})[-1] == {"rank": size - 1}
    assert talk.broadcast_object("text") == "text"
    accelerator.wait_for_everyone()
    # Training.
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data(), batch_size=8)
    )
    assert accelerator.multi_device is (size > 1)
    seen: list[int] = []
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen += accelerator.gather_for_metrics(labels).tolist()
    assert seen == data().tensors[1].tolist()
    weights = [value.cpu() for value in accelerator.get_state_dict(model).values()]
    for theirs in gather_object([weights]):
        assert all(torch.equal(one, other) for one, other in zip(theirs, weights, strict=True))
    assert gather(torch.tensor(1, device=accelerator.device)).sum() == size
    accelerator.end_training()


def under_torchrun(processes: int) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.accelerator.test_cuda import on_nccl; on_nccl()"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        + ["--no_python", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nccl_with_one_process() -> None:
    under_torchrun(1)


@pytest.mark.multi_gpu
def test_nccl_with_two_processes() -> None:
    under_torchrun(2)


# Random states and memory ---------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_devices_random_state(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    set_seed(3)
    torch.rand(7, device=accelerator.device)
    accelerator.save_state(tmp_path / "state")
    drawn = torch.rand(5, device=accelerator.device)
    before = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.rand(3, device=accelerator.device)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(torch.rand(5, device=accelerator.device), drawn)
    assert unchanged(model, before)
    assert next(model.parameters()).device == accelerator.device


def test_a_background_save_copies_each_tensor_once_to_pinned_memory(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = snapshot(model), [state["exp_avg"].clone() for state in optimizer.state.values()]

    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    rooms = accelerator._session.saving.memory._rooms
    pinned = {name for (file, name), room in rooms.items() if file == "optimizer.safetensors" and room.is_pinned()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())):
            tensor.zero_()
    assert handle.wait() == tmp_path / "c"
    accelerator.load_state(tmp_path / "c")

    assert len([name for name in pinned if "exp_avg" in name]) == 2 * len(before[0])
    assert unchanged(model, before[0])
    now = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(one, other) for one, other in zip(now, before[1], strict=True))


def test_seed_reaches_the_device() -> None:
    accelerator = Accelerator()
    set_seed(5)
    first = torch.rand(3, device=accelerator.device)
    set_seed(5)
    assert torch.equal(torch.rand(3, device=accelerator.device), first)


def test_freeing_gives_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(2048, 2048))
    assert torch.cuda.memory_reserved() > before
    del model
    accelerator.free_memory()
    assert torch.cuda.memory_reserved() <= before


def test_largest_batch_that_fits_is_found() -> None:
    Accelerator()
    free, _ = torch.cuda.mem_get_info()
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=16, reduce_batch_size_fn=lambda: tried[-1] // 2)
    def run(batch_size: int) -> Any:
        tried.append(batch_size)
        torch.empty(free // 6 * batch_size, dtype=torch.uint8, device="cuda")
        return batch_size

    assert run() == 4
    assert tried == [16, 8, 4]


def test_nothing_is_left_for_the_next_run() -> None:
    with Accelerator(mixed_precision="fp16") as accelerator:
        accelerator.prepare(network())
    assert AcceleratorState._shared_state == {}
    assert GradientState._shared_state == {}
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
