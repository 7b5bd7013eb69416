"""Settings in a worker: where they came from, and what its errors say about that."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest

from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.commands.launching import prepared
from accelerate.core.errors import SettingError
from accelerate.launch.devices import Devices
from accelerate.settings import origins
from accelerate.settings.arguments import resolve
from accelerate.settings.options.accumulation import GradientAccumulationPlugin
from accelerate.settings.options.compile import TorchDynamoPlugin
from accelerate.settings.options.project import ProjectConfiguration

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Accelerator.__init__).parameters.items()
    if name != "self"
}

SETTINGS = {
    "cpu": ({"cpu": True}, "ACCELERATE_USE_CPU", "true", "--cpu", None),
    "mixed_precision": (
        {"mixed_precision": "no"}, "ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision", "bf16",
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=2)},
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "--gradient_accumulation_steps", "3",
    ),
    "dynamo_backend": (
        {"dynamo_plugin": TorchDynamoPlugin(backend="no")}, "ACCELERATE_DYNAMO_BACKEND", "EAGER", "--dynamo_backend",
        "eager",
    ),
    "save_on_signals": (
        {"project_config": ProjectConfiguration("x", automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",))},
        "ACCELERATE_SAVE_ON_SIGNALS", "SIGTERM", "--save_on_signals", "SIGTERM",
    ),
    "resume": (None, "ACCELERATE_RESUME", "auto", "--resume", "auto"),
}  # fmt: skip
"""Setting -> (its argument, its variable, a value of that, its flag, the flag's value)."""

PROJECT = ProjectConfiguration("x", automatic_checkpoint_naming=True)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Return a function that says what environment a worker has, launched with these words."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "s.py").touch()

    def environment(*words: str) -> dict[str, str]:
        planned = prepared(launch_command_parser().parse_args([*words, str(tmp_path / "s.py")]))
        assert planned is not None
        return dict(planned.env)

    return environment


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_say_who_gave_them(name, launched):
    argument, variable, value, flag, given = SETTINGS[name]
    base = {**DEFAULTS, "project_config": PROJECT}

    assert resolve(base, {}).origin == {}
    assert resolve(base, {variable: value}).origin == {name: f"from {variable}"}
    environ = launched(flag, *([given] if given else []))
    assert resolve(base, environ).origin[name] == f"from {flag}, given to the launcher"
    if argument is not None:
        assert resolve({**base, **argument}, environ).origin[name] == f"from the argument {next(iter(argument))}"


def test_a_line_of_the_launchers_file_is_named_in_a_worker(launched, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("distributed_type: 'NO'\nmixed_precision: bf16\n")

    found = resolve(DEFAULTS, launched("--config_file", str(file)))

    assert found.origin["mixed_precision"] == f"from mixed_precision in {file}, line 2, given to the launcher"


def test_an_error_in_a_worker_names_the_flag(launched):
    with pytest.raises(
        SettingError, match=r"save_on_signals=SIGTERM \(from --save_on_signals, given to the launcher\)"
    ):
        resolve(DEFAULTS, launched("--save_on_signals", "TERM"))


def test_a_worker_of_a_plain_launch_knows_that_nobody_said_anything(launched):
    found = resolve(DEFAULTS, launched())

    assert found.origin["mixed_precision"] == "a default of the launcher"


def test_a_launch_in_a_worker_sees_the_environment_as_it_was_before_the_launcher(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_RESUME", "off")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environ = launched("--mixed_precision", "bf16", "--save_on_signals", "TERM", "--num_cpu_threads_per_process", "1")

    before = origins.before_launch(environ | {"ACCELERATE_DEBUG_MODE": "true"})  # the last one is the script's own

    assert before["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert all(before[name] is None for name in (origins.VARIABLE, "ACCELERATE_SAVE_ON_SIGNALS", "OMP_NUM_THREADS"))
    assert before.keys().isdisjoint(
        {"ACCELERATE_DEBUG_MODE", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_RESUME"}
    )
    assert origins.before_launch({}) == {}


def test_cpus_that_nobody_asked_for_are_put_down_to_the_launcher_and_put_back(launched, monkeypatch):
    monkeypatch.setattr("accelerate.launch.devices.find", lambda _environ: Devices(0))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")

    environ = launched("--num_processes", "2")

    assert environ["ACCELERATE_USE_CPU"] == "true"
    assert origins.origin(environ, "ACCELERATE_USE_CPU") == "a default of the launcher"
    assert origins.before_launch(environ)["ACCELERATE_USE_CPU"] == "false"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "5",
        '{"schema": 2, "origins": {"NAME": ["a", "from --x", null]}}',
        '{"schema": 1, "origins": {"NAME": ["a", "from --x", 5]}}',
        '{"schema": 1, "origins": {"NAME": ["a", 5, null]}}',
        '{"schema": 1, "origins": {"NAME": ["a", "from --x"]}}',
        '{"schema": 1, "origins": [], "told": 5}',
    ],
    ids=["nested", "a number", "a later schema", "a wrong value", "a wrong source", "two items", "wrong parts"],
)
def test_remarks_that_no_launcher_has_written_are_not_used(text):
    environ = {origins.VARIABLE: text, "NAME": "a"}

    assert origins.origin(environ, "NAME") == "from NAME"
    assert origins.before_launch(environ) == {origins.VARIABLE: None}
    assert not origins.was_told(environ, "a warning")


def test_a_launch_in_a_worker_chooses_its_own_network(launched):
    environ = launched("--cpu", "--num_processes", "2")

    ours = {name for name in environ if name.endswith("_SOCKET_IFNAME")}
    assert all(origins.before_launch(environ)[name] is None for name in ours)
    assert ours or not Path("/sys/class/net/lo").exists()


def test_a_launcher_inside_a_launch_adds_to_what_is_known(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    environ = launched("--cpu", "--mixed_precision", "fp16", "--gradient_accumulation_steps", "4")

    added = origins.added(environ, {"ACCELERATE_MIXED_PRECISION": ("bf16", "from the argument mixed_precision")})

    inside = {**environ, "ACCELERATE_MIXED_PRECISION": "bf16", origins.VARIABLE: added}
    assert {name: origins.origin(inside, f"ACCELERATE_{name}") for name in ("MIXED_PRECISION", "USE_CPU")} == {
        "MIXED_PRECISION": "from the argument mixed_precision, given to the launcher",
        "USE_CPU": "from --cpu, given to the launcher",
    }
    assert origins.before_launch(inside) == origins.before_launch(environ)
    assert origins.before_launch(inside)["ACCELERATE_MIXED_PRECISION"] == "no"


def test_what_a_launcher_has_told_stays_told_in_a_launcher_inside():
    environ = {origins.VARIABLE: origins.pack({}, ["a warning"])}

    assert origins.was_told({origins.VARIABLE: origins.added(environ, {})}, "a warning")


def test_a_misspelt_variable_is_told_once_by_the_launcher_or_else_by_the_worker(launched, monkeypatch, capsys):
    wrong = {"ACCELERATE_MIXED_PRECISON": "bf16"}
    with pytest.warns(UserWarning, match="ACCELERATE_MIXED_PRECISON has no effect.*mean ACCELERATE_MIXED_PRECISION"):
        resolve(DEFAULTS, wrong)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISON", "bf16")
    environ = launched()

    assert capsys.readouterr().err.count("ACCELERATE_MIXED_PRECISON") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(DEFAULTS, {**environ, **wrong})
