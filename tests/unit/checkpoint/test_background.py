"""A save that goes on while training does."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate import Accelerator
from accelerate.checkpoint import codec, durable
from accelerate.checkpoint.background import SaveHandle
from accelerate.checkpoint.files import SnapshotMemory
from accelerate.checkpoint.train_state import plan_state, read_state
from accelerate.checkpoint.weights import save_model
from accelerate.collectives.single import SingleProcess
from accelerate.core.enums import DistributedType
from accelerate.core.errors import CheckpointError
from accelerate.hardware import Hardware
from accelerate.state import AcceleratorState

from .support import Counter, Run, same_bits, write


class Gate:
    """Holds every flush to the disk until it is opened; then lets it pass, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self._flush = durable.flush_file
        monkeypatch.setattr(durable, "flush_file", self._pass)

    def _pass(self, file: Path) -> None:
        self.reached.set()
        assert self.opened.wait(30)
        if self.failure is not None:
            raise self.failure
        self._flush(file)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def trained() -> Run:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return Run().having(models=[model], optimizers=[optimizer], custom_objects=[Counter([1])])


def change(run: Run, value: float) -> None:
    """Change everything in place, as a step does."""
    model, optimizer = run.objects["models"][0], run.objects["optimizers"][0]
    with torch.no_grad():
        for tensor in (*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())):
            tensor.fill_(value)
    run.objects["custom_objects"][0].value[0] = value


def values(run: Run) -> set[Any]:
    model, optimizer = run.objects["models"][0], run.objects["optimizers"][0]
    numbers = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
    return {
        *torch.cat([number.detach().flatten() for number in numbers]).tolist(),
        run.objects["custom_objects"][0].value[0],
    }


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path: Path, gate: Gate) -> None:
    run = trained()
    change(run, 1.0)
    handle = run.begin_save(tmp_path / "c", blocking=False)
    assert gate.reached.wait(30)
    change(run, 2.0)
    assert not handle.done()
    assert not (tmp_path / "c").exists()
    gate.opened.set()

    assert handle.wait() == tmp_path / "c"
    assert handle.done()
    run.load(tmp_path / "c")
    assert values(run) == {1.0}


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_either_format_are_copied(tmp_path: Path, gate: Gate, safe: bool) -> None:
    run = trained()
    change(run, 1.0)
    handle = run.begin_save(tmp_path / "c", blocking=False, safe_serialization=safe)
    change(run, 2.0)
    gate.opened.set()
    handle.wait()
    run.load(tmp_path / "c")
    assert values(run) == {1.0}


def test_one_save_at_a_time(tmp_path: Path, gate: Gate) -> None:
    run = trained()
    first = run.begin_save(tmp_path / "a", blocking=False)
    threading.Timer(0.2, gate.opened.set).start()
    second = run.begin_save(tmp_path / "b", blocking=False)
    assert first.done()
    assert (tmp_path / "a").is_dir()
    second.wait()


def test_the_memory_for_copies_is_used_again(tmp_path: Path) -> None:
    run = trained()

    def room() -> set[int]:
        return {tensor.data_ptr() for tensor in run.saving.memory._rooms.values()}

    run.begin_save(tmp_path / "a", blocking=False).wait()
    before = room()
    run.begin_save(tmp_path / "b", blocking=False).wait()
    assert room() == before
    run.saving.release()
    assert room() == set()


class Copies(TorchDispatchMode):
    """Notes everything that copies a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in ("clone", "copy_", "_to_copy", "contiguous"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


STATE = {
    "plain": torch.ones(4),
    "column": torch.ones(4, 4)[:, 1],
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "conj": torch.tensor([1 + 2j]).conj(),
}


def test_each_tensor_is_copied_once(tmp_path: Path) -> None:
    memory = Run().saving.memory
    with Copies() as copies:
        files = memory.snapshot(plan_state("s", STATE))
    assert copies.seen == ["copy_"] * len(STATE)
    write(tmp_path, files)
    assert same_bits(read_state(tmp_path, "s"), STATE)


class OtherDevice(Hardware):
    """A family of two devices that are not there; what is copied from them lies on the meta device."""

    def begin(self) -> OtherDevice:
        vars(self)["log"] = []
        return self

    def count(self) -> int:
        return 2

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        vars(self)["log"].append(("room", tensor.device))
        return torch.empty_like(tensor)

    def synchronize(self, device: torch.device | None = None) -> None:
        vars(self)["log"].append(("waited", device))


def test_tensors_of_a_device_stay_there_until_they_are_copied_and_all_copies_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec, "is_plain_tensor", lambda tensor: True)
    hardware = OtherDevice("meta", DistributedType.MULTI_GPU).begin()
    device = torch.device("meta")
    files = plan_state("s", {"a": torch.ones(2, device=device), "b": torch.ones(3, 3, device=device).T})
    assert {tensor.device for file in files for tensor in getattr(file, "tensors", {}).values()} == {device}

    SnapshotMemory(hardware).snapshot(files)
    assert vars(hardware)["log"] == [("room", device), ("room", device), ("waited", device)]


@pytest.mark.parametrize(
    ("ahead", "device", "pinned"), [(True, "meta", True), (True, "cpu", False), (False, "meta", False)]
)
def test_copies_from_a_device_with_streams_go_to_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, device: str, pinned: bool
) -> None:
    asked: list[dict[str, Any]] = []
    tensor = torch.empty(2, device=device)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: asked.append(options))
    Hardware("cuda", DistributedType.MULTI_GPU, copies_ahead=ahead).room_for(tensor)
    assert asked == [{"dtype": torch.float32, "device": "cpu", "pin_memory": pinned}]


def test_memory_taken_in_inference_mode_is_used_again_outside(tmp_path: Path) -> None:
    run = trained()
    with torch.inference_mode():
        run.begin_save(tmp_path / "a", blocking=False).wait()
    run.begin_save(tmp_path / "b", blocking=False).wait()


def test_copies_lie_on_the_cpu_wherever_new_tensors_do(tmp_path: Path) -> None:
    run = trained()
    run.objects["custom_objects"][0].value = [torch.arange(6.0).reshape(2, 3).T]
    with torch.device("meta"):
        run.begin_save(tmp_path / "a", blocking=False).wait()
        run.load(tmp_path / "a")

    found = run.objects["custom_objects"][0].value[0]
    assert {room.device.type for room in run.saving.memory._rooms.values()} == {found.device.type} == {"cpu"}
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failure_is_raised_where_somebody_waits(tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    run = trained()
    gate.failure = OSError(28, "No space left on device")
    handle = run.begin_save(tmp_path / "c", blocking=False)
    gate.opened.set()
    with pytest.raises(CheckpointError, match="No space left on device"):
        handle.wait()
    assert "failed" in repr(handle)
    assert "No space left on device" in caplog.text
    gate.failure = None
    run.save(tmp_path / "c")  # which raises nothing again
    assert (tmp_path / "c").is_dir()


def test_a_failure_that_nobody_heard_of_is_raised_by_the_next_call(tmp_path: Path, gate: Gate) -> None:
    run = trained()
    gate.failure = OSError(5, "Input/output error")
    gate.opened.set()
    run.begin_save(tmp_path / "c", blocking=False)
    with pytest.raises(CheckpointError, match="Input/output error"):
        run.save(tmp_path / "d")
    assert not (tmp_path / "c").exists()
    gate.failure = None
    run.save(tmp_path / "d")


def test_what_cannot_be_saved_is_an_error_at_once(tmp_path: Path) -> None:
    run = trained()
    run.objects["custom_objects"][0].value = lambda: 0
    with pytest.raises(CheckpointError, match="is a function"):
        run.begin_save(tmp_path / "c", blocking=False)
    assert list(tmp_path.iterdir()) == []


def test_an_accelerator_waits_before_it_loads_and_at_its_end(tmp_path: Path, gate: Gate) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    saved = model.weight.detach().clone()
    handle = accelerator.save_state(tmp_path / "c", blocking=False)
    assert isinstance(handle, SaveHandle)
    threading.Timer(0.2, gate.opened.set).start()
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state(handle)
    assert handle.done()
    assert torch.equal(model.weight, saved)

    gate.failure = OSError(28, "No space left on device")
    accelerator.save_state(tmp_path / "d", blocking=False)
    with pytest.raises(CheckpointError, match="No space left"):
        accelerator.end_training()
    assert not (tmp_path / "d").exists()


SCRIPT = """
import sys, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(1000, 1000))
accelerator.save_state(sys.argv[1], blocking=False)
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("end", "status"), [("end", 0), ("raise", 3)])
def test_a_script_that_ends_without_waiting_has_its_checkpoint(tmp_path: Path, end: str, status: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c"), end]
    assert subprocess.run(command, timeout=60).returncode == status
    Run().having(models=[torch.nn.Linear(1000, 1000)]).load(tmp_path / "c")


def test_weights_that_are_saved_meanwhile_wait_for_the_state(tmp_path: Path, gate: Gate) -> None:
    """Both write aside at the same place."""
    run = trained()
    weights = {name: tensor.clone() for name, tensor in run.objects["models"][0].state_dict().items()}
    handle = run.begin_save(tmp_path / "c", blocking=False)
    assert gate.reached.wait(10)
    other = threading.Thread(target=save_model, args=(weights, tmp_path / "c", SingleProcess()))
    other.start()
    gate.opened.set()
    handle.wait()
    other.join()
    run.load(tmp_path / "c")


def test_another_run_in_the_process_waits_too(tmp_path: Path, gate: Gate) -> None:
    handle = trained().begin_save(tmp_path / "c", blocking=False)
    assert gate.reached.wait(10)
    other = trained()
    thread = threading.Thread(target=other.save, args=(tmp_path / "c",))
    thread.start()
    gate.opened.set()
    handle.wait()
    thread.join()
    other.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["accelerate-flush", "accelerate-save"])
def test_a_save_needs_no_thread_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    run = trained()
    run.begin_save(tmp_path / "c", blocking=False).wait()
    run.load(tmp_path / "c")


def test_what_ends_a_script_is_not_hidden_by_a_save_that_failed(tmp_path: Path, gate: Gate) -> None:
    gate.failure = OSError(28, "full")
    with pytest.raises(KeyError, match="of the script"), Accelerator(cpu=True) as accelerator:
        accelerator.prepare(torch.nn.Linear(2, 2))
        accelerator.save_state(tmp_path / "c", blocking=False)
        gate.opened.set()
        raise KeyError("of the script")
    assert not AcceleratorState._shared_state


def test_a_run_is_forgotten_although_its_last_save_failed(tmp_path: Path, gate: Gate) -> None:
    gate.failure = OSError(28, "full")
    with pytest.raises(CheckpointError, match="No space left"), Accelerator(cpu=True) as accelerator:
        accelerator.prepare(torch.nn.Linear(2, 2))
        accelerator.save_state(tmp_path / "c", blocking=False)
        gate.opened.set()
    assert not AcceleratorState._shared_state
