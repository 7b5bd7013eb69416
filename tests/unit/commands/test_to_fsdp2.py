"""`accelerate to-fsdp2`: what becomes of each option, and which files are touched."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

from accelerate.commands.to_fsdp2 import convert_config_to_fsdp2, main, to_fsdp2_command, to_fsdp2_command_parser
from accelerate.core.errors import SettingError

OLD = {
    "distributed_type": "FSDP",
    "num_processes": 4,
    "unknown": [1, {"a": None}],
    "fsdp_config": {
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_forward_prefetch": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_sync_module_states": True,
        "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
        "fsdp_min_num_params": 100,
        "fsdp_use_orig_params": True,
        "fsdp_activation_checkpointing": False,
        "my_own": "kept",
    },
}
NEW = {
    **OLD,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
        "fsdp_min_num_params": 100,
        "fsdp_activation_checkpointing": False,
        "my_own": "kept",
    },
}
LEFT_OUT = ["fsdp_backward_prefetch", "fsdp_forward_prefetch", "fsdp_sync_module_states", "fsdp_use_orig_params"]


def run(*words: object) -> None:
    to_fsdp2_command(to_fsdp2_command_parser().parse_args([str(word) for word in words]))


def test_each_option_gets_its_successor_is_left_out_and_named_or_stays(caplog):
    before = json.dumps(OLD)
    with caplog.at_level(logging.WARNING):
        assert convert_config_to_fsdp2(OLD) == NEW
    assert [record.getMessage().split(" is left out")[0] for record in caplog.records] == LEFT_OUT
    assert json.dumps(OLD) == before


@pytest.mark.parametrize("key", ["fsdp_sharding_strategy", "fsdp_reshard_after_forward", "sharding_strategy"])
@pytest.mark.parametrize(
    ("value", "reshards"),
    [
        ("FULL_SHARD", True), ("SHARD_GRAD_OP", False), ("NO_SHARD", False), ("HYBRID_SHARD", True),
        ("HYBRID_SHARD_ZERO2", False), ("full_shard", True), (1, True), ("2", False), (4, True), (True, True),
        (False, False),
    ],
)  # fmt: skip
def test_a_strategy_becomes_whether_parameters_are_sharded_again(key, value, reshards):
    assert convert_config_to_fsdp2({"fsdp_config": {key: value}})["fsdp_config"] == {
        "fsdp_reshard_after_forward": reshards,
        "fsdp_version": 2,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fsdp_sharding_strategy": "NO_SHARD"}, "FSDP2 always shards"),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, "dp_replicate_size"),
        ({"fsdp_state_dict_type": "LOCAL_STATE_DICT"}, "unknown to FSDP2"),
        ({"fsdp_version": 2}, "nothing is converted"),
        ({"fsdp_version": "2"}, "nothing is converted"),
    ],
)
def test_what_does_not_carry_over_is_said(caplog, options, said):
    with caplog.at_level(logging.WARNING):
        convert_config_to_fsdp2({"fsdp_config": options})
    assert said in caplog.text


@pytest.mark.parametrize("config", [{}, {"fsdp_config": None}, {"fsdp_config": {}}, {"fsdp_config": {"fsdp_version": 2, "fsdp_use_orig_params": True}}])  # fmt: skip
def test_without_options_of_version_1_nothing_changes(config):
    assert convert_config_to_fsdp2(config) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_sharding_strategy": "HALF"}, "fsdp_sharding_strategy='HALF' is not known"),
        ({"fsdp_sharding_strategy": 6}, "fsdp_sharding_strategy=6 is not known"),
        ({"fsdp_sharding_strategy": "NO_SHARD", "fsdp_reshard_after_forward": True}, "contradicts"),
        ("text", "fsdp_config='text' has a wrong type"),
    ],
)
def test_options_that_cannot_be_understood_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convert_config_to_fsdp2({"fsdp_config": options})


@pytest.mark.parametrize(("name", "read"), [("c.yaml", yaml.safe_load), ("c.json", json.loads)])
def test_a_file_is_written_beside_the_old_one_or_in_its_place(tmp_path, capsys, name, read):
    old, new = tmp_path / "old.yaml", tmp_path / "deep" / name
    old.write_text(yaml.safe_dump(OLD))
    before = old.read_bytes()

    run("--config_file", old, "--output-file", new)
    assert read(new.read_text()) == NEW
    assert old.read_bytes() == before

    run("--config_file", old, "--overwrite")
    assert yaml.safe_load(old.read_text()) == NEW
    assert capsys.readouterr().out == (
        f"The configuration for FSDP2 is in {new}.\nThe configuration for FSDP2 is in {old}.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "old.yaml"]


def test_a_no_that_yaml_takes_for_false_stays_a_word(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("distributed_type: NO\nmixed_precision: no\nuse_cpu: no\n")
    run("--config_file", tmp_path / "c.yaml", "--overwrite")
    assert capsys.readouterr().out.endswith(f"c.yaml says nothing about FSDP; {tmp_path / 'c.yaml'} is the same.\n")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()) == {
        "distributed_type": "NO",
        "mixed_precision": "no",
        "use_cpu": False,
    }


def test_nothing_is_overwritten_unless_asked(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(OLD))
    new.write_text("mine")

    with pytest.raises(FileExistsError, match=r"new\.yaml exists already"):
        run("--config_file", old, "--output_file", new)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        run("--config_file", tmp_path / "none.yaml", "--output_file", new)
    with pytest.raises(ValueError, match="Nobody said where to write"):
        run("--config_file", old)
    assert new.read_text() == "mine"
    run("--config_file", old, "--output_file", new, "--overwrite")
    assert yaml.safe_load(new.read_text()) == NEW


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("", "it is empty"), ("- a\n", "does not hold"), ("!!python/name:os.system x", "tag")],
)
def test_a_file_that_is_none_ends_with_status_2_and_is_left_alone(tmp_path, capsys, text, message):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["--config_file", str(file), "--overwrite"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert file.exists() == (text is not None)
    assert text is None or file.read_text() == text


def test_one_option_in_two_spellings_that_contradict_each_other_is_refused():
    options = {"fsdp_sharding_strategy": "FULL_SHARD", "sharding_strategy": "NO_SHARD"}
    with pytest.raises(
        SettingError, match="fsdp_sharding_strategy='FULL_SHARD' contradicts sharding_strategy='NO_SHARD'"
    ):
        convert_config_to_fsdp2({"fsdp_config": options})

    same = {"fsdp_sharding_strategy": "NO_SHARD", "sharding_strategy": "NO_SHARD"}
    assert convert_config_to_fsdp2({"fsdp_config": same})["fsdp_config"]["fsdp_reshard_after_forward"] is False
