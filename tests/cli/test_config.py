"""`accelerate config`: a person at a terminal, nobody at a terminal, and files that are old, there already or in the way."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from accelerate.commands import config as command_of_config
from accelerate.commands import env, launch, saving, test, to_fsdp2, tpu
from accelerate.commands.config import config as command
from accelerate.commands.config import main
from accelerate.commands.config.default import write_basic_config
from accelerate.core.errors import SettingError
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file
from tests.support.terminal import CONTROL_C, CONTROL_D, DOWN, ENTER, Person


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache folder, and no device."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "hub" / "accelerate"


ON_CPU = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "NO",
    "downcast_bf16": False,
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": False,
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}


# A person ------------------------------------------------------------------------------------------------------------


def test_a_person_answers_by_arrows_letters_numbers_and_enter_and_launch_uses_the_file(hub, tmp_path):
    person = Person.runs_accelerate("config")
    person.answers("How shall scripts run?", DOWN, ENTER)
    person.answers("How many machines take part?", ENTER)
    person.answers("How many processes?", "3x", ENTER)
    person.answers("'3x' is not a number from 1", "\x7f", ENTER)
    person.answers("Compare the tensors", "y")
    person.answers("Compile models", "y")
    person.answers("By which back-end?", DOWN, ENTER)
    person.answers("In which mode?", ENTER)
    person.answers("Refuse graph breaks?", "n")
    person.answers("Do shapes change", ENTER)
    person.answers("Compile repeated blocks once?", ENTER)
    person.answers("In which numbers", DOWN, DOWN, ENTER)
    assert not hub.exists(), "nothing is written before the last answer"
    file = hub / "default_config.yaml"
    person.waits_for("Run a script with it: accelerate launch script.py")

    assert person.status() == 0
    assert person.finds_the_terminal_as_it_was
    assert f"accelerate configuration saved at {file}" in person.text
    assert yaml.safe_load(file.read_text()) == {
        **ON_CPU,
        "distributed_type": "MULTI_CPU",
        "num_processes": 3,
        "debug": True,
        "mixed_precision": "bf16",
        "dynamo_config": {
            "dynamo_backend": "EAGER",
            "dynamo_mode": "default",
            "dynamo_use_fullgraph": False,
            "dynamo_use_regional_compilation": False,
        },
    }
    (tmp_path / "script.py").touch()
    planned = accelerate("launch", "--dry-run", str(tmp_path / "script.py")).stdout
    assert f"num_processes=3 (from num_processes in {file}, line " in planned
    assert f"mixed_precision=bf16 (from mixed_precision in {file}, line " in planned


@pytest.mark.parametrize(("key", "status"), [(CONTROL_C, 130), (CONTROL_D, 130)])
def test_whoever_has_enough_leaves_nothing_behind(hub, tmp_path, key, status):
    person = Person.runs_accelerate("config")
    person.answers("How shall scripts run?", DOWN, ENTER)
    person.answers("How many machines take part?", key)

    assert person.status() == status
    assert person.finds_the_terminal_as_it_was
    assert "accelerate config: nothing was written." in person.text
    assert "Traceback" not in person.text
    assert list(tmp_path.rglob("*")) == []


def test_a_file_that_is_there_is_replaced_only_by_agreement(hub, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    for key, expected in (("n", {}), (ENTER, ON_CPU)):
        person = Person.runs_accelerate("config", "--config_file", str(file))
        person.answers("How shall scripts run?", ENTER)
        person.answers("Compile models", ENTER)
        person.answers("In which numbers", ENTER)
        person.answers("is there already. Replace it?", key)
        assert person.status() == 0
        assert json.loads(file.read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


# Nobody --------------------------------------------------------------------------------------------------------------


def accelerate(*words: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.run(
        [sys.executable, "-m", "accelerate", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_without_a_terminal_nothing_waits_and_what_to_run_is_said(hub):
    read, write = os.pipe()  # never written to, and never closed: a read would wait for ever
    try:
        done = accelerate("config", stdin=read)
    finally:
        os.close(read)
        os.close(write)

    assert done.returncode == 2
    assert "the questions cannot be asked: standard input is not a terminal." in done.stderr
    assert "accelerate config default [--mixed_precision bf16] [--config_file FILE]" in done.stderr
    assert not hub.exists()


def test_a_terminal_that_nobody_looks_at_is_none(hub):
    master, slave = os.openpty()
    try:
        done = accelerate("config", stdin=slave)
    finally:
        os.close(master)
        os.close(slave)
    assert (done.returncode, "standard output is not a terminal" in done.stderr) == (2, True)


def test_a_terminal_without_a_cursor_is_none(hub):
    person = Person.runs_accelerate("config", TERM="dumb")
    assert person.status() == 2
    assert "this terminal cannot move its cursor (TERM=dumb)" in person.text


# Places --------------------------------------------------------------------------------------------------------------


def test_what_is_in_the_way_is_said_before_the_first_question(hub, tmp_path):
    (tmp_path / "file").touch()
    person = Person.runs_accelerate("config", "--config_file", str(tmp_path / "file" / "c.yaml"))
    assert person.status() == 2
    assert f"{tmp_path}/file is not a folder" in person.text
    assert "How shall" not in person.text


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HOME": "hh"}, "hh/accelerate"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/accelerate"),
        ({"HOME": "home"}, "home/.cache/huggingface/accelerate"),
        ({"HF_HOME": "hh2", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "hh2/accelerate"),
    ],
)
def test_the_default_file_lies_where_the_variables_say(tmp_path, variables, place):
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    environment |= {name: str(tmp_path / value) for name, value in variables.items()}
    done = accelerate("config", "default", env=environment | {"CUDA_VISIBLE_DEVICES": ""})

    file = tmp_path / place / "default_config.yaml"
    assert done.stdout == f"accelerate configuration saved at {file}\n"
    assert json.loads(file.read_text()) == ON_CPU


@pytest.mark.parametrize("words", [["config", "default"], ["config", "--config_file", "/proc/none/c.yaml", "default"]])
def test_a_home_that_cannot_be_written_to_is_an_error_with_a_remedy(words):
    environment = {**os.environ, "HOME": "/proc/none", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    done = accelerate(*words, env=environment)

    assert done.returncode == 2
    assert done.stderr.startswith("accelerate config: error: /proc/none/")
    assert "cannot be written" in done.stderr
    assert "--config_file, or set HF_HOME to a folder that this user may write to." in done.stderr
    assert "Traceback" not in done.stderr


def test_no_home_at_all_is_an_error_where_a_file_is_written_and_nowhere_else(tmp_path, monkeypatch):
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    for place in (config_file, saving):
        monkeypatch.setattr(place, "NO_HOME", tmp_path / "nonexistent")
    path = config_file.default_file()

    assert not path.is_file()
    with pytest.raises(SettingError, match=r"there is no home folder \(the variable HOME is not set.*\n.*HF_HOME"):
        write_basic_config("no", str(path))
    assert list(tmp_path.iterdir()) == []


# Old files -----------------------------------------------------------------------------------------------------------

SAGEMAKER = """\
compute_environment: AMAZON_SAGEMAKER
distributed_type: 'NO'
mixed_precision: 'no'
ec2_instance_type: ml.p3.2xlarge
iam_role_name: role
"""
OLD_FILES = [
    ("distributed_type: 'NO'\nfp16: true\n", {"mixed_precision": "fp16", "use_cpu": False}),
    ("distributed_type: NO\nmixed_precision: no\nuse_cpu: yes\n", {}),
    ("distributed_type: 'NO'\nfp16: true\nmixed_precision: bf16\nuse_cpu: true\n", {"mixed_precision": "bf16"}),
    (
        "distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: 'no'\ndynamo_backend: INDUCTOR\n",
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 4,
            "use_cpu": False,
            "dynamo_config": {"dynamo_backend": "INDUCTOR"},
        },
    ),
    ("distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: 'no'\ndynamo_backend: 'NO'\n", {}),
    (
        "distributed_type: FSDP\nuse_cpu: false\nmixed_precision: 'no'\nnum_processes: 2\nfsdp_config:\n  fsdp_version: 2\n",
        {"distributed_type": "FSDP", "num_processes": 2, "use_cpu": False, "fsdp_config": {"fsdp_version": 2}},
    ),
    (json.dumps(ON_CPU), {}),
    (
        SAGEMAKER,
        {key: None for key in ON_CPU if key.startswith(("tpu", "downcast", "m", "num_p", "rdzv", "same"))}
        | {
            "compute_environment": "AMAZON_SAGEMAKER",
            "ec2_instance_type": "ml.p3.2xlarge",
            "iam_role_name": "role",
            "base_job_name": "accelerate-sagemaker-1",
            "gpu_ids": "all",
            "mixed_precision": "no",
            "py_version": "py38",
            "pytorch_version": "1.10.2",
            "region": "us-east-1",
            "transformers_version": "4.17.0",
            "use_cpu": False,
        },
    ),
]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize(("text", "changed"), OLD_FILES)
def test_update_writes_an_old_file_in_todays_form(tmp_path, capsys, text, changed, suffix):
    file = tmp_path / f"c{suffix}"
    file.write_text(json.dumps(yaml.safe_load(text)) if suffix == ".json" else text)

    main(["update", "--config_file", str(file)])

    *told, last = capsys.readouterr().out.splitlines()
    assert last == f"Successfully updated the configuration file at {file}."
    assert [line.partition(" ")[0] for line in told] == (["fp16"] if "fp16: true\nmixed" in text else [])
    expected = {key: value for key, value in (ON_CPU | changed).items() if value is not None}
    assert yaml.safe_load(file.read_text()) == expected
    assert file.read_text().startswith("{") == (suffix == ".json")
    before = file.read_text()
    main(["update", "--config-file", str(file)])
    assert file.read_text() == before


LAUNCHED = [
    *(text for text, _ in OLD_FILES if "FSDP" not in text and "SAGEMAKER" not in text),
    "distributed_type: MULTI_CPU\nnum_processes: 2\nfp16: 'yes'\nmixed_precision: null\n",
    "distributed_type: MULTI_CPU\nnum_processes: 2\nfp16: false\n",
    "distributed_type: MULTI_CPU\nnum_processes: 2\ndynamo_backend: aot_eager\ndynamo_config: {mode: default}\n",
    "distributed_type: MULTI_CPU\nnum_processes: 2\nipex_config: {ipex: false}\nmpirun_config: {mpirun_ccl: '1'}\n",
    "distributed_type: MULTI_GPU\ngpu_ids: 0,1\nenable_cpu_affinity: 'yes'\nmain_process_port: '2900'\nrdzv_backend: c10d\n",
]


@pytest.mark.parametrize("text", LAUNCHED)
def test_an_old_file_is_launched_as_the_one_that_update_makes_of_it(tmp_path, text):
    def launched() -> LaunchRequest:
        return LaunchRequest.merge({}, config_file.read(file), {}, script="s.py")

    file = tmp_path / "c.yaml"
    file.write_text(text)
    lines = text.splitlines()
    old = launched()
    for name, origin in old.origins.items():  # each names the line that says it
        key, _, place = origin.removeprefix("from ").partition(f" in {file}, line ")
        assert key.rpartition(".")[2] in lines[int(place) - 1], (name, origin)

    main(["update", "--config_file", str(file)])

    assert launched() == old


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("ipex_config: {ipex: true}\n", "ipex_config", 2),
        ("mpirun_config:\n  mpirun_ccl: '1'\n", "mpirun_config.mpirun_ccl", 3),
    ],
)
def test_a_key_that_was_retired_is_told_and_left_out(tmp_path, capsys, text, key, line):
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: MULTI_CPU\n{text}")
    note = f"{key} in {file}, line {line} is left out: "

    request = LaunchRequest.merge({}, config_file.read(file), {}, script="s.py")
    main(["update", "--config_file", str(file)])

    assert request.notes[0].startswith(note)
    assert note in capsys.readouterr().out
    assert key.rpartition(".")[2] not in file.read_text()


@pytest.mark.parametrize(
    ("text", "keys", "lines"),
    [
        ("dynamo_config:\n  backend: eager\n  dynamo_backend: inductor\n", ("backend", "dynamo_backend"), (3, 4)),
        ("dynamo_backend: EAGER\ndynamo_config:\n  backend: inductor\n", ("dynamo_backend", "backend"), (2, 4)),
        ("fsdp_config:\n  version: 1\n  fsdp_version: 2\n", ("version", "fsdp_version"), (3, 4)),
    ],
)
def test_two_spellings_of_one_key_are_the_same_key_twice(tmp_path, text, keys, lines):
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: MULTI_CPU\n{text}")

    with pytest.raises(SettingError) as caught:
        config_file.read(file)

    assert all(f"{key} in {file}, line {line}" in str(caught.value) for key, line in zip(keys, lines, strict=True))
    assert "are two spellings of one key" in str(caught.value)


@pytest.mark.parametrize("text", ["distributed_type: 'NO'\nnum_procesess: 2\n", "", "distributed_type: NONE\n"])
def test_update_leaves_a_file_alone_that_it_does_not_understand(tmp_path, capsys, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["update", "--config_file", str(file)])
    assert end.value.code == 2
    assert file.read_text() == text
    assert str(file) in capsys.readouterr().err


def test_a_file_that_stands_before_update_is_not_passed_over(hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config_file", str(tmp_path / "c.yaml"), "update"])
    assert end.value.code == 2
    assert "--config_file stands before `update`.\nWrite it behind" in capsys.readouterr().err


def test_update_without_a_name_takes_the_default_file(hub, capsys):
    with pytest.raises(SystemExit) as end:
        main(["update"])
    assert end.value.code == 2
    assert "does not exist" in capsys.readouterr().err
    main(["--config_file", str(hub / "default_config.yaml"), "default", "--mixed_precision", "bf16"])
    main(["update"])
    assert yaml.safe_load((hub / "default_config.yaml").read_text()) == {**ON_CPU, "mixed_precision": "bf16"}


COMMANDS = {
    "launch": (launch, ["--dry-run", "--config_file=~/c.yaml", "s.py"]),
    "test": (test, ["--dry-run", "--config_file=~/c.yaml"]),
    "env": (env, ["--json", "--config_file=~/c.yaml"]),
    "env --explain": (env, ["--explain", "--config_file=~/c.yaml"]),
    "config update": (command_of_config, ["update", "--config_file=~/c.yaml"]),
    "tpu-config": (tpu, ["--debug", "--config_file=~/c.yaml"]),
    "to-fsdp2": (to_fsdp2, ["--config_file=~/c.yaml", "--output_file=~/d.yaml"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_finds_the_file_that_config_wrote_below_the_home_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").touch()
    main(["default", "--config_file=~/c.yaml"])
    pod = {"tpu_name": "pod", "tpu_zone": "zone", "commands": ["pwd"]} if name == "tpu-config" else {}
    (tmp_path / "c.yaml").write_text(json.dumps({**json.loads((tmp_path / "c.yaml").read_text()), **pod}))
    capsys.readouterr()

    module, words = COMMANDS[name]
    module.main(words)

    assert capsys.readouterr().out


# Writing -------------------------------------------------------------------------------------------------------------


def config() -> config_file.ClusterConfig:
    return config_file.ClusterConfig("LOCAL_MACHINE", "NO", "no", use_cpu=True, debug=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch, call):
    file = tmp_path / "c.yaml"
    file.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SettingError, match="No space left on device"):
        command.save(config(), file)
    monkeypatch.undo()

    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_link_stays_a_link_and_who_may_read_a_file_stays_so(tmp_path):
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.write_text("before")
    target.chmod(0o600)
    link.symlink_to(target)

    command.save(config(), link)

    assert link.is_symlink()
    assert yaml.safe_load(target.read_text())["distributed_type"] == "NO"
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["", "pipe"])
def test_a_folder_or_a_pipe_is_not_written_to(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingError, match="cannot be written: it is"):
        saving.save_text(tmp_path / name, "text")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["pipe"]
