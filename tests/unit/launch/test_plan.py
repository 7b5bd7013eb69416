"""Launch plans, frozen: one request and one machine give one plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from accelerate.core.errors import LaunchError
from accelerate.launch.devices import Devices
from accelerate.launch.machine import Machine
from accelerate.launch.plan import LaunchPlan, plan, show
from accelerate.launch.request import LaunchRequest

NO_DEVICE = Devices(0)
FOUR = Devices(4, "cuda", "CUDA_VISIBLE_DEVICES")
PLAIN_ENV = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "false",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    "ACCELERATE_DEBUG_MODE": "false",
}


def planned(flags: dict[str, Any] | None = None, **facts: Any) -> LaunchPlan:
    facts = {"python": "python", "devices": NO_DEVICE, "cores": 8, **facts}
    request = LaunchRequest.merge(flags or {}, None, {}, script="train.py", script_args=("--lr", "1"))
    return plan(request, Machine(**facts))


def different(found: LaunchPlan) -> dict[str, Any]:
    """Return what differs from the plainest plan, the environment by its own differences."""
    plain = LaunchPlan(kind="inline", argv=("python", "train.py", "--lr", "1"), env=PLAIN_ENV)
    changed = {key: value for key, value in asdict(found).items() if value != asdict(plain)[key]}
    if "env" in changed:
        assert set(PLAIN_ENV) <= set(found.env)
        changed["env"] = {key: value for key, value in found.env.items() if PLAIN_ENV.get(key) != value}
    return changed


ELASTIC = {"kind": "elastic", "argv": ("python", "-u", "train.py", "--lr", "1")}
ANY_PORT = {"backend": "c10d", "endpoint": "localhost:0", "options": {}, "local_address": "127.0.0.1"}


@pytest.mark.parametrize(
    ("flags", "facts", "expected"),
    [
        ({}, {}, {}),
        ({}, {"devices": Devices(1, "cuda", "CUDA_VISIBLE_DEVICES")}, {}),
        ({"cpu": True}, {"devices": None}, {"env": {"ACCELERATE_USE_CPU": "true"}}),
        ({"num_processes": 1}, {"devices": None}, {}),
        ({"module": True}, {}, {"argv": ("python", "-m", "train.py", "--lr", "1")}),
        ({"no_python": True}, {}, {"argv": ("train.py", "--lr", "1")}),
        (
            {"mixed_precision": "bf16", "gradient_accumulation_steps": 4, "debug": True, "enable_cpu_affinity": True},
            {},
            {
                "env": {
                    "ACCELERATE_MIXED_PRECISION": "bf16",
                    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
                    "ACCELERATE_DEBUG_MODE": "true",
                    "ACCELERATE_CPU_AFFINITY": "1",
                }
            },
        ),
        (
            {"dynamo_backend": "inductor", "dynamo_use_dynamic": True, "num_cpu_threads_per_process": 3},
            {},
            {
                "env": {
                    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
                    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
                    "OMP_NUM_THREADS": "3",
                }
            },
        ),
        ({"gpu_ids": "2"}, {"devices": FOUR}, {"env": {"CUDA_VISIBLE_DEVICES": "2"}}),
        (
            {"cpu": True, "num_processes": 2},
            {"devices": None},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": ANY_PORT,
            },
        ),
        ({}, {"devices": FOUR}, {**ELASTIC, "env": {"OMP_NUM_THREADS": "1"}, "processes_per_node": 4, "rendezvous": ANY_PORT}),
        (
            {"gpu_ids": "1,3"},
            {"devices": FOUR},
            {
                **ELASTIC,
                "env": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1,3"},
                "processes_per_node": 2,
                "rendezvous": ANY_PORT,
            },
        ),
        (
            {"num_processes": 2},
            {},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": ANY_PORT,
                "notes": (
                    "No accelerator is visible here: 2 processes will share the CPU. Say --cpu to ask for it.",
                ),
            },
        ),
        (
            {"cpu": True, "num_processes": 2, "main_process_port": 4000},
            {},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": {**ANY_PORT, "backend": "static", "endpoint": "127.0.0.1:4000"},
            },
        ),
        (
            {"cpu": True, "num_processes": 2, "main_process_port": 4000},
            {"port_is_taken": True},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": ANY_PORT,
                "notes": (
                    ("main_process_port=4000 (from --main_process_port) is taken by another program: a free port is used "
                    "instead."),
                ),
            },
        ),
        (
            {"max_restarts": 2, "tee": "3", "log_dir": "logs"},
            {},
            {**ELASTIC, "rendezvous": ANY_PORT, "max_restarts": 2, "tee": "3", "log_dir": "logs"},
        ),
    ],
)  # fmt: skip
def test_plans_on_one_machine(flags, facts, expected):
    assert different(planned(flags, **facts)) == expected


@pytest.mark.parametrize(
    ("rank", "backend", "options"),
    [(0, "static", {}), (1, "static", {}), (0, "c10d", {"is_host": "1"}), (1, "c10d", {"is_host": "0"})],
)
def test_plans_on_two_machines(rank, backend, options):
    flags = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "10.0.0.1", "rdzv_backend": backend}

    assert different(planned(flags, devices=FOUR)) == {
        **ELASTIC,
        "env": {"OMP_NUM_THREADS": "1"},
        "nodes": 2,
        "processes_per_node": 4,
        **({"node_rank": rank} if rank else {}),
        "rendezvous": {
            "backend": backend,
            "endpoint": "10.0.0.1:29500",
            "options": options,
            "local_address": "10.0.0.1" if (backend, rank) == ("c10d", 0) else None,
        },
    }


def test_num_processes_counts_all_machines():
    flags = {"num_machines": 2, "main_process_ip": "a", "num_processes": 4, "main_process_port": 1234}

    found = planned(flags, devices=FOUR)

    assert (found.processes_per_node, found.nodes, found.rendezvous.endpoint) == (2, 2, "a:1234")


def test_a_taken_port_on_the_first_of_several_machines_is_an_error():
    flags = {"num_machines": 2, "main_process_ip": "a", "main_process_port": 4000}

    with pytest.raises(
        LaunchError, match=r"main_process_port=4000 \(from --main_process_port\) is taken on this machine"
    ):
        planned(flags, port_is_taken=True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_processes": 8}, "asks for 8 processes on this machine, which shows 4 cuda device"),
        ({"multi_gpu": True}, None),
    ],
)
def test_more_processes_than_devices_are_refused_before_they_start(flags, expected):
    if expected is None:
        with pytest.raises(ValueError, match="asks for several devices, and this machine shows 0"):
            planned(flags)
        return
    with pytest.raises(ValueError, match=expected):
        planned(flags, devices=FOUR)


def test_a_plan_prints_the_command_its_meeting_point_and_the_origins():
    request = LaunchRequest.merge({"num_processes": 2, "cpu": True}, None, {}, script="my train.py")
    text = show(plan(request, Machine("python", cores=2)), request)

    assert "command      python -u 'my train.py'" in text
    assert "rendezvous   c10d at localhost:0" in text
    assert "num_processes=2 (from --num_processes)" in text
    assert "ACCELERATE_USE_CPU=true" in text


def test_a_folder_for_logs_means_logs_of_both_streams():
    assert planned({"log_dir": "logs"}).tee == "3"
    assert planned({"log_dir": "logs", "tee": "2"}).tee == "2"
    assert planned({"tee": "1"}).tee == "1"


def test_a_thread_setting_that_is_no_number_reaches_every_process():
    request = LaunchRequest.merge(
        {"num_processes": 2, "cpu": True}, None, {"OMP_NUM_THREADS": "4,2"}, script="train.py"
    )

    assert plan(request, Machine(python="python", cores=8)).env["OMP_NUM_THREADS"] == "4,2"


@pytest.mark.parametrize(
    ("flags", "inherited", "dropped"),
    [
        ({"num_processes": 1}, ("RANK", "MASTER_ADDR"), True),
        ({}, ("RANK", "TORCHELASTIC_RUN_ID"), True),
        ({}, ("RANK", "MASTER_ADDR"), False),  # ranks given by hand, one launch for each
    ],
)
def test_a_single_process_does_not_inherit_a_rank_of_another_run(flags, inherited, dropped):
    found = planned(flags, rank_variables=inherited)

    assert found.kind == "inline"
    assert found.without == (inherited if dropped else ())
    request = LaunchRequest.merge(flags, None, {}, script="train.py")
    assert ("  RANK is not passed on" in show(found, request).splitlines()) == dropped
