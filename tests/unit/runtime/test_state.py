"""The process-wide runtime, and `PartialState`, its public view."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerate import PartialState
from accelerate.core.enums import DistributedType
from accelerate.core.errors import NotStarted, SettingError
from accelerate.runtime import progress, state
from accelerate.settings import env
from accelerate.topology import Process
from tests.support.observed import OBSERVED
from tests.support.ranks import run_on_ranks


def test_nothing_is_started_at_import():
    assert not state.is_started()
    assert PartialState._shared_state == {}
    with pytest.raises(NotStarted, match="was not created yet, or was reset") as caught:
        state.current()
    assert "Create an Accelerator()" in str(caught.value)


def test_a_single_process_can_be_asked_without_starting():
    runtime = state.current_or_single()
    assert (runtime.process, runtime.device) == (Process(), torch.device("cpu"))
    assert not state.is_started()


def test_the_state_of_a_single_process():
    found = PartialState(cpu=True)
    assert (found.num_processes, found.process_index, found.local_process_index) == (1, 0, 0)
    assert (found.distributed_type, found.backend) == (DistributedType.NO, None)
    assert (found.device, str(found.device)) == (torch.device("cpu"), "cpu")
    assert (found.debug, found.fork_launched, found.use_distributed, found.initialized) == (False, False, False, True)
    assert found.is_main_process
    assert found.is_local_main_process
    assert found.is_last_process
    assert repr(found).splitlines() == [
        "Distributed environment: DistributedType.NO",
        "Num processes: 1",
        "Process index: 0",
        "Local process index: 0",
        "Device: cpu",
    ]


def test_all_instances_share_one_state_that_is_decided_once():
    first = PartialState()
    with env.applied({"ACCELERATE_DEBUG_MODE": "1"}):
        second = PartialState(cpu=True)
    assert second.debug is False
    assert first.__dict__ is second.__dict__ is PartialState._shared_state
    assert state.start(state.ProcessSettings()) is state.current()


def test_the_runtime_cannot_be_changed():
    PartialState()
    with pytest.raises(FrozenInstanceError):
        state.current().device = torch.device("meta")


def test_after_a_reset_attributes_say_so():
    found = PartialState()
    PartialState._reset_state()
    assert PartialState._shared_state == {}
    assert not found.initialized
    for name in ("device", "num_processes", "process_index", "distributed_type"):
        with pytest.raises(NotStarted, match=f"PartialState has no '{name}': it was reset"):
            getattr(found, name)
    with pytest.raises(AttributeError, match="'PartialState' object has no attribute 'nothing'"):
        found.nothing  # noqa: B018
    assert PartialState().num_processes == 1


def test_the_device_can_be_named_by_a_variable():
    with env.applied({"ACCELERATE_TORCH_DEVICE": "meta"}):
        assert PartialState().device == torch.device("meta")
        assert PartialState().default_device == torch.device("meta")
        PartialState._reset_state()
        assert PartialState(cpu=True).device == torch.device("cpu")


def test_a_device_that_does_not_exist_is_blamed_on_the_variable():
    with (
        env.applied({"ACCELERATE_TORCH_DEVICE": "gpu"}),
        pytest.raises(SettingError, match="from ACCELERATE_TORCH_DEVICE"),
    ):
        PartialState()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "FORK_LAUNCHED"])
def test_a_garbage_flag_is_refused(name):
    with (
        env.applied({name: "maybe"}),
        pytest.raises(SettingError, match=f"{name}='maybe' in the environment is not a boolean"),
    ):
        PartialState()


def test_flags_are_read_from_the_environment():
    with env.applied({"ACCELERATE_DEBUG_MODE": "yes", "FORK_LAUNCHED": "1", "ACCELERATE_USE_CPU": "true"}):
        found = PartialState()
    assert (found.debug, found.fork_launched, found._runtime.on_cpu_by_choice) == (True, True, True)


def test_the_default_device_is_this_machines():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    expected = "cpu" if accelerator is None else accelerator.type
    assert PartialState(cpu=True).default_device.type == expected
    PartialState().set_device()


# Who runs what ----------------------------------------------------------------------------------------------------------


def decorated() -> list:
    from accelerate import PartialState

    here, ran = PartialState(), []
    last = here.num_processes - 1

    def note(name, value):
        ran.append(name)
        return value

    results = [
        here.on_main_process(lambda: note("main", 1))(),
        here.on_local_main_process(lambda: note("localmain", 2))(),
        here.on_last_process(lambda: note("last", 3))(),
        here.on_process(process_index=last)(lambda: note("proc", 4))(),
        here.on_local_process(lambda: note("localproc", 5), local_process_index=0)(),
    ]
    return [results, ran]


@pytest.mark.parametrize("processes", [1, 2])
def test_functions_run_where_they_should(processes):
    assert run_on_ranks(decorated, processes) == OBSERVED["decorators"][f"P{processes}"]


def test_decorators_may_be_called_first():
    here = PartialState()
    assert here.on_main_process()(lambda: 1)() == 1
    assert here.on_local_main_process()(lambda: 1)() == 1
    assert here.on_process(process_index=1)(lambda: 1)() is None


def test_a_rank_must_be_named():
    for call, name in (
        (PartialState().on_process, "process_index"),
        (PartialState().on_local_process, "local_process_index"),
    ):
        with pytest.raises(SettingError, match=f"^{name} is missing"):
            call(lambda: 1)


def test_printing_and_splitting_alone(capsys):
    here = PartialState()
    here.print("hi", end="!")
    assert capsys.readouterr().out == "hi!"
    inputs = {"a": [1, 2, 3]}
    with here.split_between_processes(inputs) as share:
        assert share is inputs
    with here.main_process_first(), here.local_main_process_first():
        here.wait_for_everyone()


def test_leaving_without_a_group_does_nothing():
    PartialState().destroy_process_group()


def place_and_print() -> tuple:
    import contextlib
    import io

    import torch

    from accelerate import PartialState
    from accelerate.runtime import state

    here, out = PartialState(), io.StringIO()
    with contextlib.redirect_stdout(out):
        here.print("hi")
    inputs = {"a": [1, 2, 3]}
    with here.split_between_processes(inputs, apply_padding=True) as share:
        pass
    threads = torch.get_num_threads()
    found = (repr(here).splitlines(), out.getvalue(), share, inputs, here.use_distributed, threads)
    here.destroy_process_group()
    return (*found, torch.distributed.is_initialized(), state.is_started())


def test_two_processes_on_the_cpu():
    for rank, result in enumerate(run_on_ranks(place_and_print, 2)):
        printed, out, share, inputs, distributed, threads, group, started = result
        assert printed == [
            "Distributed environment: DistributedType.MULTI_CPU  Backend: gloo",
            "Num processes: 2",
            f"Process index: {rank}",
            f"Local process index: {rank}",
            "Device: cpu:0",
        ]
        assert out == ("hi\n" if rank == 0 else "")
        assert share == {"a": [1, 2] if rank == 0 else [3, 3]}
        assert inputs == {"a": [1, 2, 3]}
        assert (distributed, threads, group, started) == (True, 1, False, True)


def cores_of_two(setting: str | None) -> int:
    import os

    import psutil
    import torch

    from accelerate import PartialState

    psutil.cpu_count = lambda logical=True: 8
    os.environ.pop("OMP_NUM_THREADS")
    if setting is not None:
        os.environ["OMP_NUM_THREADS"] = setting
    PartialState()
    return torch.get_num_threads()


@pytest.mark.parametrize(("setting", "threads"), [(None, 4), ("3", 1)])
def test_processes_of_one_machine_share_its_cores_unless_told_otherwise(setting, threads):
    """Torch starts with one thread here; a setting of the user's is left alone."""
    assert run_on_ranks(cores_of_two, 2, setting) == [threads, threads]


def inside_a_group_of_somebody_else() -> tuple:
    import torch.distributed as dist

    from accelerate import PartialState

    dist.init_process_group("gloo")
    here = PartialState()
    return here.process_index, here.num_processes, here._runtime.process.source, str(here.distributed_type)


def test_a_group_made_before_us_is_used():
    assert run_on_ranks(inside_a_group_of_somebody_else, 2) == [
        (rank, 2, "attached", "DistributedType.MULTI_CPU") for rank in range(2)
    ]


# Progress ---------------------------------------------------------------------------------------------------


def test_a_bar_is_shown_on_the_first_process_only(monkeypatch, capsys):
    assert list(progress.tqdm(range(3), disable=True)) == [0, 1, 2]
    PartialState()
    bar = progress.tqdm(range(3))
    assert not bar.disable
    bar.close()
    from dataclasses import replace

    runtime = replace(state.current(), process=Process(rank=1, world_size=2, local_rank=1, local_world_size=2))
    monkeypatch.setitem(state.SHARED, "_runtime", runtime)
    assert progress.tqdm(range(3)).disable
    everywhere = progress.tqdm(range(3), main_process_only=False)
    assert not everywhere.disable
    everywhere.close()


def test_a_device_that_ray_names_for_each_process_is_taken_as_it_is():
    family: Any = SimpleNamespace(needs_placement=True, visible_devices="CUDA_VISIBLE_DEVICES", count=lambda: 2)
    place = {"rank": 1, "world_size": 2, "local_rank": 1, "local_world_size": 2}
    named = torch.device("cuda:1")

    assert state._own_index(Process(**place, source="attached"), family, named, {}) == 1
    with pytest.raises(SettingError, match="ACCELERATE_TORCH_DEVICE=cuda:1 would put all 2 processes"):
        state._own_index(Process(**place, source="torchrun"), family, named, {})
