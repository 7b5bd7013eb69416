"""Names that torch's agent is given: those that nobody offers are refused before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.core.errors import LaunchError, SettingError
from accelerate.launch import elastic, registry
from accelerate.launch.plan import LaunchPlan, Rendezvous


def dry_run(*words: str) -> None:
    launch_command(launch_command_parser().parse_args(["--dry-run", "--cpu", "-n", "2", *words, __file__]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rdzv_backend", "foo"], "rdzv_backend='foo' (from --rdzv_backend) is no way to meet that anybody offers here."),
        (["--rdzv_backend", "etcd-v2"], "rdzv_backend=etcd-v2 (from --rdzv_backend) needs the package python-etcd"),
        (["--event_log_handler", "foo"], "event_log_handler='foo' (from --event_log_handler) is not known to torch."),
        (["--logs_specs", "foo"], "logs_specs='foo' is not registered (from --logs_specs)."),
        (["--rdzv_conf", "join_timeout=abc"], "join_timeout=abc (from --rdzv_conf) cannot be read."),
        (["--signals_to_handle", "SIGKILL"], "signals_to_handle names 'SIGKILL' (from --signals_to_handle), which no process"),
        (["--local_addr", "no such!host"], "local_addr=no such!host (from --local_addr) is no address."),
        (["--tee", "99"], "tee='99' (from --tee) names no streams."),
        (["--log_dir", "{file}"], "log_dir={file} (from --log_dir) cannot be used: {file} is no folder."),
        (["--log_dir", "{file}/x/y"], "cannot be used: {file} is no folder."),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_a_run_would_choke_on(tmp_path, monkeypatch, words, expected):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(SettingError) as caught:
        dry_run(*(word.format(file=file) for word in words))

    assert expected.format(file=file) in str(caught.value)


def test_what_packages_offer_is_accepted(monkeypatch):
    groups = {registry.BACKENDS_GROUP: {"theirs"}, registry.LOGS_GROUP: {"default"}}
    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda *, group: SimpleNamespace(names=groups[group])
    )
    values: dict[str, Any] = {"rdzv_backend": "theirs", "event_log_handler": "null", "logs_specs": "default"}

    registry.check_names(values, dict.fromkeys(values, "a test"))


def test_a_script_with_a_name_that_no_file_can_have_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("x" * 5000, "x\0.py"):
        with pytest.raises(SettingError, match="does not exist") as caught:
            launch_command(launch_command_parser().parse_args(["--dry-run", name]))
        assert len(str(caught.value)) < 1000


def test_a_folder_for_logs_that_cannot_be_made_after_all_is_named(tmp_path):
    (tmp_path / "logs").touch()
    logs = {"log_dir": str(tmp_path / "logs"), "described_log_dir": "log_dir=logs (from --log_dir)"}
    plan = LaunchPlan(kind="elastic", argv=("true",), env={}, **logs)

    with pytest.raises(SettingError, match=r"^log_dir=logs \(from --log_dir\) cannot be used: File exists\."):
        elastic.run(plan)


def test_a_folder_for_one_rank_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").touch()

    with pytest.raises(SettingError, match=r"^log_dir=logs \(from --log_dir\) cannot be used: .*rank_0: File exists\."):
        launch_command(launch_command_parser().parse_args(["--cpu", "-n", "2", "--log_dir", "logs", "s.py"]))


@pytest.mark.skipif(os.name != "posix", reason="a form of programs that others do not have")
def test_a_program_that_cannot_be_run_is_named_for_several_processes_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, problem in (("echo hi", "Exec format error"), ("#!/no/such/program", "No such file or directory")):
        program = tmp_path / "p.sh"
        program.write_text(text)
        program.chmod(0o755)
        for count in ("1", "2"):
            with pytest.raises(LaunchError, match=f"'./p.sh' cannot be run: {problem}"):
                launch_command(launch_command_parser().parse_args(["--cpu", "-n", count, "--no_python", "./p.sh"]))


def test_a_way_to_meet_that_a_notebook_has_registered_is_accepted(monkeypatch):
    def plan(name: str) -> LaunchPlan:
        return LaunchPlan(kind="elastic", argv=(), env={}, nodes=2, rendezvous=Rendezvous(name, "a:1"))

    monkeypatch.setitem(vars(rendezvous_handler_registry)["_registry"], "ours", lambda parameters: None)

    assert elastic.launch_config(plan("ours")).rdzv_backend == "ours"
    with pytest.raises(SettingError, match="rdzv_backend='foo' .* is no way to meet"):
        elastic.launch_config(plan("foo"))


def test_a_folder_for_logs_is_not_made_by_looking_at_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    dry_run("--log_dir", str(tmp_path / "a" / "b"))

    assert list(tmp_path.iterdir()) == []
    assert Path(__file__).name in capsys.readouterr().out
