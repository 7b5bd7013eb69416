"""The questions of `accelerate config`: transcripts of questions and answers, and the file that follows."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from accelerate.commands.config.questions import Question, Surroundings, ask_all, configuration
from accelerate.core.enums import DistributedType
from accelerate.launch.devices import NONE, Devices
from accelerate.launch.machine import Machine
from accelerate.launch.plan import plan
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file

CPU = Surroundings(NONE, DistributedType.NO)
ONE_GPU = Surroundings(Devices(1, "cuda", "CUDA_VISIBLE_DEVICES"), DistributedType.MULTI_GPU)
FOUR_GPUS = Surroundings(Devices(4, "cuda", "CUDA_VISIBLE_DEVICES"), DistributedType.MULTI_GPU)
TWO_XPUS = Surroundings(Devices(2, "xpu", "ZE_AFFINITY_MASK"), DistributedType.MULTI_XPU)

# What a file says that nobody was asked about.
CONSTANT = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
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
    "use_cpu": False,
}


def interview(around: Surroundings, **answers: str) -> tuple[list[str], dict[str, Any]]:
    """Answer the questions named, take the default for all others; return what was asked, and the file."""
    asked: list[str] = []

    def ask(question: Question) -> str:
        asked.append(question.key)
        answer = answers.get(question.key, question.default)
        assert question.refusal(answer) is None, (question, answer)
        return answer

    found = ask_all(ask, around)
    assert set(answers) <= set(asked), "an answer to a question that was not asked"
    return asked, configuration(found, around).to_dict()


TRANSCRIPTS: list[tuple[str, Surroundings, dict[str, str], list[str], dict[str, Any]]] = [
    (
        "Enter all the way on a machine without a GPU",
        CPU,
        {},
        ["distributed_type", "compile", "mixed_precision"],
        {"distributed_type": "NO", "use_cpu": True},
    ),
    (
        "Enter all the way on a machine with one GPU",
        ONE_GPU,
        {},
        ["distributed_type", "use_cpu", "compile", "mixed_precision"],
        {"distributed_type": "NO"},
    ),
    (
        "Enter all the way on a machine with four",
        FOUR_GPUS,
        {},
        ["distributed_type", "num_machines", "gpu_ids", "enable_cpu_affinity", "debug", "compile", "mixed_precision"],
        {"distributed_type": "MULTI_GPU", "num_processes": 4, "gpu_ids": "all"},
    ),
    (
        "two of the four",
        FOUR_GPUS,
        {"gpu_ids": "0, 2", "enable_cpu_affinity": "yes", "debug": "yes", "mixed_precision": "bf16"},
        ["distributed_type", "num_machines", "gpu_ids", "enable_cpu_affinity", "debug", "compile", "mixed_precision"],
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 2,
            "gpu_ids": "0, 2",
            "enable_cpu_affinity": True,
            "debug": True,
            "mixed_precision": "bf16",
        },
    ),
    (
        "the second of three machines with four GPUs each, which may come back",
        FOUR_GPUS,
        {"num_machines": "3", "machine_rank": "1", "main_process_ip": "node-0.cluster", "rdzv_backend": "c10d"},
        [
            "distributed_type", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend",
            "num_processes", "enable_cpu_affinity", "debug", "compile", "mixed_precision",
        ],
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 12,
            "num_machines": 3,
            "machine_rank": 1,
            "main_process_ip": "node-0.cluster",
            "main_process_port": 29500,
            "rdzv_backend": "c10d",
            "same_network": True,
        },
    ),
    (
        "several processes on the CPU of a machine with GPUs",
        FOUR_GPUS,
        {"distributed_type": "MULTI_CPU", "num_processes": "3"},
        ["distributed_type", "num_machines", "num_processes", "debug", "compile", "mixed_precision"],
        {"distributed_type": "MULTI_CPU", "num_processes": 3, "use_cpu": True},
    ),
    (
        "the CPU in spite of a GPU",
        ONE_GPU,
        {"use_cpu": "yes"},
        ["distributed_type", "use_cpu", "compile", "mixed_precision"],
        {"distributed_type": "NO", "use_cpu": True},
    ),
    (
        "one GPU on each of two machines",
        ONE_GPU,
        {"distributed_type": "MULTI_GPU", "num_machines": "2", "main_process_ip": "10.0.0.1"},
        [
            "distributed_type", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend",
            "num_processes", "debug", "compile", "mixed_precision",
        ],
        {
            "distributed_type": "MULTI_GPU",
            "num_processes": 2,
            "num_machines": 2,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29500,
            "same_network": True,
        },
    ),
    (
        "devices of another family, compiled",
        TWO_XPUS,
        {"compile": "yes", "dynamo_backend": "eager", "dynamo_use_dynamic": "no", "dynamo_use_fullgraph": "yes"},
        [
            "distributed_type", "num_machines", "gpu_ids", "debug", "compile", "dynamo_backend", "dynamo_mode",
            "dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation", "mixed_precision",
        ],
        {
            "distributed_type": "MULTI_XPU",
            "num_processes": 2,
            "gpu_ids": "all",
            "dynamo_config": {
                "dynamo_backend": "EAGER",
                "dynamo_mode": "default",
                "dynamo_use_dynamic": False,
                "dynamo_use_fullgraph": True,
                "dynamo_use_regional_compilation": False,
            },
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("around", "answers", "asked", "expected"), [row[1:] for row in TRANSCRIPTS], ids=[row[0] for row in TRANSCRIPTS]
)
def test_a_transcript_of_answers_gives_this_file(around, answers, asked, expected):
    found = interview(around, **answers)

    assert found == (asked, CONSTANT | expected)


def offered(around: Surroundings, key: str, **answers: str) -> dict[str, str]:
    """Return the answers that a question offers, with what explains them."""
    found: dict[str, str] = {}

    def ask(question: Question) -> str:
        if question.key == key:
            found.update({choice.answer: choice.why for choice in question.choices})
        return answers.get(question.key, question.default)

    ask_all(ask, around)
    return found


def test_only_what_this_machine_and_this_version_can_do_is_offered():
    assert list(offered(CPU, "distributed_type")) == ["NO", "MULTI_CPU"]
    assert list(offered(ONE_GPU, "distributed_type")) == ["NO", "MULTI_CPU", "MULTI_GPU"]
    assert list(offered(TWO_XPUS, "distributed_type")) == ["NO", "MULTI_CPU", "MULTI_XPU"]
    assert list(offered(CPU, "mixed_precision")) == ["no", "fp16", "bf16"]
    assert list(offered(CPU, "dynamo_backend", compile="yes")) == ["inductor", "eager", "aot_eager"]
    with_more = Surroundings(ONE_GPU.devices, ONE_GPU.label, ("tensorrt",))
    assert list(offered(with_more, "dynamo_backend", compile="yes"))[3:] == ["cudagraphs", "tensorrt"]


@pytest.mark.parametrize(
    "key", ["distributed_type", "mixed_precision", "dynamo_backend", "dynamo_mode", "rdzv_backend"]
)
def test_every_answer_is_explained(key):
    machines = {"distributed_type": "MULTI_GPU", "num_machines": "2", "main_process_ip": "a"}
    reasons = offered(FOUR_GPUS, key, compile="yes", **machines)
    assert reasons
    assert all(len(why) > 8 for why in reasons.values())


def question(around: Surroundings, key: str, **answers: str) -> Question:
    found: list[Question] = []

    def ask(item: Question) -> str:
        found.append(item)
        return answers.get(item.key, item.default)

    ask_all(ask, around)
    return next(item for item in found if item.key == key)


@pytest.mark.parametrize(
    ("key", "answer", "problem"),
    [
        ("num_machines", "0", "0 is not a number from 1"),
        ("num_machines", "two", "'two' is not a number from 1"),
        ("num_machines", "-1", "'-1' is not a number from 1"),
        ("num_machines", "²", "'²' is not a number from 1"),
        ("machine_rank", "2", "2 is not a number from 0 to 1"),
        ("main_process_ip", "", "an address or a host name is needed, such as 10.0.0.1"),
        ("main_process_ip", "10.0.0.1; rm -rf /", "'10.0.0.1; rm -rf /' is not an address or a host name"),
        ("main_process_ip", "--help", "'--help' is not an address or a host name"),
        ("main_process_port", "65536", "65536 is not a number from 1 to 65535"),
        ("num_processes", "3", "3 is not a number from 2, a multiple of 2"),
        ("rdzv_backend", "etcd", "'etcd' is not one of static, c10d"),
    ],
)
def test_an_answer_that_cannot_be_meant_is_refused_at_once(key, answer, problem):
    machines = {"distributed_type": "MULTI_GPU", "num_machines": "2", "main_process_ip": "a"}
    assert question(FOUR_GPUS, key, **machines).refusal(answer) == problem


@pytest.mark.parametrize("answer", ["4", "0,4", "0,0", "", "0,", "a"])
def test_devices_that_are_not_there_are_refused(answer):
    found = question(FOUR_GPUS, "gpu_ids")
    assert found.refusal(answer)
    assert not found.refusal("3,0") and not found.refusal(" all ")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), around=st.sampled_from([CPU, ONE_GPU, FOUR_GPUS, TWO_XPUS]))
def test_whatever_is_answered_the_file_is_read_back_and_makes_a_plan(tmp_path_factory, data, around):
    def ask(question: Question) -> str:
        if question.choices:
            return data.draw(st.sampled_from([choice.answer for choice in question.choices]), question.key)
        options = [text for text in ("0", "1", "2", "4", "10.0.0.1", "all", "0,1") if not question.refusal(text)]
        return data.draw(st.sampled_from(options), question.key)

    config = configuration(ask_all(ask, around), around)
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))

    read = config_file.read(path)
    request = LaunchRequest.merge({}, read, {}, script="s.py")
    planned = plan(request, Machine(python="python", cores=8, devices=around.devices))

    assert read.config == config
    assert planned.processes_per_node * planned.nodes == max(1, config.num_processes)


def test_the_first_answer_of_each_list_is_the_usual_one():
    """So that nobody has to read a list to take what most people take."""
    for around, key in itertools.product([CPU, ONE_GPU], ["distributed_type", "mixed_precision"]):
        found = question(around, key)
        assert found.default == found.choices[0].answer
