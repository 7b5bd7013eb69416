"""`notebook_launcher` and `debug_launcher`: who the workers are, and how their errors arrive."""

from __future__ import annotations

import functools
import gc
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import LaunchError, UnsupportedCombination, WrongTypeError
from accelerate.launch import functions
from accelerate.launch.asked import Asked
from accelerate.launch.machine import Machine
from accelerate.launch.plan import where_to_meet
from accelerate.launch.report import RunPreempted
from accelerate.launchers import debug_launcher, notebook_launcher
from accelerate.runtime import state
from accelerate.settings import origins
from accelerate.utils import ProjectConfiguration


def note(folder: Path) -> None:
    """Join the others, and leave a file that says who this worker is."""
    runtime = state.start(state.ProcessSettings())
    ranks = runtime.collectives.all_gather_object(runtime.process.rank)
    names = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "FORK_LAUNCHED", "LOCAL_WORLD_SIZE")
    words = [str(ranks), runtime.backend, str(runtime.device), *(os.environ.get(name) for name in names)]
    (folder / str(runtime.process.rank)).write_text(" ".join(map(str, words)))


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("boom\nand how")
    time.sleep(30)


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(30)


def be_interrupted_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise KeyboardInterrupt
    time.sleep(60)


def fail_together() -> None:
    error = LaunchError("rank 1 has said no")
    error.arose_on = (1,)
    raise error


def train_until_asked_to_stop(folder: Path, name: str) -> None:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=(name,))
    accelerator = Accelerator(cpu=True, project_config=project)
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.ones(8, 1))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for step, batch in enumerate(loader):
        if step == 1 and accelerator.process_index == 1:
            signal.raise_signal(signal.Signals[name])
        accelerator.backward(model(batch).sum())
        optimizer.step()
    raise AssertionError("nobody stopped")


def say_handlers(folder: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    (folder / os.environ["RANK"]).write_text(f"{handlers[0] == handlers[2] == signal.SIG_DFL} {handlers[1].__name__}")


def own_handler(*_: object) -> None: ...


LAUNCHES = [
    pytest.param(notebook_launcher, id="fork"),
    pytest.param(functools.partial(notebook_launcher, start_method="spawn"), id="spawn", marks=pytest.mark.full),
    pytest.param(debug_launcher, id="debug"),
]


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_debug_launcher_starts_gloo_workers_on_the_cpu(tmp_path):
    assert debug_launcher(note, (tmp_path,), num_processes=3) is None

    assert read(tmp_path) == {str(rank): "[0, 1, 2] gloo cpu:0 no true 1 3" for rank in range(3)}


def test_notebook_launcher_gives_two_workers_on_a_machine_without_devices_and_the_precision_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert notebook_launcher(note, (tmp_path,), num_processes=2, mixed_precision="bf16") is None

    assert read(tmp_path) == {str(rank): "[0, 1] gloo cpu:0 bf16 true 1 2" for rank in range(2)}


@pytest.mark.parametrize(
    ("launcher", "name"), [(notebook_launcher, "SIGTERM"), (notebook_launcher, "SIGUSR1"), (debug_launcher, "SIGTERM")]
)
def test_workers_save_themselves_on_a_signal(tmp_path, launcher, name):
    with pytest.raises(RunPreempted, match=f"rank 1 received {name}: the run saved itself in .*checkpoint_0") as raised:
        launcher(train_until_asked_to_stop, (tmp_path, name), num_processes=2)
    assert raised.value.status == 75
    assert (tmp_path / "checkpoints" / "checkpoint_0" / "accelerate_manifest.json").exists()


def test_workers_handle_signals_as_the_notebook_does_and_not_as_its_launcher(tmp_path):
    before = signal.signal(signal.SIGUSR1, own_handler)
    try:
        notebook_launcher(say_handlers, (tmp_path,), num_processes=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read(tmp_path) == dict.fromkeys("01", "True own_handler")


def test_notebook_launcher_runs_one_process_right_here_with_the_precision_asked_for():
    seen = []

    assert notebook_launcher(lambda: seen.append(os.environ["ACCELERATE_MIXED_PRECISION"]), (), 1, "FP16") is None

    assert seen == ["fp16"]
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (fail_on_rank_1, "exited with code 1: ValueError: boom"),
        (die_on_rank_1, "exited with code 7; what it printed stands above."),
    ],
)
def test_a_workers_error_arrives_with_its_rank_and_traceback(launcher, function, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    began = time.monotonic()

    with pytest.raises(LaunchError) as caught:
        launcher(function, num_processes=2)

    last = str(caught.value).splitlines()[-1]
    assert last.startswith("accelerate: rank 1 of 2 (pid ")
    assert last.endswith(expected)
    assert ("fail_on_rank_1" in str(caught.value)) == (function is fail_on_rank_1), "the traceback names the function"
    assert time.monotonic() - began < 15, "the other worker was ended"


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_traceback_begins_with_the_function_of_the_user(launch):
    with pytest.raises(LaunchError) as caught:
        launch(fail_on_rank_1, num_processes=2)

    frames = [line for line in str(caught.value).splitlines() if line.startswith("[rank 1]   File ")]
    assert len(frames) == 1
    assert frames[0].endswith("in fail_on_rank_1")


class Loud:
    """Says in which process it is destroyed; only the collector of garbage does it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


def test_forks_do_not_destroy_what_was_garbage_before(tmp_path):
    """A destructor may wait for a thread, such as that of a store, and a fork has none."""
    gc.disable()
    try:
        Loud(tmp_path)
        debug_launcher(gc.collect, num_processes=2)
        assert list(tmp_path.iterdir()) == []
        gc.collect()
    finally:
        gc.enable()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_interrupt_of_one_worker_ends_all(launch):
    with pytest.raises(KeyboardInterrupt):
        launch(be_interrupted_on_rank_1, num_processes=2)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_error_that_all_raise_is_that_of_the_rank_on_which_it_arose(launch):
    with pytest.raises(LaunchError) as caught:
        launch(fail_together, num_processes=2)

    assert str(caught.value).splitlines()[-1].startswith("accelerate: rank 1 of 2 ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_processes": 2, "num_nodes": 0}, "num_nodes=0"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"num_processes": 2, "node_rank": 1}, "node_rank=1"),
        ({"num_processes": 2, "node_rank": -1}, "node_rank=-1"),
        ({"num_processes": 2, "max_restarts": -1}, "max_restarts=-1"),
        ({"num_processes": 2, "monitor_interval": 0}, "monitor_interval=0"),
        ({"num_processes": 2, "monitor_interval": float("nan")}, "monitor_interval=nan"),
        ({"num_processes": 2, "mixed_precision": "fp32"}, "mixed_precision='fp32'"),
        ({"num_processes": 1, "mixed_precision": "fp32"}, "mixed_precision='fp32'"),
        ({"num_processes": 2, "mixed_precision": "fp8"}, "an fp8 engine"),
        ({"num_processes": 2, "use_port": "http"}, "use_port='http'"),
        ({"num_processes": 2, "use_port": "1_0"}, "use_port='1_0'"),
        ({"num_processes": 2, "start_method": "forkserver"}, "start_method='forkserver'"),
        ({"num_processes": 10**9}, "num_processes=1000000000 .* cannot be used"),
        ({"num_processes": 2, "num_nodes": 10**9}, "num_nodes=1000000000"),
        ({"num_processes": 2, "max_restarts": 10**9}, "max_restarts=1000000000"),
        ({"num_processes": 2, "monitor_interval": 1e300}, "monitor_interval=1e"),
        ({"num_processes": 2, "num_nodes": 2, "master_addr": "a b"}, "master_addr='a b' .*is no address"),
        ({"num_processes": 2, "master_addr": ""}, "master_addr='' .*is no address"),
        ({"num_processes": 2, "rdzv_endpoint": "a b:1"}, "rdzv_endpoint='a b:1' .*is no address"),
        ({"num_processes": 2, "rdzv_endpoint": "host:65536"}, "rdzv_endpoint='host:65536'"),
        ({"num_processes": 2, "rdzv_endpoint": "host:1", "use_port": 2}, "'host:1' contradicts use_port=2"),
        ({"num_processes": 2, "rdzv_backend": "foo"}, r"rdzv_backend='foo' \(the argument rdzv_backend\) is no way"),
    ],
)
def test_wrong_arguments_are_value_errors(options, expected):
    with pytest.raises(ValueError, match=expected):
        notebook_launcher(lambda: None, (), **options)


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
@pytest.mark.parametrize("value", ["2", 2.0, True])
def test_what_is_no_number_is_a_type_error(launcher, value):
    with pytest.raises(TypeError, match=f"num_processes={value!r} .* is a {type(value).__name__}"):
        launcher(lambda: None, (), value)


@pytest.mark.parametrize(
    "options",
    [
        {"rdzv_id": 5}, {"use_port": None}, {"use_port": True}, {"use_port": 1.5}, {"args": None}, {"args": 3},
        {"args": "one"}, {"log_line_prefix_template": 5}, {"master_addr": 1}, {"rdzv_endpoint": None},
        {"rdzv_backend": None}, {"mixed_precision": 16}, {"function": "train"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_of_a_wrong_type_is_named_before_anything_starts(options, count):
    (name, value), *_ = options.items()

    with pytest.raises(WrongTypeError, match=rf"{name}={value!r} \(the argument\) is a {type(value).__name__}"):
        notebook_launcher(**{"function": print, "num_processes": count, **options})


def test_debug_launcher_names_wrong_arguments_too():
    with pytest.raises(WrongTypeError, match=r"args=3 .* is a int.*\nAccepted: a list or tuple"):
        debug_launcher(print, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
def test_workers_are_not_started_beside_an_existing_state(launcher):
    state.start(state.ProcessSettings(cpu=True))

    with pytest.raises(ValueError, match="an Accelerator or PartialState exists"):
        launcher(lambda: None, num_processes=2)


def in_use(monkeypatch, count: int = 2) -> None:
    """Let a notebook look as if a cell had used one of `count` devices of CUDA."""
    monkeypatch.setattr(functions.devices, "find", lambda environ: functions.devices.Devices(count, "cuda"))
    monkeypatch.setattr("torch.cuda._initialized", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the workers have none


def test_more_processes_than_devices_are_refused(monkeypatch):
    in_use(monkeypatch)

    with pytest.raises(ValueError, match="at most 2, the cuda devices"):
        notebook_launcher(lambda: None, num_processes=3)


def test_how_workers_are_made():
    choose, both = functions.choose_start, ("fork", "spawn", "forkserver")

    assert choose(None, None, both) == functions.Start("fork")
    assert choose(None, "cuda", both).method == "spawn"
    assert choose(None, "cuda", both).why.startswith("cuda is in use")
    assert choose(None, None, ("spawn",)).method == "spawn"
    assert choose("spawn", None, both) == choose("spawn", "cuda", both) == functions.Start("spawn")
    with pytest.raises(UnsupportedCombination, match="already uses cuda"):
        choose("fork", "cuda", both)
    with pytest.raises(ValueError, match="Accepted: spawn."):
        choose("fork", None, ("spawn",))


def test_where_machines_meet():
    def endpoint(taken: bool = False, **arguments):
        request = Asked(num_processes=2, **arguments).request()
        machine = Machine(python="python", port_is_taken=taken)
        return where_to_meet(request, machine, notes).endpoint

    notes: list[str] = []
    assert endpoint() == "127.0.0.1:0"
    assert endpoint(use_port="29500") == "127.0.0.1:29500", "asked for by name"
    assert endpoint(use_port=41234) == "127.0.0.1:41234"
    assert notes == []
    assert endpoint(use_port=41234, taken=True) == "127.0.0.1:0"
    assert notes.pop().startswith("main_process_port=41234 (the argument use_port) is taken by another program")
    far = {"num_nodes": 2, "master_addr": "10.0.0.1"}
    assert endpoint(**far) == "10.0.0.1:29500"
    assert endpoint(num_nodes=2, rdzv_endpoint="host:1", rdzv_backend="c10d") == "host:1"
    assert endpoint(num_nodes=2, rdzv_endpoint="host") == "host:29500"
    assert endpoint(num_nodes=2, master_addr="fd00::1") == "[fd00::1]:29500"
    with pytest.raises(LaunchError, match="is taken on this machine"):
        endpoint(**far, taken=True)
    with pytest.raises(ValueError, match="'host:1' contradicts master_addr='10.0.0.1'"):
        endpoint(**far, rdzv_endpoint="host:1")
    with pytest.raises(ValueError, match="use_port=0"):
        endpoint(**far, use_port=0)
    with pytest.raises(ValueError, match=r"timeout=abc \(the argument rdzv_conf\) cannot be read"):
        endpoint(**far, rdzv_conf={"timeout": "abc"})
    with pytest.raises(ValueError, match="foo=1 .* is no option of rdzv_conf"):
        endpoint(**far, rdzv_conf={"foo": 1})


@pytest.mark.parametrize(
    ("arguments", "told", "told_in_place"),
    [
        ({}, [], []),
        ({"master_addr": "nohost.invalid"}, ["master_addr"], ["master_addr"]),
        ({"rdzv_endpoint": "nohost.invalid"}, ["rdzv_endpoint"], ["rdzv_endpoint"]),
        ({"rdzv_endpoint": "nohost.invalid:1"}, ["rdzv_endpoint"], ["rdzv_endpoint"]),
        ({"rdzv_backend": "c10d"}, ["rdzv_backend"], ["rdzv_backend"]),
        (
            {"rdzv_backend": "own", "rdzv_endpoint": "a:1", "rdzv_conf": {"x": 1}},
            [],
            ["rdzv_backend", "rdzv_conf", "rdzv_endpoint"],
        ),
        ({"rdzv_conf": {"timeout": 1}}, ["rdzv_conf"], ["rdzv_conf"]),
        ({"max_restarts": 2, "use_port": "29500"}, [], ["max_restarts", "use_port"]),
        ({"rdzv_id": "none", "rdzv_backend": "static"}, [], ["rdzv_backend", "rdzv_id"]),
        ({"num_nodes": 2, "master_addr": "10.0.0.1", "rdzv_conf": {"timeout": 9}}, [], []),
    ],
)
def test_arguments_that_change_nothing_are_told(arguments, told, told_in_place):
    call = Asked(num_processes=1, **arguments)

    assert [note.partition("=")[0] for note in call.without_use(in_place=False)] == told
    assert sorted(note.partition("=")[0] for note in call.without_use(in_place=True)) == sorted(told_in_place)


def test_of_an_endpoint_only_the_port_counts_on_one_machine():
    call = Asked(num_processes=2, rdzv_endpoint="10.0.0.9:29871")

    assert call.without_use(in_place=False) == [
        "rdzv_endpoint='10.0.0.9:29871' (the argument) gives the port only: all processes are on this machine."
    ]
    meeting = where_to_meet(call.request(), Machine(python="python"), [])
    assert meeting.endpoint == "127.0.0.1:29871"


def test_what_packages_offer_to_meet_by_gets_its_address_on_one_machine_too():
    near = {"num_processes": 2, "rdzv_backend": "own"}

    def endpoint(**arguments):
        return where_to_meet(Asked(**near, **arguments).request(), Machine(python="python"), []).endpoint

    assert endpoint(rdzv_endpoint="a:1") == endpoint(master_addr="a", use_port=1) == "a:1"
    assert endpoint() == "127.0.0.1:29500"


def test_what_is_told_is_seen(capsys):
    notebook_launcher(lambda: None, (), 1, master_addr="nohost.invalid")
    assert capsys.readouterr().out == (
        "notebook_launcher: master_addr='nohost.invalid' (the argument) has no use: the function runs right here.\n"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_precision_that_is_not_given_is_that_of_the_variable(monkeypatch, count):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precision = functools.partial(notebook_launcher, lambda: Accelerator(cpu=True).mixed_precision, (), count)

    assert precision(return_results=True) == ["bf16"] * count


@pytest.mark.parametrize("count", [1, 2])
def test_a_launch_inside_of_workers_goes_by_what_was_there_before_all_launchers(monkeypatch, count):
    """This process is taken for one that `accelerate launch` has started."""
    around = {
        "ACCELERATE_MIXED_PRECISION": ("fp16", "from --mixed_precision", None),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "from --gradient_accumulation_steps", None),
    }
    for name, (value, _, _) in around.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(origins.VARIABLE, origins.pack(around))

    def known() -> tuple[str, dict[str, str | None]]:
        environ = dict(os.environ)
        return origins.origin(environ, next(iter(around))), origins.before_launch(environ)

    for origin, before in notebook_launcher(known, (), count, "bf16", return_results=True) or ():
        assert origin == "from the argument mixed_precision, given to the launcher"
        assert all(before[name] is None for name in (*around, origins.VARIABLE))
        assert ("FORK_LAUNCHED" in before) == (count > 1), "what the launcher chose is put back too"


def test_a_precision_that_is_given_wins_even_if_it_is_the_usual_one(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    assert notebook_launcher(lambda: Accelerator(cpu=True).mixed_precision, (), 1, "no", return_results=True) == ["no"]


def test_a_second_run_in_this_process_with_another_precision_is_refused():
    def train() -> str:
        return Accelerator(cpu=True).mixed_precision

    assert notebook_launcher(train, (), 1, "no", return_results=True) == ["no"]
    assert notebook_launcher(train, (), 1, return_results=True) == ["no"]
    with pytest.raises(ValueError, match=r"'bf16' \(from the argument mixed_precision.*\) contradicts 'no'"):
        notebook_launcher(train, (), 1, "bf16")
    assert notebook_launcher(train, (), 1, "no", return_results=True) == ["no"]


def test_the_number_of_processes_heeds_that_devices_are_not_wanted(monkeypatch):
    monkeypatch.setattr(functions.devices, "find", lambda environ: functions.devices.Devices(2, "cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    assert functions._one_for_each_device() == 1
