"""Do again what `observed.json` recorded, on this rank.

Owns one function for each row or family of rows. Uses nothing but the public interface, so that the same code runs over
any implementation of it.
"""

from __future__ import annotations

import gc
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FP8RecipeKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    PrecisionType,
    ProfileKwargs,
    TorchDynamoPlugin,
    broadcast,
    broadcast_object_list,
    concatenate,
    find_batch_size,
    find_executable_batch_size,
    gather_object,
    is_compiled_module,
    listify,
    patch_environment,
    release_memory,
    slice_tensors,
    str_to_bool,
)
from accelerate.utils.memory import should_reduce_batch_size


class Raised(tuple[str, ...]):
    """The names of an exception's class and its bases, in place of a value."""


def outcome(call: Callable[[], Any]) -> Any:
    """Return what the call returns, or what it raises."""
    try:
        return call()
    except Exception as error:
        return Raised(kind.__name__ for kind in type(error).__mro__)


def fresh(**options: Any) -> Accelerator:
    """Return an Accelerator as the first of this process; the process group stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


@contextmanager
def environment(**variables: str) -> Any:
    """Set variables for the body, and set the process up anew inside it."""
    with patch_environment(**variables):
        AcceleratorState._reset_state(True)
        yield
    AcceleratorState._reset_state(True)


def of_first(value: Any) -> Any:
    """Return what rank 0 has, for rows that recorded only that."""
    return broadcast_object_list([value])[0]


def ones(*inputs: float) -> torch.Tensor:
    return torch.tensor([list(inputs)])


def unit() -> nn.Linear:
    """Return y = w x with w = 1."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def gradient(model: nn.Module) -> float | None:
    parameter = next(model.parameters())
    return None if parameter.grad is None else parameter.grad.item()


def numbers(count: int, batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(torch.arange(1.0, count + 1)[:, None], batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def by_hundredths(optimizer: Any) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / 100)


# Accumulation ---------------------------------------------------------------------------------------------------------


def windows(n: int, steps: int, prepared: bool = True, **options: bool) -> dict[str, list[Any]]:
    plugin = GradientAccumulationPlugin(num_steps=steps, **options)
    accelerator = fresh(gradient_accumulation_plugin=plugin)
    model = unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, by_hundredths(optimizer))
    loader = numbers(n * accelerator.num_processes)
    if prepared:
        loader = accelerator.prepare(loader)
    sync: list[Any] = []
    epochs: list[Any] = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).sum())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            sync.append(int(accelerator.sync_gradients))
            epochs.append(scheduler.scheduler.last_epoch)
        sync.append("|")
        epochs.append("|")
    return {"sync": sync, "sched_last_epoch": epochs}


def gradients(steps: int, **options: bool) -> list[float | None]:
    accelerator = fresh(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, **options))
    model = unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, numbers(8 * accelerator.num_processes))
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            seen.append(gradient(model))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def rates(split: int, with_optimizer: int, adjust: int, steps: int) -> list[float]:
    accelerator = fresh(
        step_scheduler_with_optimizer=bool(with_optimizer),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, adjust_scheduler=bool(adjust)),
        dataloader_config=DataLoaderConfiguration(split_batches=bool(split)),
    )
    size = accelerator.num_processes
    model = unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, by_hundredths(optimizer), numbers(6 * size, batch_size=size if split else 1)
    )
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            optimizer.step()
            with warnings.catch_warnings():
                if not with_optimizer:  # torch warns of a scheduler that runs ahead, which is what is asked for
                    warnings.simplefilter("ignore")
                scheduler.step()
            optimizer.zero_grad()
        seen.append(round(scheduler.get_last_lr()[0], 4))
    return seen


def one_cycle() -> list[float]:
    accelerator = fresh()
    model = unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    seen = []
    for _ in range(6):
        accelerator.backward(model(ones(1.0)).sum())
        optimizer.step()
        scheduler.step()
        seen.append(round(scheduler.get_last_lr()[0], 4))
    return seen


def step_counts(adjust: bool) -> list[int]:
    plugin = GradientAccumulationPlugin(num_steps=2, adjust_scheduler=adjust)
    accelerator = fresh(gradient_accumulation_plugin=plugin)
    model = unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, by_hundredths(optimizer))
    seen = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(ones(1.0)).sum())
            optimizer.step()
            scheduler.step()
        seen.append(scheduler.scheduler._step_count)
    return seen


def local_and_synchronised() -> dict[str, Any]:
    accelerator = fresh()
    model = accelerator.prepare(unit())
    value = ones(accelerator.process_index + 1.0)
    with accelerator.no_sync(model):
        accelerator.backward(model(value).sum())
    found = {"grad after no_sync": gradient(model)}
    accelerator.backward(model(value).sum())
    found["grad after sync step"] = gradient(model)

    accelerator = fresh(gradient_accumulation_steps=2)
    model = accelerator.prepare(unit())
    with accelerator.no_sync(model):
        loss = model(value).sum()
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    found["trigger_sync_in_backward (accum 2)"] = gradient(model)
    return found


def triggers() -> list[bool]:
    accelerator = fresh()
    seen = [accelerator.check_trigger()]
    if accelerator.is_last_process:
        accelerator.set_trigger()
    return [*seen, accelerator.check_trigger(), accelerator.check_trigger()]


def clipping() -> list[list[Any]]:
    accelerator = fresh(gradient_accumulation_steps=2)
    model = unit()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    seen = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(ones(4.0)).sum())
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            after = round(gradient(model) or 0.0, 4)
            seen.append([round(norm.item(), 4), after, accelerator.sync_gradients])
            optimizer.step()
            optimizer.zero_grad()
    return seen


def steps_setter() -> list[Any]:
    accelerator = fresh()
    accelerator.gradient_accumulation_steps = 3
    state = accelerator.gradient_state
    return [accelerator.gradient_accumulation_steps, state.num_steps, dict(state.plugin_kwargs)]


def two_models() -> list[bool]:
    accelerator = fresh(gradient_accumulation_steps=3)
    first, second = accelerator.prepare(unit(), unit())
    seen = []
    for _ in range(3):
        with accelerator.accumulate(first, second):
            accelerator.backward((first(ones(1.0)) + second(ones(1.0))).sum())
        seen.append(accelerator.sync_gradients)
    return seen


def uneven() -> dict[str, Any]:
    accelerator = fresh()
    model, loader = accelerator.prepare(unit(), numbers(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with accelerator.join_uneven_inputs([model], even_batches=False):
            inside = [list(batch.shape) for batch in loader]
    return {"join even_batches=False, 3 samples": inside, "after join": len(list(loader))}


def accumulation() -> dict[str, Any]:
    """Return this rank's rows of `accumulation_scheduler_sync`."""
    found: dict[str, Any] = {}
    for n, steps in ((5, 2), (6, 3), (7, 3), (3, 4), (4, 1)):
        found[f"accum n={n} steps={steps}"] = windows(n, steps)
    for name, value in (("sync_with_dataloader", False), ("sync_each_batch", True), ("adjust_scheduler", False)):
        found[f"accum n=5 steps=2 {name}={value}"] = windows(5, 2, **{name: value})
    found["accum n=5 steps=2 dataloader not prepared"] = windows(5, 2, prepared=False)
    found["grads steps=2"] = gradients(2)
    found["grads steps=2 sync_each"] = gradients(2, sync_each_batch=True)
    found["grads steps=1"] = gradients(1)
    for split, with_optimizer, adjust, steps in itertools.product((0, 1), (1, 0), (1, 0), (1, 2)):
        name = f"lr split={split} step_with_opt={with_optimizer} adjust={adjust} accum={steps}"
        found[name] = rates(split, with_optimizer, adjust, steps)
    found["onecycle total_steps=4"] = one_cycle()
    found.update(local_and_synchronised())
    found["trigger"] = triggers()
    found["clip_grad_norm accum=2"] = clipping()
    found["ga_setter"] = steps_setter()
    found["two models accumulate"] = two_models()
    found.update(uneven())
    return found


# The Accelerator ------------------------------------------------------------------------------------------------------


def preparing() -> dict[str, Any]:
    accelerator = fresh()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, wrapped, scheduler = accelerator.prepare(model, optimizer, by_hundredths(optimizer))
    found: dict[str, Any] = {
        "types": {
            "prepared model": type(prepared).__name__,
            "acc._models[0]": type(accelerator._models[0]).__name__,
            "optimizer": type(wrapped).__name__,
            "optimizer is torch Optimizer": isinstance(wrapped, torch.optim.Optimizer),
            "unwrap": type(accelerator.unwrap_model(prepared)).__name__,
            "_optimizers": len(accelerator._optimizers),
            "scheduler": type(scheduler).__name__,
            "scheduler is LRScheduler": isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler),
        },
        "scheduler optimizers wrapper": type(scheduler.optimizers[0]).__name__,
    }
    other = object()
    found["prepare passthrough"] = accelerator.prepare(other, "text")[0] is other
    second = accelerator.prepare(nn.Linear(1, 1))
    found["prepare single returns object"] = isinstance(second, nn.Module)
    found["prepare() empty"] = outcome(lambda: accelerator.prepare())
    found["prepare list arg"] = repr(type(accelerator.prepare([nn.Linear(1, 1)])[0]).__name__)
    found["device_placement wrong len"] = outcome(
        lambda: accelerator.prepare(nn.Linear(1, 1), device_placement=[True, False])
    )
    before = len(accelerator._models)
    again = accelerator.prepare(second)
    found["prepare twice"] = [again is second, before, len(accelerator._models)]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    found["prepare ReduceLROnPlateau"] = type(accelerator.prepare(plateau)).__name__
    found["flags"] = {"model._is_accelerate_prepared": prepared._is_accelerate_prepared}
    accelerator.prepare(numbers(4))
    accelerator.step = 7
    found["free_memory returns"] = repr(accelerator.free_memory(model, optimizer))
    lists = (accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders)
    found["after free_memory"] = [*map(len, lists), accelerator.step]
    found["clear returns"] = repr(accelerator.clear(model, optimizer))
    found["release_memory"] = repr(release_memory(model, optimizer))
    compiled = fresh().prepare(torch.compile(nn.Linear(1, 1), backend="eager"))
    found["prepare compiled?"] = is_compiled_module(compiled)
    return found


def precision(name: str) -> Any:
    accelerator = fresh(mixed_precision=name)
    model = accelerator.prepare(nn.Linear(2, 2))
    with accelerator.autocast():
        inside = model(torch.ones(1, 2)).dtype
    return {
        "mixed_precision": accelerator.mixed_precision,
        "out dtype": str(model(torch.ones(1, 2)).dtype),
        "param": str(next(model.parameters()).dtype),
        "scaler": type(accelerator.scaler).__name__,
        "native_amp": accelerator.native_amp,
        "autocast inner dtype": str(inside),
    }


def precisions() -> dict[str, Any]:
    found: dict[str, Any] = {
        f"mixed_precision={name}": outcome(lambda name=name: precision(name))
        for name in ("no", "bf16", "fp16", "fp8", "zz")
    }
    accelerator = fresh(mixed_precision="bf16")
    square = torch.ones(2, 2)
    with accelerator.autocast():
        found["autocast mm dtype"] = str((square @ square).dtype)
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        found["autocast disabled mm dtype"] = str((square @ square).dtype)
    accelerator = fresh()
    model = accelerator.prepare(nn.Linear(2, 2))
    kept = accelerator.unwrap_model(model)
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found["forward attrs"] = {
        "has _original_forward": hasattr(kept, "_original_forward"),
        "unwrap out dtype": str(kept(torch.ones(1, 2)).dtype),
        "unwrap keep_fp32_wrapper=False out dtype": str(plain(torch.ones(1, 2)).dtype),
    }
    fresh(mixed_precision="bf16")
    found["Accelerator twice different mp"] = outcome(lambda: Accelerator(mixed_precision="fp16"))
    found["Accelerator twice same mp"] = Accelerator(mixed_precision="bf16").mixed_precision
    return found


def constructing() -> dict[str, Any]:
    found: dict[str, Any] = {
        "ctor kwargs_handlers dup": outcome(lambda: fresh(kwargs_handlers=[AutocastKwargs(), AutocastKwargs()])),
        "ctor kwargs_handlers wrong": outcome(lambda: fresh(kwargs_handlers=["autocast"])),
        "ctor ga both": outcome(
            lambda: fresh(
                gradient_accumulation_steps=2, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2)
            )
        ),
        "ctor log_with without dir": outcome(lambda: fresh(log_with="tensorboard")),
        "ctor rng_types": outcome(lambda: fresh(rng_types=["torch"]).rng_types),
        "ctor bad rng": outcome(lambda: fresh(rng_types=["zz"]).rng_types),
        "ctor split_batches arg": [outcome(lambda: fresh(split_batches=True).split_batches)],
        "ctor bad logger": outcome(lambda: fresh(log_with="zz")),
    }
    with warnings.catch_warnings(), patch_environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="5"):
        warnings.simplefilter("ignore")
        found["env GA=5, arg 2"] = fresh(gradient_accumulation_steps=2).gradient_accumulation_steps
    with patch_environment(ACCELERATE_MIXED_PRECISION="bf16"):
        found["env MP=bf16, arg None / no"] = [fresh().mixed_precision, fresh(mixed_precision="no").mixed_precision]
    return found


def splitting() -> dict[str, Any]:
    accelerator = fresh()

    def share(inputs: Any, pad: bool) -> Any:
        def split() -> Any:
            with accelerator.split_between_processes(inputs, apply_padding=pad) as mine:
                return mine.tolist() if isinstance(mine, torch.Tensor) else mine

        return outcome(split)

    found = {f"list n={n} pad={pad}": share(list(range(n)), pad) for n in (0, 1, 2, 3, 5, 7) for pad in (False, True)}
    found["tensor n=3 pad"] = share(torch.arange(3), True)
    found["tensor n=3"] = share(torch.arange(3), False)
    found["tuple n=3"] = list(share((1, 2, 3), False))
    padded = share((1, 2, 3), True)
    found["tuple n=3 pad"] = padded if isinstance(padded, Raised) else list(padded)
    found["dict n=3"] = share({"a": [1, 2, 3], "b": ["x", "y", "z"]}, False)
    found["dict n=3 pad"] = share({"a": [1, 2, 3]}, True)
    found["dict unequal"] = share({"a": [1, 2], "b": [1]}, False)
    found["str 'abc'"] = share("abc", False)
    found["dict of tensor n=3 pad"] = share({"a": torch.arange(3)}, True)["a"].tolist()
    return found


def controlling() -> dict[str, Any]:
    accelerator = fresh()
    ran: list[str] = []

    def make(name: str, value: int) -> Callable[[], int]:
        def function() -> int:
            ran.append(name)
            return value

        return function

    last = accelerator.num_processes - 1
    values = [
        accelerator.on_main_process(make("main", 1))(),
        accelerator.on_local_main_process(make("localmain", 2))(),
        accelerator.on_last_process(make("last", 3))(),
        accelerator.on_process(make("proc", 4), process_index=last)(),
        accelerator.on_local_process(make("localproc", 5), local_process_index=0)(),
    ]
    printed = io.StringIO()
    with redirect_stdout(printed):
        accelerator.print("hi")
    found = {"decorators": [values, ran], "print": printed.getvalue()}
    with tempfile.TemporaryDirectory() as folder:
        shared = broadcast_object_list([folder])[0]
        with accelerator.main_process_first():
            mark = Path(shared) / "mark"
            order = accelerator.is_main_process != mark.exists()
            mark.touch()
        accelerator.wait_for_everyone()
    found["main_process_first ordering ok"] = order
    return found


def operations() -> dict[str, Any]:
    accelerator = fresh()
    rank, last = accelerator.process_index, accelerator.num_processes - 1
    row = torch.ones(rank + 1)

    def mine() -> torch.Tensor:  # made anew, since some implementations reduce in place
        return torch.tensor([rank + 1.0])

    return {
        "gather 1d": accelerator.gather(mine()).tolist(),
        "gather 0d": accelerator.gather(torch.tensor(float(rank))).tolist(),
        "gather dict/list": repr(accelerator.gather({"a": [mine()]})),
        "reduce sum": accelerator.reduce(mine()).tolist(),
        "reduce mean": accelerator.reduce(mine(), reduction="mean").tolist(),
        "reduce scale": accelerator.reduce(mine(), scale=0.5).tolist(),
        "gather_object": gather_object([rank]),
        "gather_object non-list": list(gather_object((rank,))),
        "broadcast from 0": broadcast(mine()).tolist(),
        "broadcast from last": broadcast(mine(), from_process=last).tolist(),
        "broadcast_object_list": broadcast_object_list([rank, "x"]),
        "pad dim0": of_first(accelerator.pad_across_processes(row).tolist()),
        "pad first": of_first(accelerator.pad_across_processes(row, pad_index=-1, pad_first=True).tolist()),
        "pad dim1": of_first(accelerator.pad_across_processes(row[None], dim=1).tolist()),
        "gather non tensor": (lambda got: repr(got) if isinstance(got, str) else got)(
            outcome(lambda: accelerator.gather("a"))
        ),
        "reduce unknown": outcome(lambda: accelerator.reduce(mine(), reduction="median").tolist()),
        "gather_for_metrics objects": accelerator.gather_for_metrics(["a", rank]),
        "gather_for_metrics use_gather_object tensor": repr(
            accelerator.gather_for_metrics(torch.tensor([1.0]), use_gather_object=True)
        ),
        "gather_for_metrics outside loop": accelerator.gather_for_metrics(mine()).tolist(),
        "concatenate": concatenate([torch.ones(1), torch.zeros(1)]).tolist(),
        "find_batch_size": find_batch_size({"a": [torch.ones(3, 2)]}),
        "listify": listify({"a": torch.ones(2)}),
        "slice_tensors": slice_tensors(torch.arange(4), slice(0, 2)).tolist(),
    }


def metrics() -> dict[str, Any]:
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2))
    tensors = []
    for (batch,) in loader:
        gathered = accelerator.gather_for_metrics({"x": batch, "y": 2 * batch})
        tensors.append({name: value.tolist() for name, value in gathered.items()})
    strings = [accelerator.gather_for_metrics([str(int(value)) for value in batch]) for (batch,) in loader]
    return {
        "gather_for_metrics dict 5 samples bs2": tensors,
        "gather_for_metrics strings 5 samples bs2": strings,
    }


def batch_sizes() -> dict[str, Any]:
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=64)
    def fits(batch_size: int, name: str) -> list[Any]:
        tried.append(batch_size)
        if batch_size > 20:
            raise RuntimeError("CUDA out of memory.")
        return [batch_size, name]

    @find_executable_batch_size(starting_batch_size=4)
    def never(batch_size: int) -> None:
        raise RuntimeError("CUDA out of memory.")

    @find_executable_batch_size(starting_batch_size=4)
    def broken(batch_size: int) -> None:
        raise ValueError("boom")

    halved: list[int] = []

    @find_executable_batch_size(starting_batch_size=64, reduce_batch_size_fn=lambda: 10)
    def to_ten(batch_size: int) -> int:
        halved.append(batch_size)
        if batch_size > 10:
            raise RuntimeError("CUDA out of memory.")
        return batch_size

    messages = (
        "CUDA out of memory.",
        "x out of memory. y",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
        "DefaultCPUAllocator: can't allocate memory",
        "boom",
    )
    return {
        "febs": [fits("z"), tried],
        "febs zero": outcome(never),
        "febs other error": outcome(broken),
        "febs called with bs": outcome(lambda: broken(3)),
        "febs reduce fn": [to_ten(), halved],
        "should_reduce msgs": {text: should_reduce_batch_size(RuntimeError(text)) for text in messages},
    }


def optimizers() -> dict[str, Any]:
    accelerator = fresh()
    model = unit()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, inner)
    accelerator.backward(model(ones(1.0)).sum())
    accelerator.sync_gradients = False
    optimizer.step()
    still = next(model.parameters()).item() == 1.0
    optimizer.zero_grad()
    kept = gradient(model) == 1.0
    accelerator.sync_gradients = True
    optimizer.step()
    return {
        "optimizer no-op when not sync": [still, kept],
        "optimizer steps when sync": next(model.parameters()).item() == 0.0,
        "optimizer attrs": {
            "step_was_skipped": optimizer.step_was_skipped,
            "acc.optimizer_step_was_skipped": accelerator.optimizer_step_was_skipped,
            "train/eval": [hasattr(optimizer, "train"), hasattr(optimizer, "eval")],
            "state is inner": optimizer.state is inner.state,
            "param_groups is inner": optimizer.param_groups is inner.param_groups,
        },
    }


def messages() -> str:
    fresh()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = get_logger("tests.parity.messages", log_level="INFO")
    logger.logger.addHandler(handler)
    logger.info("a")
    logger.info("b", main_process_only=False)
    logger.info("c", main_process_only=False, in_order=True)
    logger.logger.removeHandler(handler)
    logging.root.setLevel(logging.WARNING)
    return stream.getvalue()


def profiles() -> dict[str, Any]:
    accelerator = fresh()
    with tempfile.TemporaryDirectory() as folder:
        shared = broadcast_object_list([folder])[0]
        options = ProfileKwargs(activities=["cpu"], output_trace_dir=shared)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with accelerator.profile(options) as profiler:
                torch.ones(1).sum()
        accelerator.wait_for_everyone()
        written = sorted(os.listdir(shared))
        accelerator.wait_for_everyone()
    return {"profile": type(profiler).__name__, "profile dir": written}


def mismatch() -> Any:
    # The group stays, so the state can be built again around it.
    with environment(ACCELERATE_DEBUG_MODE="true"):
        accelerator = fresh()
        found = outcome(lambda: accelerator.gather(torch.ones(accelerator.process_index + 1)))
        return found if isinstance(found, Raised) else None


def accelerator_misc() -> dict[str, Any]:
    """Return this rank's rows of `accelerator_misc`."""
    return {
        **preparing(),
        **precisions(),
        **constructing(),
        "split_between_processes": splitting(),
        **controlling(),
        "ops": operations(),
        **metrics(),
        **batch_sizes(),
        **optimizers(),
        "logging": messages(),
        **profiles(),
        "debug mode gather mismatch": mismatch(),
    }


# Options --------------------------------------------------------------------------------------------------------------


def options() -> dict[str, Any]:
    """Return the rows of `options`, which were recorded with one process only."""
    found: dict[str, Any] = {
        "GradientAccumulationPlugin()": repr(GradientAccumulationPlugin()),
        "InitProcessGroupKwargs": InitProcessGroupKwargs().to_kwargs(),
        "InitProcessGroupKwargs(nccl)": repr(InitProcessGroupKwargs(backend="gloo")),
        "DDP kwargs to_kwargs": DistributedDataParallelKwargs(find_unused_parameters=True).to_kwargs(),
        "DDP fields": repr(DistributedDataParallelKwargs()),
        "TorchDynamoPlugin": repr(TorchDynamoPlugin()),
        "TorchDynamoPlugin inductor": repr(TorchDynamoPlugin(backend="inductor").to_kwargs()),  # pyright: ignore[reportArgumentType]
        "TorchDynamoPlugin bad": outcome(lambda: TorchDynamoPlugin(backend="zz")),  # pyright: ignore[reportArgumentType]
        "ProfileKwargs": repr(ProfileKwargs()),
        "AutocastKwargs": repr(AutocastKwargs().to_kwargs()),
        "FP8RecipeKwargs": outcome(lambda: FP8RecipeKwargs() and None),
        "GradScalerKwargs": repr(GradScalerKwargs()),
        "DataLoaderConfiguration(bad)": outcome(lambda: DataLoaderConfiguration(bad=1)),  # pyright: ignore[reportCallIssue]
        "str enum": [
            str(DistributedType.MULTI_GPU),
            DistributedType.MULTI_GPU == "MULTI_GPU",
            str(PrecisionType.BF16),
            "bf16" in PrecisionType,
            "zz" in PrecisionType,
            PrecisionType.list(),
            LoggerType.list()[:2],
        ],
        "_step_count adjust=True accum 2": step_counts(True),
        "_step_count adjust=False accum 2": step_counts(False),
        "parse": {
            text: outcome(lambda text=text: str_to_bool(text)) for text in ("Yes", "t", "ON", "0", "off", "maybe", "")
        },
    }
    AcceleratorState._reset_state()
    found["AcceleratorState() direct"] = outcome(AcceleratorState)
    with environment(ACCELERATE_TORCH_DEVICE="meta"):
        found["ACCELERATE_TORCH_DEVICE=meta"] = str(PartialState().device)
    state = PartialState()
    PartialState._reset_state()
    found["PartialState attr after reset"] = outcome(lambda: state.device)
    return found


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation_scheduler_sync": accumulation,
    "accelerator_misc": accelerator_misc,
}


def observe() -> dict[str, dict[str, Any]]:
    """Return all rows of this rank, by section."""
    gc.freeze()  # many rows collect garbage, which need not look through all that was imported
    alone = PartialState(cpu=True).num_processes == 1
    with warnings.catch_warnings():
        # This library warns of an option without effect, and of a schedule that is over; some rows are about these.
        warnings.filterwarnings("ignore", r"GradientAccumulationPlugin\(adjust_scheduler=False\) changes nothing")
        warnings.filterwarnings("ignore", "The schedule OneCycleLR has 4 steps and was over")
        found = {name: function() for name, function in SECTIONS.items()}
        return {**found, "options": options()} if alone else found
