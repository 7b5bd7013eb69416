"""`accelerate tpu-config`: the command line for gcloud, and running it."""

from __future__ import annotations

import json
import sys

import pytest

from accelerate.commands.tpu import main

POD = ["--tpu_name", "pod", "--tpu_zone", "us-central1-a"]
HEAD = "Running gcloud compute tpus tpu-vm ssh pod --zone us-central1-a --command cd /usr/share; "
FILE = "distributed_type: 'NO'\ntpu_name: pod\ntpu_zone: us-central1-a\n"


@pytest.fixture(autouse=True)
def no_default_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A gcloud that notes its words, and ends with the status in GCLOUD_STATUS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "gcloud"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(tmp_path / 'words')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        "sys.exit(int(os.environ.get('GCLOUD_STATUS', 0)))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return tmp_path / "words"


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--command", "ls"], "ls"),
        (["--command", "ls", "--command", "echo hi"], "ls; echo hi"),
        (["--command", "ls", "echo hi"], "ls; echo hi"),
        (["--command", "ls", "--install_accelerate"], "pip install accelerate -U; ls"),
        (
            ["--command", "ls", "--install-accelerate", "--accelerate_version", "1.2.3"],
            "pip install accelerate==1.2.3; ls",
        ),
        (
            ["--command", "ls", "--install_accelerate", "--accelerate_version", "dev"],
            "pip install git+https://github.com/huggingface/accelerate.git; ls",
        ),
    ],
)
def test_debug_prints_the_command_line_of_version_1(capsys, flags, printed):
    main([*POD, *flags, "--debug"])
    assert capsys.readouterr().out == f"{HEAD}{printed} --worker all\n"


def test_alpha_stands_behind_gcloud(capsys):
    main([*POD, "--command", "ls", "--use_alpha", "--debug"])
    assert capsys.readouterr().out.startswith("Running gcloud alpha compute tpus")


def test_a_file_holds_one_command_in_each_line(tmp_path, capsys):
    (tmp_path / "commands").write_text('echo a\n\n  echo "b c"  \n')
    main([*POD, "--command_file", str(tmp_path / "commands"), "--debug"])
    assert capsys.readouterr().out == f'{HEAD}echo a; echo "b c" --worker all\n'


@pytest.mark.parametrize("is_default", [True, False])
def test_the_configuration_file_says_what_the_flags_leave_open(tmp_path, capsys, is_default):
    file = tmp_path / "hub" / "accelerate" / "default_config.yaml" if is_default else tmp_path / "c.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FILE + "commands: [echo one, echo two]\n")
    named = [] if is_default else ["--config_file", str(file)]

    main([*named, "--debug"])
    main([*named, "--command", "ls", "--tpu_name", "other", "--debug"])

    assert capsys.readouterr().out.splitlines() == [
        f"{HEAD}echo one; echo two --worker all",
        f"{HEAD.replace('pod', 'other')}ls --worker all",
    ]


def test_a_broken_default_file_is_not_read_where_the_flags_say_all(tmp_path, capsys):
    file = tmp_path / "hub" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("bad: 1")

    main([*POD, "--command", "ls", "--debug"])

    assert capsys.readouterr().out == f"{HEAD}ls --worker all\n"
    with pytest.raises(SystemExit):
        main([*POD, "--debug"])
    with pytest.raises(SystemExit):
        main([*POD, "--command", "ls", "--debug", "--config_file", str(file)])


def test_gcloud_gets_each_word_as_it_is_and_no_shell_reads_them(tmp_path, gcloud, capsys):
    evil = f"echo $(touch {tmp_path}/evil); `touch {tmp_path}/evil` > {tmp_path}/evil"
    main([*POD, "--command", evil])

    assert json.loads(gcloud.read_text()) == [
        "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-central1-a",
        "--command", f"cd /usr/share; {evil}", "--worker", "all",
    ]  # fmt: skip
    assert not (tmp_path / "evil").exists()
    assert capsys.readouterr().out == "The commands ran on all machines of the pod.\n"


def test_the_status_of_gcloud_is_ours(gcloud, monkeypatch, capsys):
    monkeypatch.setenv("GCLOUD_STATUS", "7")
    with pytest.raises(SystemExit) as end:
        main([*POD, "--command", "ls"])
    assert end.value.code == 7
    assert capsys.readouterr().out == ""


def test_debug_runs_nothing(gcloud):
    main([*POD, "--command", "ls", "--debug"])
    assert not gcloud.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--command", "ls"], "tpu_name is not known."),
        (["--tpu_name", "pod", "--command", "ls"], "tpu_zone is not known."),
        (POD, "There is no command to run on the pod."),
        ([*POD, "--command", "ls", "--command_file", "f"], "--command_file and --command both say what to run."),
        ([*POD, "--command_file", "nowhere"], "The file with commands nowhere cannot be read"),
        (["--tpu_name=--flags-file=x", "--tpu_zone", "z", "--command", "ls"], "is not a name."),
        (
            [*POD, "--command", "ls", "--install_accelerate", "--accelerate_version", "newest; rm -rf /"],
            "accelerate_version='newest; rm -rf /' is not a version (from --accelerate_version).",
        ),
        (
            [*POD, "--command", "ls", "-la"],
            "-la is not a flag of accelerate tpu-config.\nA command with flags of its own is",
        ),
        (["--config_file", "nowhere.yaml", "--debug"], "The configuration file nowhere.yaml does not exist."),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_said_with_status_2(gcloud, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not gcloud.exists()


def test_without_gcloud_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main([*POD, "--command", "ls"])
    assert end.value.code == 2
    assert "`gcloud` is not on the PATH.\nInstall the Google Cloud CLI" in capsys.readouterr().err


def test_what_would_have_no_effect_is_refused_or_told(tmp_path, gcloud, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*POD, "--command", "ls", "--accelerate_version", "1.2.3"])
    assert ended.value.code == 2
    assert "accelerate_version='1.2.3' has no effect: nothing is installed" in capsys.readouterr().err

    file = tmp_path / "c.yaml"
    file.write_text(f"{FILE}tpu_use_sudo: true\ntpu_env: ['A=1']\ncommands: ['ls']\n")
    main(["--config_file", str(file), "--debug"])

    told = capsys.readouterr().err
    for key in ("tpu_use_sudo", "tpu_env"):
        assert f"accelerate tpu-config: {key} in the configuration file has no effect" in told
