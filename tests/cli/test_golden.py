"""Every name, flag and default of the command line of Accelerate 1.15 is there, in both spellings."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from accelerate.commands.launch import launch_command_parser
from accelerate.commands.launching import request_from
from accelerate.commands.options import ENGINE_FLAGS, OPTIONS
from accelerate.core.errors import UnsupportedCombination
from accelerate.settings.config_file import ClusterConfig, SageMakerConfig
from accelerate.settings.config_keys import SECTIONS

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "command_line.json").read_text(encoding="utf-8"))

PARSERS = {
    "config": ("config", "get_config_parser"),
    "config default": ("config", "get_config_parser"),
    "config update": ("config", "get_config_parser"),
    "env": ("env", "env_command_parser"),
    "estimate-memory": ("estimate", "estimate_command_parser"),
    "launch": ("launch", "launch_command_parser"),
    "merge-weights": ("merge", "merge_command_parser"),
    "test": ("test", "test_command_parser"),
    "to-fsdp2": ("to_fsdp2", "to_fsdp2_command_parser"),
    "tpu-config": ("tpu", "tpu_command_parser"),
}
"""Command -> module, and the function that makes its parser."""

MISSPELT = {"torhchxla_trace_once"}
"""Choices that 1.15 misspells, and then refuses itself."""


def parser_of(command: str) -> argparse.ArgumentParser:
    module, function = PARSERS[command]
    parser = getattr(importlib.import_module(f"accelerate.commands.{module}"), function)()
    for word in command.split()[1:]:
        nested = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = nested.choices[word]
    return parser


def kind_of(action: argparse.Action) -> str:
    names = {
        argparse._StoreTrueAction: "store_true",
        argparse._StoreConstAction: "store_const",
        argparse._AppendAction: "append",
        argparse._HelpAction: "help",
    }
    return next((name for kind, name in names.items() if isinstance(action, kind)), "store")


def missing(command: str) -> list[str]:
    """Return what a command lacks, or has in another way."""
    parser = parser_of(command)
    found = []
    for expected in GOLDEN["commands"][command]["options"]:
        for flag in expected["flags"]:
            action = parser._option_string_actions.get(flag)
            if action is None:
                found.append(flag)
                continue
            default = expected.get("default")
            if default == "(False, False, False)":
                default = (False, False, False)
            if isinstance(default, str) and default.startswith("~/"):
                default = action.default  # a path of the machine
            seen = (action.dest, kind_of(action), action.default if kind_of(action) != "help" else None)
            wanted = (expected["dest"], expected["action"], default)
            choices = set(expected.get("choices") or ()) - MISSPELT - set(action.choices or ())
            if seen != wanted or (action.choices and choices):
                found.append(f"{flag}: {seen} is not {wanted}, choices {choices}")
    places = [
        action.dest for action in parser._actions if not action.option_strings and action.nargs != argparse.PARSER
    ]
    if places[: len(GOLDEN["commands"][command]["positionals"])] != GOLDEN["commands"][command]["positionals"]:
        found.append(f"positionals {places}")
    return found


@pytest.mark.parametrize("command", GOLDEN["commands"])
def test_a_command_has_every_flag_with_its_default(command):
    assert missing(command) == []


def test_the_table_names_all_commands():
    assert set(PARSERS) == set(GOLDEN["commands"])


# --- launch ------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "s.py").touch()
    return str(tmp_path / "s.py")


PARSER = launch_command_parser()


def words_for(option: Any) -> list[str]:
    """Return the option as it is given with its own default, or any value."""
    if option.kind is bool:
        return [option.spelling]
    default = option.choices[0] if option.choices else "1"
    value = option.default if option.default is not None and not isinstance(option.default, tuple) else default
    return [option.spelling, str(value)]


@pytest.mark.parametrize("option", ENGINE_FLAGS, ids=lambda option: option.spelling)
def test_a_flag_whose_engine_is_missing_is_refused_by_name_even_at_its_default(script, option):
    args = PARSER.parse_args([*words_for(option), script])

    with pytest.raises(UnsupportedCombination) as caught:
        request_from(args)

    assert option.spelling in str(caught.value)
    assert option.engine in str(caught.value)


def test_every_flag_is_known_as_given_in_both_spellings_and_at_its_default(script):
    for option in OPTIONS:
        flag, *value = words_for(option)
        for spelling in {flag, f"--{flag[2:].replace('_', '-')}", f"--{flag[2:].replace('-', '_')}"}:
            args = PARSER.parse_args([spelling, *value, script])
            assert args.nondefault == {option.name}, spelling
            assert args.training_script == script
    assert not hasattr(PARSER.parse_args([script]), "nondefault")


def test_a_secret_is_not_repeated(script):
    with pytest.raises(UnsupportedCombination) as caught:
        request_from(PARSER.parse_args(["--aws_secret_access_key", "hush", script]))

    assert "hush" not in str(caught.value)


def test_the_help_shows_the_common_flags_and_help_all_the_rest(capsys):
    with pytest.raises(SystemExit):
        PARSER.parse_args(["--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        PARSER.parse_args(["--help-all"])
    full = capsys.readouterr().out

    assert ended.value.code == 0
    assert 20 <= sum(line.startswith("  -") for line in short.splitlines()) <= 30
    assert [option.spelling for option in OPTIONS if option.spelling not in full] == []
    named, _, refused = full.partition("engines (not in this version):")
    assert "--rdzv_conf" in named
    assert [option.spelling for option in ENGINE_FLAGS if option.spelling not in refused] == []
    assert "Degree of" not in refused, "what does not work is listed, not explained"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "two", "s.py"], "num_processes='two' is not accepted (from --num_processes).\nAccepted: an integer.\n"),
        (["--monitor_interval=x", "s"], "'x' is not accepted (from --monitor_interval).\nAccepted: a number.\n"),
        (["--num-machines", "x", "s"], "'x' is not accepted (from --num_machines).\nAccepted: a number of machines"),
        (["--mixed-precision", "fp32", "s"], "(from --mixed_precision).\nAccepted: 'no', 'fp8', 'fp16', 'bf16'.\n"),
        (["-n"], "--num_processes: expected one argument\n"),
        (["--cpu=yes", "s.py"], "--cpu: ignored explicit argument 'yes'\n"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_what_would(capsys, words, said):
    with pytest.raises(SystemExit):
        PARSER.parse_args(words)

    printed = capsys.readouterr().err
    assert said in printed
    assert "/" not in printed.partition("error: ")[2], "one spelling"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--nump", "--num_processes"),
        ("--num_proc", "--num_processes"),
        ("--num_procs", "--num_processes"),
        ("--Num-Processes", "--num_processes"),
        ("--np", "--nproc_per_node"),
        ("--port", "--main_process_port"),
        ("--ip", "--main_process_ip"),
        ("--conf", "--config_file"),
        ("--config", "--config_file"),
        ("--gpu", "--gpu_ids"),
        ("--mixed_precison", "--mixed_precision"),
        ("--accumulation_steps", "--gradient_accumulation_steps"),
        ("--fsdp", "--fsdp_version"),
        ("--num_gpus", None),
        ("--verbose", None),
        ("--lr", None),
    ],
)
def test_a_flag_that_is_not_known_names_the_one_that_was_meant_or_none(capsys, word, meant):
    with pytest.raises(SystemExit):
        PARSER.parse_args([word, "2", "s.py"])

    expected = f"{word} is not a flag of accelerate launch.{f' Did you mean {meant!r}?' if meant else ''}\n"
    assert capsys.readouterr().err.endswith(expected)


def test_every_option_of_torchrun_is_one_of_ours():
    from torch.distributed.run import get_args_parser

    theirs = {flag for action in get_args_parser()._actions for flag in action.option_strings}

    assert theirs - set(PARSER._option_string_actions) == set()


# --- the configuration file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "section"), [(ClusterConfig, "LOCAL_MACHINE_keys"), (SageMakerConfig, "AMAZON_SAGEMAKER_keys")]
)
def test_every_key_of_a_file_is_known_with_its_default(kind, section):
    fields = kind.__dataclass_fields__

    assert set(fields) == set(GOLDEN["config"][section])
    for name, (_, default) in GOLDEN["config"][section].items():
        if default != "REQUIRED":
            assert fields[name].default == default, name


def test_every_key_of_a_nested_section_is_known():
    for section, keys in GOLDEN["config"]["nested"].items():
        for key in keys:
            name = key.rpartition(" ")[2]
            if name != "_note":
                assert SECTIONS[section].full_name(name) in SECTIONS[section].keys, key


def test_every_flag_of_an_engine_is_a_key_of_its_section():
    keys = {key for section in SECTIONS.values() for key in section.keys}
    beginnings = ("fsdp_", "megatron_lm_", "parallelism_config_", "fp8_", "deepspeed_", "zero", "offload_")

    flags = {option.name for option in ENGINE_FLAGS if option.name.startswith(beginnings)}

    assert flags - keys == set()
