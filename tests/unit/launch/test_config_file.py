"""The configuration file: where it lies, what loads, and what is refused with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accelerate.core.enums import DistributedType
from accelerate.core.errors import UnsupportedCombination
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file

# What `accelerate config default` of version 1.15 writes on a machine without accelerators.
PEER_DEFAULT = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "NO",
    "downcast_bf16": False,
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": False,
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_file_of_version_1_loads_and_is_written_back_the_same(tmp_path, name):
    path = write(tmp_path, json.dumps(PEER_DEFAULT, indent=2), name)

    config = config_file.load_config_from_file(path)

    assert config.to_dict() == PEER_DEFAULT
    config.to_yaml_file(tmp_path / "again.yaml")
    config.to_json_file(tmp_path / "again.json")
    assert config_file.load_config_from_file(tmp_path / "again.yaml") == config
    assert config_file.load_config_from_file(tmp_path / "again.json") == config


def test_an_old_file_with_empty_sections_and_words_for_booleans_loads(tmp_path):
    path = write(
        tmp_path,
        "compute_environment: LOCAL_MACHINE\ndeepspeed_config: {}\nfsdp_config: null\ndistributed_type: MULTI_GPU\n"
        "downcast_bf16: 'no'\nfp16: true\ndynamo_backend: INDUCTOR\nmain_process_ip: null\nuse_cpu: false\n",
    )

    config = config_file.load_config_from_file(path)

    assert config.distributed_type == DistributedType.MULTI_GPU
    assert (config.mixed_precision, config.downcast_bf16, config.num_processes) == ("fp16", False, -1)
    assert config.dynamo_config == {"dynamo_backend": "INDUCTOR"}
    assert config.fsdp_config == {}


@pytest.mark.parametrize(("precision", "is_told"), [("bf16", True), ("no", True), ("fp16", False)])
def test_the_old_word_for_a_precision_gives_way_to_the_new_one_and_that_is_told(tmp_path, precision, is_told):
    path = write(tmp_path, f"distributed_type: 'NO'\nfp16: true\nmixed_precision: {precision}\n")

    found = config_file.read(path)

    assert found.config.mixed_precision == precision
    expected = f"fp16 in {path}, line 2 is left out: mixed_precision in {path}, line 3 says more."
    assert found.notes == ((expected,) if is_told else ())


def test_a_back_end_that_is_switched_off_in_one_place_and_named_in_another_is_refused(tmp_path):
    path = write(tmp_path, "distributed_type: 'NO'\ndynamo_backend: no\ndynamo_config:\n  dynamo_backend: inductor\n")

    with pytest.raises(ValueError, match=r"dynamo_backend in .*, line 2, and .*, line 4, are two spellings of one key"):
        config_file.read(path)


def test_an_unquoted_no_means_the_word(tmp_path):
    config = config_file.load_config_from_file(write(tmp_path, "distributed_type: NO\nmixed_precision: no\n"))

    assert (config.distributed_type.value, config.mixed_precision, config.num_processes) == ("NO", "no", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distributed_type: 'NO'\nmixed_precission: bf16\n", ("'mixed_precission' is not a key of a configuration file "
         "(mixed_precission in {path}, line 2). Did you mean 'mixed_precision'?")),
        ("distributed_type: MULTI_GPUS\n", ("The key distributed_type has the value 'MULTI_GPUS', which is not known "
         "(distributed_type in {path}, line 1).")),
        ("use_cpu: true\n", "The key distributed_type is missing (distributed_type in {path})."),
        ("distributed_type: 'NO'\nnum_processes: two\n", ("num_processes='two' has a wrong type (num_processes in {path}, "
         "line 2).\nAccepted: an integer.")),
        ("distributed_type: 'NO'\nuse_cpu: perhaps\n", "use_cpu='perhaps' has a wrong type (use_cpu in {path}, line 2)."),
        ("distributed_type: 'NO'\ndynamo_config:\n  mod: default\n", ("'mod' is not a key of dynamo_config "
         "(dynamo_config.mod in {path}, line 3). Did you mean 'dynamo_mode'?")),
        ("distributed_type: 'NO'\nuse_cpu: true\nuse_cpu: false\n", "'use_cpu' stands at line 2 and again at line 3"),
        ("- a\n- b\n", "{path} is not a configuration file: it does not hold `key: value` lines."),
        ("", "{path} is not a configuration file: it is empty."),
        ("distributed_type: [\n", "{path} is not a configuration file: while parsing"),
        ("distributed_type: !!python/object/apply:os.system ['true']\n", ("{path} is not a configuration file: line 1 "
         "has the tag 'tag:yaml.org,2002:python/object/apply:os.system', and tags are not read")),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name_and_line(tmp_path, text, expected):
    path = write(tmp_path, text)

    with pytest.raises(ValueError) as caught:
        config_file.load_config_from_file(path)

    assert expected.format(path=path) in str(caught.value)


def test_a_json_file_is_refused_by_line_too(tmp_path):
    path = write(tmp_path, '{\n  "distributed_type": "NO",\n  "debugs": true\n}', "config.json")

    with pytest.raises(ValueError, match=r"debugs in .*config\.json, line 3.*Did you mean 'debug'"):
        config_file.load_config_from_file(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = write(tmp_path, "#" * (config_file.SIZE_LIMIT_BYTES + 1))

    with pytest.raises(ValueError, match="too large for a configuration file"):
        config_file.load_config_from_file(path)


def test_a_deeply_nested_file_is_refused_not_a_crash(tmp_path):
    path = write(tmp_path, "distributed_type: " + "[" * 20000)

    with pytest.raises(ValueError, match="is not a configuration file"):
        config_file.load_config_from_file(path)


def test_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        config_file.load_config_from_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a/accelerate"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/huggingface/accelerate"),
        ({}, "~/.cache/huggingface/accelerate"),
        ({"HF_HOME": "~/hub"}, "~/hub/accelerate"),
    ],
)
def test_the_place_of_the_default_file(environ, expected):
    assert config_file.cache_folder(environ) == Path(expected).expanduser()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_processes: 2.7\n", "num_processes=2.7 has a wrong type (num_processes in {file}, line 2)."),
        ("num_processes: .inf\n", "num_processes=inf has a wrong type (num_processes in {file}, line 2)."),
        (
            "dynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_use_dynamic: perhaps\n",
            "dynamo_config.dynamo_use_dynamic='perhaps' has a wrong type (dynamo_config.dynamo_use_dynamic in {file}, line 4).",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(tmp_path, text, expected):
    file = write(tmp_path, f"distributed_type: MULTI_GPU\n{text}")

    with pytest.raises(ValueError) as caught:
        config_file.read(file)

    assert expected.format(file=file) in str(caught.value)


def test_a_whole_number_may_be_written_as_text_or_with_a_point(tmp_path):
    file = write(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 2.0\nnum_machines: '1'\n")

    config = config_file.load_config_from_file(file)

    assert (config.num_processes, config.num_machines) == (2, 1)


# --- files of version 1 ------------------------------------------------------------------------------------

FSDP = """\
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_state_dict_type: SHARDED_STATE_DICT
  offload_params: false
  min_num_params: 100000000
  fsdp_ignored_modules: null
"""
DEEPSPEED = """\
deepspeed_config:
  deepspeed_config_file: none
  zero_stage: 3
  gradient_accumulation_steps: auto
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  zero3_init_flag: 'true'
"""
OLD_FILES = {
    "FSDP": (f"distributed_type: FSDP\nnum_processes: 2\n{FSDP}", "distributed_type=FSDP"),
    "DeepSpeed": (f"distributed_type: DEEPSPEED\n{DEEPSPEED}", "distributed_type=DEEPSPEED"),
    "Megatron-LM": (
        "distributed_type: MEGATRON_LM\nmegatron_lm_config:\n  megatron_lm_tp_degree: 2\n  megatron_lm_gradient_clipping: 1\n",
        "distributed_type=MEGATRON_LM",
    ),
    "TPU": (
        "distributed_type: TPU\ntpu_name: n\ntpu_zone: z\ntpu_use_cluster: true\ntpu_vm: [a]\ntpu_env: [A=1]\n"
        "commands: [pwd]\ncommand_file: f\ndowncast_bf16: 'no'\nmain_training_function: run\n",
        "distributed_type=XLA",
    ),
    "meshes": (
        "distributed_type: MULTI_GPU\nparallelism_config:\n  parallelism_config_tp_size: 2\n  "
        "parallelism_config_cp_comm_strategy: alltoall\n",
        "parallelism_config (parallelism_config in",
    ),
    "fp8": (
        "distributed_type: 'NO'\nfp8_config:\n  backend: TE\n  fp8_format: HYBRID\n  amax_history_length: 1024\n  "
        "override_linear_precision: [false, false, false]\n",
        "fp8_config (fp8_config in",
    ),
    "MPI": (
        "distributed_type: MULTI_CPU\nmpirun_config:\n  mpirun_hostfile: ~/hosts\n",
        "mpirun_config (mpirun_config",
    ),
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_a_file_for_an_engine_of_version_1_is_read_and_written_back_and_the_launcher_names_what_is_missing(
    tmp_path, name
):
    text, refused = OLD_FILES[name]
    path = write(tmp_path, text)

    found = config_file.read(path)

    for again in (tmp_path / "again.yaml", tmp_path / "again.json"):
        found.config.to_json_file(again)
        assert config_file.load_config_from_file(again) == found.config
    for section, values in found.config.to_dict().items():
        if isinstance(values, dict):
            assert all(f"{section}.{key}" in found.lines for key in values), "keys are kept as they were written"
    if name != "MPI":  # what becomes of it is for its launcher to say
        with pytest.raises(UnsupportedCombination) as caught:
            LaunchRequest.merge({}, found, {}, script="s.py")
        assert refused in str(caught.value)
        assert str(path) in str(caught.value)
