"""What a launch was asked to do: precedence, origins, and contradictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accelerate.core.errors import UnsupportedCombination
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file


def merged(flags: dict[str, Any] | None = None, file: Path | None = None, environ: dict[str, str] | None = None):
    read = config_file.read(file) if file else None
    return LaunchRequest.merge(flags or {}, read, environ or {}, script="train.py", script_args=("--lr", "1"))


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_said_is_the_default_everywhere():
    assert merged() == LaunchRequest(script="train.py", script_args=("--lr", "1"))
    assert not merged().was_given("num_processes")


def test_a_flag_beats_a_variable_beats_the_file(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_CPU\nmixed_precision: fp16\nnum_processes: 4\ndebug: true\n")
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DEBUG_MODE": "no"}

    request = merged({"num_processes": 2}, file, environ)

    assert (request.num_processes, request.mixed_precision, request.debug, request.cpu) == (2, "bf16", False, True)
    assert request.describe("num_processes") == "num_processes=2 (from --num_processes)"
    assert request.describe("mixed_precision") == "mixed_precision=bf16 (from the variable ACCELERATE_MIXED_PRECISION)"
    assert request.describe("cpu") == f"cpu=True (from distributed_type in {file}, line 1)"
    assert request.describe("machine_rank") == "machine_rank=0 (the default)"


def test_a_section_of_the_file_is_read_key_by_key_and_flags_win_inside_it(tmp_path):
    file = written(
        tmp_path, "distributed_type: 'NO'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_mode: default\n"
    )

    request = merged({"dynamo_mode": "reduce-overhead"}, file)

    assert (request.dynamo_backend, request.dynamo_mode) == ("inductor", "reduce-overhead")
    assert request.describe("dynamo_backend").endswith(f"(from dynamo_config.dynamo_backend in {file}, line 3)")


def test_a_number_of_minus_one_in_the_file_leaves_it_open(tmp_path):
    assert merged(file=written(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: -1\n")).num_processes is None


def test_an_empty_key_says_nothing(tmp_path):
    file = written(
        tmp_path, "distributed_type: MULTI_GPU\nnum_machines: null\ndebug: null\nrdzv_backend: null\nuse_cpu:\n"
    )

    request = merged(file=file)

    assert (request.origins, request.num_machines, request.debug, request.cpu) == ({}, 1, False, False)


def test_the_flag_multi_gpu_overrides_a_file_that_says_cpu_but_not_the_variable(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_CPU\nnum_processes: 2\n")

    assert merged({"multi_gpu": True}, file).cpu is False
    assert merged({"multi_gpu": True, "num_processes": 2}, None, {"ACCELERATE_USE_CPU": "true"}).cpu is True


@pytest.mark.parametrize(
    ("ids", "expected"),
    [("all", None), ("0, 2", ("0", "2")), ("3", ("3",)), ("GPU-8932f937,MIG-a/1/2", ("GPU-8932f937", "MIG-a/1/2"))],
)
def test_gpu_ids(ids, expected):
    assert merged({"gpu_ids": ids}).gpu_ids == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"cpu": True, "multi_gpu": True}, "cpu=True (from --cpu) contradicts multi_gpu=True (from --multi_gpu)"),
        (
            {"multi_gpu": True, "num_processes": 1},
            "multi_gpu=True (from --multi_gpu) contradicts num_processes=1 (from",
        ),
        (
            {"module": True, "no_python": True},
            "module=True (from --module) contradicts no_python=True (from --no_python)",
        ),
        ({"num_machines": 2}, "num_machines=2 (from --num_machines) needs the address of the first machine"),
        ({"machine_rank": 1}, "machine_rank=1 (from --machine_rank) contradicts num_machines=1 (the default)"),
        ({"gpu_ids": "0", "num_processes": 2}, "gpu_ids=0 (from --gpu_ids) contradicts num_processes=2 (from"),
        (
            {"gpu_ids": "0", "multi_gpu": True},
            "gpu_ids=0 (from --gpu_ids) contradicts multi_gpu=True (from --multi_gpu)",
        ),
        ({"gpu_ids": ""}, "gpu_ids= (from --gpu_ids) holds '', which is no device."),
        ({"gpu_ids": "0,,1"}, "gpu_ids=0,,1 (from --gpu_ids) holds '', which is no device."),
        ({"gpu_ids": "a"}, "gpu_ids=a (from --gpu_ids) holds 'a', which is no device."),
        ({"gpu_ids": "-1"}, "gpu_ids=-1 (from --gpu_ids) holds '-1', which is no device."),
        ({"gpu_ids": "1, 1"}, "gpu_ids=1,1 (from --gpu_ids) names the device 1 twice."),
        ({"gpu_ids": "0", "cpu": True}, "gpu_ids=0 (from --gpu_ids) contradicts cpu=True (from --cpu)"),
        (
            {"num_processes": 3, "num_machines": 2, "main_process_ip": "a"},
            "num_processes=3 (from --num_processes) contr",
        ),
        ({"main_process_port": 0, "num_machines": 2, "main_process_ip": "a"}, "main_process_port=0 (from"),
        ({"mixed_precision": "fp32"}, "mixed_precision=fp32 (from --mixed_precision) is not known."),
        ({"dynamo_backend": "fast"}, "dynamo_backend=fast (from --dynamo_backend) is not known."),
        ({"num_processes": 30_000_000}, "num_processes=30000000 (from --num_processes) is out of range."),
        ({"max_restarts": 10**23}, "is out of range."),
        ({"grace_seconds": 10**23}, "is out of range."),
        ({"monitor_interval": float("inf")}, "monitor_interval=inf (from --monitor_interval) is out of range."),
        ({"monitor_interval": float("nan")}, "monitor_interval=nan (from --monitor_interval) is out of range."),
        ({"num_processes": 0}, "num_processes=0 (from --num_processes) is out of range."),
        ({"main_process_port": 70000}, "main_process_port=70000 (from --main_process_port) is out of range."),
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps=0 (from --gradient_accumulation_steps) is out",
        ),
        (
            {"main_process_ip": "10.0.0.1; reboot"},
            "main_process_ip=10.0.0.1; reboot (from --main_process_ip) is no address",
        ),
        ({"main_process_ip": "-o"}, "main_process_ip=-o (from --main_process_ip) is no address"),
        ({"rdzv_conf": "timeout"}, "rdzv_conf='timeout' cannot be read at 'timeout' (from --rdzv_conf)."),
    ],
)
def test_what_cannot_work_is_refused_with_both_origins(flags, expected):
    with pytest.raises(ValueError) as caught:
        merged(flags)

    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) >= 2, "an error names a remedy"


def test_a_contradiction_between_the_file_and_a_flag_names_the_line(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 1\n")

    with pytest.raises(ValueError) as caught:
        merged({"multi_gpu": True}, file)

    assert f"num_processes=1 (from num_processes in {file}, line 2)" in str(caught.value)


def test_a_contradiction_inside_the_file_names_both_lines(tmp_path):
    file = written(tmp_path, "distributed_type: 'NO'\nnum_processes: 2\n")

    with pytest.raises(ValueError) as caught:
        merged({}, file)

    assert (
        f"(num_processes in {file}, line 2) contradicts distributed_type=NO (distributed_type in {file}, line 1)"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "distributed_type: FSDP\n",
            "distributed_type=FSDP (distributed_type in {file}, line 1) needs the FSDP engine",
        ),
        ("distributed_type: DEEPSPEED\n", "needs the DeepSpeed engine"),
        ("distributed_type: XLA\n", "needs the XLA engine"),
        (
            "distributed_type: MULTI_GPU\nfsdp_config:\n  fsdp_version: 2\n",
            "fsdp_config (fsdp_config in {file}, line 2)",
        ),
        (
            "distributed_type: 'NO'\nfp8_config:\n  backend: TE\n",
            "fp8_config (fp8_config in {file}, line 2) needs an fp8",
        ),
        ("distributed_type: 'NO'\nmain_training_function: run\n", "main_training_function='run'"),
    ],
)
def test_a_setting_whose_engine_is_not_here_is_refused_never_ignored(tmp_path, text, expected):
    file = written(tmp_path, text)

    with pytest.raises(UnsupportedCombination) as caught:
        merged({}, file)

    assert expected.format(file=file) in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({"mixed_precision": "fp8"}, {}, "mixed_precision=fp8 (from --mixed_precision) needs an fp8 engine"),
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "mixed_precision=fp8 (from the variable ACCELERATE_MIXED_PRECISION)",
        ),
        ({}, {"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1 (in the environment) needs the FSDP engine"),
    ],
)
def test_an_engine_that_is_missing_is_told_before_anything_starts(flags, environ, expected):
    with pytest.raises(UnsupportedCombination) as caught:
        merged(flags, environ=environ)

    assert expected in str(caught.value)


def test_a_variable_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS='many' in the environment cannot be"):
        merged(environ={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"})


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("4,2", "4,2")])
def test_a_list_of_thread_counts_is_kept_as_it_is(text, expected):
    assert merged(environ={"OMP_NUM_THREADS": text}).num_cpu_threads_per_process == expected
