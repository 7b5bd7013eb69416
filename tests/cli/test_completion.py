"""`accelerate completion`: the scripts, run by real shells."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accelerate.commands import completion
from accelerate.commands.accelerate_cli import COMMANDS
from accelerate.commands.completion import SHELLS, main
from accelerate.commands.launch import launch_command_parser
from tests.support.terminal import Person


@pytest.fixture
def script(tmp_path, capsys) -> Path:
    """The script for bash."""
    pytest.importorskip("shtab", reason="needs the package shtab")
    main(["bash"])
    file = tmp_path / "completion.bash"
    file.write_text(capsys.readouterr().out)
    return file


def completed(script: Path, *lines: list[str], folder: Path | None = None) -> list[list[str]]:
    """Return what bash offers for the last word of each line."""
    if shutil.which("bash") is None:
        pytest.skip("needs the program bash")
    program = [
        f"source {shlex.quote(str(script))}",
        "function=$(complete -p accelerate | sed 's/.*-F \\([^ ]*\\).*/\\1/')",
    ]
    for words in lines:
        program.append(f"COMP_WORDS=({' '.join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}")
        program.append('COMPREPLY=(); $function; echo "${COMPREPLY[*]}"')
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(program)], capture_output=True, text=True, timeout=60, check=True, cwd=folder
    )
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def test_every_command_and_every_flag_of_launch_is_completed(script):
    commands, flags, of_test = completed(
        script, ["accelerate", ""], ["accelerate", "launch", "--"], ["accelerate", "test", "--"]
    )

    assert set(commands) >= set(COMMANDS)
    # One spelling of each: the tab key would stop at every dash to ask which of the two is meant.
    actions = launch_command_parser()._actions
    expected = {
        next(name for name in item.option_strings if name[:2] == "--") for item in actions if item.option_strings
    }
    assert set(flags) == expected
    assert set(of_test) == expected - {"--preflight", "--module", "--no_python", "--run_path"} | {"--time_limit"}


def test_each_command_is_completed_from_its_first_letters(script):
    lines = [["accelerate", name[:4]] for name in COMMANDS]
    for name, found in zip(COMMANDS, completed(script, *lines), strict=True):
        assert name in found


def test_subcommands_values_and_files_are_completed(script, tmp_path):
    (tmp_path / "here.py").touch()
    (tmp_path / "folder").mkdir()
    found = completed(
        script,
        ["accelerate", "config", ""],
        ["accelerate", "config", "default", "--mi"],
        ["accelerate", "launch", "--mixed_precision", ""],
        ["accelerate", "estimate-memory", "x", "--dtypes", "float3"],
        ["accelerate", "launch", "he"],
        ["accelerate", "launch", "--config_file", "he"],
        ["accelerate", "checkpoint", "inspect", "f"],
        folder=tmp_path,
    )
    assert found[0] == ["default", "update"]
    assert found[1] == ["--mixed_precision"]
    assert set(found[2]) == {"no", "fp16", "bf16", "fp8"}
    assert found[3:] == [["float32"], ["here.py"], ["here.py"], ["folder"]]


def test_the_tab_key_completes_in_a_shell_that_a_person_types_into(script):
    if shutil.which("bash") is None:
        pytest.skip("needs the program bash")
    person = Person("bash", "--norc", "--noprofile", PS1="ready> ", INPUTRC="/dev/null")
    person.answers("ready> ", f"source {script}\r")
    person.answers("ready> ", "accelerate est\t")
    person.answers("accelerate estimate-memory ", "--js\t")
    person.waits_for("--json ")
    person.presses("\x15", "exit\r")
    assert person.status() == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_can_read_its_script(shell, capsys, tmp_path):
    pytest.importorskip("shtab", reason="needs the package shtab")
    main([shell])
    text = capsys.readouterr().out
    assert "estimate-memory" in text and "num_processes" in text
    if shutil.which(shell) is None:
        pytest.skip(f"needs the program {shell} to go on")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


def test_without_shtab_the_remedy_is_named(monkeypatch, capsys):
    def missing(*_: object) -> bool:
        return False

    monkeypatch.setattr("accelerate.core.available.is_installed", missing)
    with pytest.raises(SystemExit) as end:
        main(["bash"])
    assert end.value.code == 2
    assert "`accelerate completion` needs the package 'shtab'" in (error := capsys.readouterr().err)
    assert "pip install 'accelerate[completion]'" in error


def test_no_torch_is_loaded_to_write_the_script():
    pytest.importorskip("shtab", reason="needs the package shtab")
    code = f"import sys; from {completion.__name__} import main; main(['zsh']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
