"""`accelerate env`: the facts of a bug report, and with `--explain` what a launch without flags would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accelerate.commands.env import env_command, env_command_parser
from accelerate.launch import devices, show
from accelerate.launch.devices import Devices
from accelerate.launch.machine import Machine
from accelerate.launch.plan import plan
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file
from tests.support import places


@pytest.fixture
def env(tmp_path, monkeypatch, capsys) -> Callable[..., Any]:
    """Run the command where nothing speaks but the words, and the text of the default file; return what it printed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "find", lambda environ: Devices(0))
    (tmp_path / "accelerate").mkdir()

    def run(*words: str, text: str = "", **environ: str) -> Any:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        if text:
            (tmp_path / "accelerate" / "default_config.yaml").write_text(text)
        env_command(env_command_parser().parse_args([*words]))
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in words else printed

    return run


def test_what_somebody_set_stands_before_what_nobody_did(env):
    text = env("--explain", text="distributed_type: MULTI_CPU\nnum_processes: 3\n", ACCELERATE_MIXED_PRECISION="bf16")

    given, _, left = text.partition("settings\n")[2].partition("defaults     ")
    assert sorted(line.strip().partition("=")[0] for line in given.splitlines()) == [
        "cpu", "mixed_precision", "num_processes", "processes_per_machine",
    ]  # fmt: skip
    assert "(the default)" not in given
    assert "max_restarts=0" in left.partition("unset ")[0]
    assert "main_process_port" in left.partition("unset ")[2]


def test_a_folder_in_the_place_of_the_default_file_is_no_file(env, tmp_path):
    default = tmp_path / "accelerate" / "default_config.yaml"
    assert f"none: {default} does not exist\n" in env("--explain")

    default.mkdir()

    assert f"none: {default} is not a file\n" in env("--explain")


@pytest.mark.parametrize("count", [0, 4])
def test_what_was_left_open_is_counted(env, monkeypatch, count):
    monkeypatch.setattr(devices, "find", lambda environ: Devices(count, "cuda", "CUDA_VISIBLE_DEVICES"))

    found = env("--explain", "--json", text="distributed_type: MULTI_GPU\nmixed_precision: fp16\n")

    source = "one for each device that is visible" if count else "the default"
    counted = {"value": count or 1, "source": source}
    assert found["settings"]["num_processes"] == found["settings"]["processes_per_machine"] == counted
    assert (found["processes"]["total"], found["ranks"]["last"]) == (count or 1, (count or 1) - 1)


def test_the_place_its_variables_and_what_contradicts_it_are_printed(env):
    text = env(
        "--explain",
        text="distributed_type: MULTI_CPU\nnum_machines: 3\nmain_process_ip: other\n",
        **places.SLURM_TASK_PER_NODE,
    )

    assert "\nplace        SLURM\n" in text
    assert "\n  num_machines=2 (from SLURM (SLURM_STEP_NUM_NODES))\n" in text
    assert "rendezvous   static at node1:" in text
    notes = text.partition("\nnotes\n")[2]
    assert "num_machines=3 (from num_machines in " in notes
    assert "main_process_ip=other (from main_process_ip in " in notes


def test_a_launch_that_would_be_refused_is_refused(env):
    with pytest.raises(ValueError, match=r"num_machines=2 \(from num_machines in .* needs the address"):
        env("--explain", text="distributed_type: MULTI_CPU\nnum_machines: 2\n")


def test_inside_a_launched_script_the_settings_are_those_of_a_launch_there(env):
    remark = {"schema": 1, "origins": {"ACCELERATE_USE_CPU": ["true", "from --cpu", None]}, "told": []}

    found = env("--explain", "--json", ACCELERATE_USE_CPU="true", ACCELERATE_SETTINGS=json.dumps(remark))

    assert found["settings"]["cpu"] == {"value": False, "source": "the default"}


@pytest.mark.parametrize("named", [False, True])
def test_a_broken_file_is_one_of_the_facts(env, tmp_path, named):
    default, file = tmp_path / "accelerate" / "default_config.yaml", tmp_path / "named.yaml"
    broken = "distributed_type: 'NO'\nnum_procesess: 2\n"
    file.write_text(broken)
    words = ["--config_file", str(file)] if named else []

    facts = env("--json", *words, text="" if named else broken)

    assert len(facts) == 9
    told = facts["`Accelerate` config passed" if named else "`Accelerate` default config"]
    assert told.startswith("cannot be used: 'num_procesess' is not a key of a configuration file")
    assert f"in {file if named else default}, line 2" in told


# --- origins -----------------------------------------------------------------------------------------------

MACHINE = Machine("python", Devices(2, "cuda", "CUDA_VISIBLE_DEVICES"), cores=4)


def described(folder: Path, text: str, machine: Machine = MACHINE) -> dict[str, Any]:
    file = folder / "c.yaml"
    file.write_text(f"distributed_type: MULTI_GPU\n{text}")
    request = LaunchRequest.merge({}, config_file.read(file), {}, script="s.py")
    return show.describe(plan(request, machine), request)


def test_a_count_that_follows_from_the_devices_that_were_named_says_so(tmp_path):
    found = described(tmp_path, "gpu_ids: 0,1\n")

    expected = f"one for each of gpu_ids=0,1 (from gpu_ids in {tmp_path / 'c.yaml'}, line 2)"
    assert found["processes"] == {"total": 2, "on_each_machine": 2, "source": expected}


def test_devices_that_are_named_and_not_there_make_no_processes(tmp_path):
    found = described(tmp_path, "gpu_ids: 0,1\n", replace(MACHINE, devices=Devices(0)))

    assert found["processes"] == {"total": 1, "on_each_machine": 1, "source": "the default"}
    assert "gpu_ids=0,1" in found["notes"][0]
    assert "has no use" in found["notes"][0]


def test_cpus_that_nobody_asked_for_are_the_launchers_choice(tmp_path):
    text = "num_processes: 2\nuse_cpu: false\n"

    without = described(tmp_path, text, replace(MACHINE, devices=Devices(0)))["environment"]["ACCELERATE_USE_CPU"]
    there = described(tmp_path, text)["environment"]["ACCELERATE_USE_CPU"]

    assert without == {"value": "true", "source": "the launcher: no accelerator is visible"}
    assert there == {"value": "false", "source": f"from use_cpu in {tmp_path / 'c.yaml'}, line 3"}


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [("gpu_ids: all\n", "gpu_ids", "all"), ("use_cpu: false\n", "cpu", False), ("use_cpu: true\n", "cpu", True)],
)
def test_what_the_file_says_is_never_called_a_default(tmp_path, text, setting, value):
    source = f"from {text.partition(':')[0]} in {tmp_path / 'c.yaml'}, line 2"

    assert described(tmp_path, text)["settings"][setting] == {"value": value, "source": source}
