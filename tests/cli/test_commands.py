"""The other commands, and how fast and light the command line is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from accelerate.commands.accelerate_cli import COMMANDS
from accelerate.commands.config.default import write_basic_config
from accelerate.core.errors import UnsupportedCombination
from accelerate.core.versions import __version__
from accelerate.settings.config_file import load_config_from_file


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "hub"


def accelerate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
        *(["checkpoint", name, "--help"] for name in ("inspect", "verify", "convert")),
        *(["config", name, "--help"] for name in ("default", "update")),
        ["env", "--explain"],
    ],
)
def test_help_and_settings_load_nothing_heavy(hub, words):
    code = f"""
import sys
from accelerate.commands.accelerate_cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
print(sorted(m for m in ("torch", "numpy", "yaml", "psutil", "huggingface_hub", "questionary", "prompt_toolkit") if m in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_without_a_command_the_help_is_shown_and_the_status_is_1(hub):
    done = accelerate()

    assert done.returncode == 1
    assert "launch" in done.stdout


def test_the_help_lists_every_command_with_what_it_does(hub):
    printed = accelerate("--help").stdout
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed
        assert command.text in printed


CONSOLE_SCRIPTS = {
    "accelerate": "accelerate.commands.accelerate_cli:main",
    "accelerate-config": "accelerate.commands.config:main",
    "accelerate-estimate-memory": "accelerate.commands.estimate:main",
    "accelerate-launch": "accelerate.commands.launch:main",
    "accelerate-merge-weights": "accelerate.commands.merge:main",
}


def test_the_programs_of_version_1_are_installed_and_each_can_be_called(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == CONSOLE_SCRIPTS
    for name, place in CONSOLE_SCRIPTS.items():
        module, _, function = place.partition(":")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as end:
            getattr(importlib.import_module(module), function)()
        assert end.value.code == 0
        assert f"usage: {name.replace('-', ' ', 1)}" in capsys.readouterr().out


def test_the_version(hub):
    assert accelerate("--version").stdout == f"accelerate {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lanch"], "'lanch' is not a command. Did you mean 'launch'?"),
        (["estimate-memmory"], "'estimate-memmory' is not a command. Did you mean 'estimate-memory'?"),
        (["tpu_config"], "'tpu_config' is not a command. Did you mean 'tpu-config'?"),
        (["tpu-config"], "tpu_name is not known."),
        (["to-fsdp2"], "the following arguments are required: --config_file"),
        (["estimate-memory", "--dtype", "int8", "x"], "Did you mean '--dtypes'?"),
        (["completion", "csh"], "invalid choice: 'csh'"),
        (["--verbose", "launch"], "unrecognized arguments: --verbose launch"),
        (["config"], "the questions cannot be asked: standard input is not a terminal."),
        (["config", "updat"], "invalid choice: 'updat'"),
        (["config", "default", "--mixed_precison", "no"], "Did you mean '--mixed_precision'?"),
        (["config", "default", "--mixed_precision", "fp32"], "mixed_precision='fp32' is not accepted"),
        (["env", "--config_file", "none.yaml"], "The configuration file none.yaml does not exist."),
    ],
)
def test_a_wrong_command_is_refused_with_status_2_and_asks_nothing(hub, words, expected):
    done = accelerate(*words)

    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_config_default_writes_a_file_that_launch_uses_and_never_overwrites(hub, tmp_path):
    first = accelerate("config", "default", "--mixed_precision", "bf16")
    file = hub / "accelerate" / "default_config.yaml"
    before = file.read_bytes()
    again = accelerate("config", "default")
    (tmp_path / "s.py").touch()

    shown = accelerate("launch", "--dry-run", str(tmp_path / "s.py")).stdout

    assert first.stdout == f"accelerate configuration saved at {file}\n"
    assert json.loads(before)["mixed_precision"] == "bf16"
    assert (again.returncode, file.read_bytes()) == (0, before)
    assert f"{file} exists already" in again.stdout
    assert f"mixed_precision=bf16 (from mixed_precision in {file}, line " in shown
    assert "mixed_precision=bf16" not in accelerate("launch", "--cpu", "--dry-run", str(tmp_path / "s.py")).stdout


def test_write_basic_config_gives_the_keys_of_version_1(hub, tmp_path):
    path = write_basic_config("FP16", str(tmp_path / "deep" / "c.json"))

    assert path == tmp_path / "deep" / "c.json"
    assert json.loads(path.read_text()) == {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "downcast_bf16": False,
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "fp16",
        "num_machines": 1,
        "num_processes": 1,
        "rdzv_backend": "static",
        "same_network": False,
        "tpu_use_cluster": False,
        "tpu_use_sudo": False,
        "use_cpu": True,
    }
    assert load_config_from_file(path).mixed_precision == "fp16"
    assert write_basic_config(save_location=str(path)) is False
    with pytest.raises(UnsupportedCombination, match=r"mixed_precision='fp8' \(the argument .* needs an fp8 engine"):
        write_basic_config("fp8", str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="mixed_precision='fp32' is not known"):
        write_basic_config("fp32", str(tmp_path / "other.json"))


def test_config_default_names_all_devices_when_there_are_several(tmp_path, monkeypatch):
    from accelerate.launch import devices

    monkeypatch.setattr(devices, "find", lambda environ: devices.Devices(4, "cuda", "CUDA_VISIBLE_DEVICES"))

    config = load_config_from_file(write_basic_config("no", str(tmp_path / "c.yaml")))

    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == ("MULTI_GPU", 4, False)


def test_env_prints_the_facts_as_text_and_as_json_and_no_secrets(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = accelerate("env").stdout
    facts = json.loads(accelerate("env", "--json").stdout)

    assert list(facts) == [
        "`Accelerate` version", "Platform", "`accelerate` bash location", "Python version", "Numpy version",
        "PyTorch version", "PyTorch accelerator", "System RAM", "`Accelerate` default config",
    ]  # fmt: skip
    for name, value in facts.items():
        assert f"- {name}: {value}" in text
    assert facts["`Accelerate` default config"] == "Not found"
    assert "hf_secret" not in text


def test_env_describes_the_file_that_is_named(hub, tmp_path):
    write_basic_config("bf16", str(tmp_path / "c.yaml"))

    done = accelerate("env", "--config_file", str(tmp_path / "c.yaml"))

    assert "- `Accelerate` config passed:\n\t- compute_environment: LOCAL_MACHINE\n" in done.stdout
    assert "\t- mixed_precision: bf16\n" in done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_the_self_test_passes_here(hub, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: MULTI_CPU\nnum_processes: {processes}\n")

    done = accelerate("test", "--config_file", str(file))

    assert done.returncode == 0, done.stderr
    assert f"{processes} process" in done.stdout
    assert "self test: 6 checks passed" in done.stdout
    assert done.stdout.splitlines()[-1] == "Test is a success! This machine is ready for training."


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_self_test_notices_a_model_that_has_not_learnt(monkeypatch, precision):
    from accelerate import Accelerator
    from accelerate.test_utils.scripts import test_script

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    test_script.check_training(accelerator)  # a scaler leaves out the first steps, and the comparison heeds that

    def untrained(samples, batch_size, skipped):
        return test_script._flat(test_script._problem(samples)[0])

    monkeypatch.setattr(test_script, "_train_plainly", untrained)
    with pytest.raises(test_script.SelfTestError, match="weights differ from plain torch by"):
        test_script.check_training(accelerator)


def test_the_self_test_notices_a_scaler_that_leaves_out_every_step():
    from accelerate import Accelerator, GradScalerKwargs
    from accelerate.test_utils.scripts import test_script

    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**30, backoff_factor=0.99)]
    )
    with pytest.raises(test_script.SelfTestError, match="every step was left out"):
        test_script.check_training(accelerator)
