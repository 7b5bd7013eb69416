"""Launch plans, frozen: one request and one machine give one plan."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

from accelerate.commands import accelerate_cli
from accelerate.core.errors import LaunchError, SettingError
from accelerate.launch import devices, elastic, mpirun, show
from accelerate.launch.devices import Devices
from accelerate.launch.machine import Machine
from accelerate.launch.mpirun import Program
from accelerate.launch.plan import LaunchPlan, among_visible, plan
from accelerate.launch.request import OF_AGENT, LaunchRequest
from accelerate.settings import config_file
from tests.support import places

VALUES = {
    "grace_seconds": 9, "max_restarts": 1, "monitor_interval": 2.0, "rdzv_backend": "c10d", "rdzv_conf": "timeout=9",
    "standalone": True, "virtual_local_rank": True, "signals_to_handle": "SIGTERM", "numa_binding": "node",
    "local_ranks_filter": "0",
}  # fmt: skip
"""Values that ask for something, where `1` is none."""
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
HERE = {
    "backend": "loopback",
    "endpoint": "127.0.0.1:0",
    "options": {},
    "local_address": "127.0.0.1",
    "described": "",
    "is_numbered": True,
    "processes": None,
}


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
                "rendezvous": HERE,
            },
        ),
        ({}, {"devices": FOUR}, {**ELASTIC, "env": {"OMP_NUM_THREADS": "1"}, "processes_per_node": 4, "rendezvous": HERE}),
        (
            {"gpu_ids": "1,3"},
            {"devices": FOUR},
            {
                **ELASTIC,
                "env": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1,3"},
                "processes_per_node": 2,
                "rendezvous": HERE,
            },
        ),
        (
            {"num_processes": 2},
            {},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": HERE,
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
                "rendezvous": {**HERE, "endpoint": "127.0.0.1:4000"},
            },
        ),
        (
            {"cpu": True, "num_processes": 2, "main_process_port": 4000},
            {"port_is_taken": True},
            {
                **ELASTIC,
                "env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "4"},
                "processes_per_node": 2,
                "rendezvous": HERE,
                "notes": (
                    ("main_process_port=4000 (from --main_process_port) is taken by another program: a free port is used "
                    "instead."),
                ),
            },
        ),
        (
            {"max_restarts": 2, "tee": "3", "log_dir": "logs"},
            {},
            {
                **ELASTIC, "rendezvous": HERE, "max_restarts": 2, "tee": "3", "log_dir": "logs",
                "described_log_dir": "log_dir=logs (from --log_dir)",
            },
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
            "described": "main_process_ip=10.0.0.1 (from --main_process_ip)",
            "is_numbered": True,
            "processes": None,
        },
    }


@pytest.mark.parametrize("flags", [{"max_restarts": 3}, {"num_machines": "1:2"}])
def test_machines_that_come_back_meet_over_c10d(flags):
    flags = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "a", **flags}

    found = planned(flags, devices=FOUR, address="10.0.0.2")

    assert (found.rendezvous.backend, found.rendezvous.options) == ("c10d", {"is_host": "0"})
    assert found.rendezvous.local_address == "10.0.0.2"
    assert (found.min_nodes, found.nodes) == (1 if flags["num_machines"] == "1:2" else None, 2)


def test_a_fixed_port_of_workers_that_may_be_started_again_is_that_of_the_meeting():
    flags = {"cpu": True, "num_processes": 2, "main_process_port": 4000, "max_restarts": 1}

    assert planned(flags).rendezvous.endpoint == "127.0.0.1:4000"


def test_the_network_of_the_run_is_named_where_another_one_would_be_taken():
    flags = {"num_machines": 2, "main_process_ip": "a", "machine_rank": 1}

    found = planned(flags, devices=FOUR, network={"GLOO_SOCKET_IFNAME": "eth1"})

    assert found.env["GLOO_SOCKET_IFNAME"] == "eth1"


def test_num_processes_counts_all_machines():
    flags = {"num_machines": 2, "main_process_ip": "a", "num_processes": 4, "main_process_port": 1234}

    found = planned(flags, devices=FOUR)

    assert (found.processes_per_node, found.nodes, found.rendezvous.endpoint) == (2, 2, "a:1234")
    assert elastic.launch_config(found).rdzv_configs["processes"] == 4


def test_machines_compare_the_number_of_all_processes_and_not_their_own():
    found = planned({"num_machines": 2, "main_process_ip": "a", "nproc_per_node": 2, "cpu": True})

    assert (found.processes_per_node, found.rendezvous.processes) == (2, None)


def test_a_taken_port_on_the_first_of_several_machines_is_an_error():
    flags = {"num_machines": 2, "main_process_ip": "a", "main_process_port": 4000}

    with pytest.raises(
        LaunchError, match=r"main_process_port=4000 \(from --main_process_port\) is taken on this machine"
    ):
        planned(flags, port_is_taken=True)


def test_only_a_machine_that_was_told_to_be_the_first_one_needs_its_port():
    flags = {"num_machines": 2, "main_process_ip": "a", "main_process_port": 4000, "rdzv_backend": "c10d"}

    assert planned(flags, port_is_taken=True).rendezvous.options == {}
    with pytest.raises(LaunchError, match="is taken on this machine"):
        planned({**flags, "machine_rank": 0}, port_is_taken=True)


@pytest.mark.parametrize("flags", [{"max_restarts": 1}, {"num_machines": "1:2"}, {"rdzv_backend": "c10d"}])
def test_how_long_machines_wait_means_the_same_for_both_ways_to_meet(flags):
    flags = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "a", "rdzv_conf": "timeout=30", **flags}

    assert planned(flags).rendezvous.options == {"is_host": "0", "join_timeout": "30"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_processes": 8}, "asks for 8 processes on this machine, which shows 4 cuda device"),
        ({"multi_gpu": True}, None),
        ({"multi_gpu": True, "num_processes": 2}, None),
    ],
)
def test_more_processes_than_devices_are_refused_before_they_start(flags, expected):
    if expected is None:
        with pytest.raises(ValueError, match="asks for several devices, and this machine shows 0"):
            planned(flags)
        return
    with pytest.raises(ValueError, match=expected):
        planned(flags, devices=FOUR)


def test_devices_that_are_not_there_are_refused_where_all_can_be_seen():
    four = replace(FOUR, is_all=True)

    with pytest.raises(
        ValueError, match=r"gpu_ids=0,7 \(from --gpu_ids\) names 7, and this machine shows 4 cuda device"
    ):
        planned({"gpu_ids": "0,7"}, devices=four)
    assert planned({"gpu_ids": "0,3"}, devices=four).env["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert planned({"gpu_ids": "4,GPU-8932f937"}, devices=FOUR).processes_per_node == 2
    assert planned({"gpu_ids": "4,GPU-8932f937"}, devices=replace(NO_DEVICE, is_all=True)).processes_per_node == 1


def test_a_plan_prints_the_command_its_meeting_point_and_the_origins():
    request = LaunchRequest.merge({"num_processes": 2, "cpu": True}, None, {}, script="my train.py")
    text = show.as_text(plan(request, Machine("python", cores=2)), request)

    assert "command      python -u 'my train.py'" in text
    assert "rendezvous   loopback at 127.0.0.1:0\n" in text
    assert "processes    2, 2 on each machine (from --num_processes)" in text
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
        ({"nproc_per_node": 1}, ("RANK", "MASTER_ADDR"), True),
        ({}, ("RANK", "TORCHELASTIC_RUN_ID"), True),
        ({}, ("RANK", "MASTER_ADDR"), False),  # ranks given by hand, one launch for each
    ],
)
def test_a_single_process_does_not_inherit_a_rank_of_another_run(flags, inherited, dropped):
    found = planned(flags, rank_variables=inherited)

    assert found.kind == "inline"
    assert found.without == (inherited if dropped else ())
    request = LaunchRequest.merge(flags, None, {}, script="train.py")
    assert ("  RANK is not passed on" in show.as_text(found, request).splitlines()) == dropped


def in_place(environ: dict[str, str], flags: dict[str, Any] | None = None, **facts: Any) -> LaunchPlan:
    request = LaunchRequest.merge(flags or {}, None, environ, script="train.py")
    return plan(request, Machine(python="python", cores=8, **facts))


def test_a_task_that_is_a_process_of_the_run_becomes_the_script_with_its_rank():
    found = in_place(places.SLURM_TASK_PER_PROCESS, {"cpu": True})

    assert (found.kind, found.argv) == ("inline", ("python", "-u", "train.py"))
    assert {name: found.env[name] for name in places.RANKS} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1", "MASTER_PORT": "14100",
    }  # fmt: skip
    assert found.env["OMP_NUM_THREADS"] == "4", "the machine is shared with one other task"


@pytest.mark.parametrize("devices", [Devices(1, "cuda", "CUDA_VISIBLE_DEVICES"), FOUR])
def test_tasks_may_see_only_their_own_device(devices):
    found = in_place(places.SLURM_TASK_PER_PROCESS, devices=devices)

    assert (found.kind, found.env["ACCELERATE_USE_CPU"]) == ("inline", "false")


def test_a_task_that_is_a_process_cannot_be_restarted():
    with pytest.raises(SettingError, match=r"one of 4 processes \(from SLURM \(SLURM_STEP_NUM_TASKS\)\), 2 on this"):
        in_place(places.SLURM_TASK_PER_PROCESS, {"max_restarts": 1})


def test_ranks_on_several_machines_need_a_meeting_point():
    environ = {name: value for name, value in places.OPENMPI_TWO_NODES.items() if not name.startswith("MASTER")}

    with pytest.raises(SettingError, match="nothing says where") as caught:
        in_place(environ)
    assert "mpirun -x MASTER_ADDR=HOST" in str(caught.value)
    assert in_place(environ, {"main_process_ip": "a"}).env["MASTER_ADDR"] == "a"


def test_a_flag_for_another_run_hides_the_place_from_the_script():
    found = in_place(places.SLURM_TASK_PER_PROCESS, {"cpu": True, "num_processes": 1})

    assert (found.kind, found.without) == ("inline", ("SLURM_PROCID",))
    assert found.notes == (
        "num_processes=1 (from --num_processes) contradicts 4 (from SLURM (SLURM_STEP_NUM_TASKS)): the flag is followed.",
    )


@pytest.mark.parametrize(
    ("is_open_mpi", "expected"),
    [
        (
            True,
            "mpirun -np 4 --hostfile hosts --map-by ppr:2:node -x A=1 -x MASTER_ADDR=a -x MASTER_PORT=29500 "
            "python -u train.py --lr 1",
        ),
        (
            False,
            "mpirun -np 4 -f hosts -ppn 2 -genv A 1 -genv MASTER_ADDR a -genv MASTER_PORT 29500 python -u train.py --lr 1",
        ),
    ],
)
def test_mpirun_is_given_the_hosts_the_processes_and_the_environment(is_open_mpi, expected):
    program = Program(is_open_mpi, "a")
    flags = {"mpirun_hostfile": "hosts", "num_processes": 4, "num_machines": 2, "cpu": True}

    found = planned(flags, mpirun=program)

    assert found.kind == "inline"
    assert "-x" not in found.prefix or "ACCELERATE_USE_CPU=true" in found.prefix
    assert found.command == (*found.prefix, *found.argv)
    env = {"A": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert " ".join((*program.command("hosts", 4, 2, env), *found.argv)) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "mpirun_hostfile=hosts (from --mpirun_hostfile) asks for mpirun, and nothing says how many processes"),
        ({"num_processes": 3, "num_machines": 2}, "num_processes=3 (from --num_processes) contradicts num_machines=2"),
        (
            {"num_processes": 2, "max_restarts": 1},
            "max_restarts=1 (from --max_restarts) contradicts mpirun_hostfile=hosts",
        ),
    ],
)
def test_what_mpirun_cannot_do_is_refused(flags, expected):
    with pytest.raises(SettingError, match=re.escape(expected)):
        LaunchRequest.merge({"mpirun_hostfile": "hosts", **flags}, None, {}, script="train.py")


MPIRUN = ({}, {"mpirun_hostfile": "hosts", "num_processes": 4}, "mpirun starts the processes")
TASK = (places.SLURM_TASK_PER_PROCESS, {}, "this task is one of 4 processes")


@pytest.mark.parametrize(
    ("name", "starter"),
    # --standalone leaves the place aside.
    [*((name, MPIRUN) for name in OF_AGENT), *((name, TASK) for name in OF_AGENT if name != "standalone")],
)
def test_what_only_torchs_agent_does_is_refused_where_it_starts_nothing(name, starter):
    environ, flags, reason = starter
    beside = {"log_dir": "logs"} if name.startswith(("duplicate", "redirects")) else {}

    with pytest.raises(SettingError, match=reason) as caught:
        LaunchRequest.merge({**beside, **flags, name: VALUES.get(name, "1")}, None, environ, script="train.py")

    assert str(caught.value).startswith(tuple(f"{word}=" for word in (name, *beside)))


def told(flags: dict[str, Any], file: Any = None, environ: dict[str, str] | None = None, **facts: Any) -> list[str]:
    request = LaunchRequest.merge({"cpu": True, **flags}, file, environ or {}, script="train.py")
    return list(plan(request, Machine("python", **facts)).notes)


ALONE = {"num_processes": 2}
FAR = {"num_processes": 2, "num_machines": 2, "main_process_ip": "a"}


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({"start_method": "fork"}, {}, "start_method=fork (from --start_method) changes nothing: a script always runs in"),
        ({**FAR, "start_method": "fork"}, {}, "start_method=fork (from --start_method) changes nothing"),
        ({"start_method": "fork"}, places.OPENMPI, "start_method=fork (from --start_method) changes nothing"),
        ({"same_network": True}, {}, "same_network=True (from --same_network) changes nothing"),
        ({**ALONE, "rdzv_conf": "timeout=9"}, {}, "rdzv_conf=timeout=9 (from --rdzv_conf) has no use on a single machine."),
        ({**ALONE, "rdzv_backend": "c10d"}, {}, "rdzv_backend=c10d (from --rdzv_backend) has no use on a single machine."),
        ({**ALONE, "rdzv_backend": "theirs", "rdzv_conf": "a=9", "local_addr": "a", "main_process_ip": "a"}, {}, None),
        ({**ALONE, "local_addr": "a"}, {}, "local_addr=a (from --local_addr) has no use on a single machine."),
        ({**FAR, "local_addr": "a", "rdzv_conf": "timeout=9", "max_restarts": 1}, {}, None),
        ({**FAR, "local_addr": "a"}, {}, "local_addr=a (from --local_addr) has no use: machines that meet by static use"),
        ({**ALONE, "main_process_ip": "a"}, {}, "main_process_ip=a (from --main_process_ip) has no use on a single machine."),
        ({**ALONE, "main_process_ip": "localhost"}, {}, None),
        ({"main_process_ip": "a"}, places.SLURM_TASK_PER_PROCESS, None),
        ({"main_process_ip": "a"}, places.OPENMPI_TWO_NODES, None),
        ({"main_process_port": 4000}, {}, "main_process_port=4000 (from --main_process_port) has no use for a single"),
        ({"main_process_port": 4000, "max_restarts": 1}, {}, None),
        ({**ALONE, "main_process_port": 4000}, {}, None),
        ({"dynamo_mode": "max-autotune"}, {}, "dynamo_mode=max-autotune (from --dynamo_mode) has no use while dynamo_backend"),
        ({"dynamo_use_fullgraph": True}, {}, "dynamo_use_fullgraph=True (from --dynamo_use_fullgraph) has no use while"),
        ({}, {"ACCELERATE_DYNAMO_USE_DYNAMIC": "0"}, "dynamo_use_dynamic=False (from the variable ACCELERATE_DYNAMO_USE_D"),
        ({"dynamo_mode": "max-autotune", "dynamo_backend": "eager"}, {}, None),
        ({**ALONE, "log_dir": "a", "tee": "0"}, {}, "log_dir=a (from --log_dir) stays empty: tee=0 (from --tee) keeps no"),
        ({**ALONE, "log_dir": "a", "tee": "0", "redirects": "1:1"}, {}, None),
    ],
)  # fmt: skip
def test_what_has_no_use_in_a_run_is_told_and_what_has_one_is_not(flags, environ, expected):
    found = told(flags, None, environ)

    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (
            "main_process_ip: a\nnum_processes: 2",
            {},
            "main_process_ip=a (from main_process_ip in {}, line 2) has no use",
        ),
        (
            "main_process_port: 7\nnum_processes: 1",
            {},
            "main_process_port=7 (from main_process_port in {}, line 2) has no",
        ),
        ("same_network: true\nrdzv_backend: static\nnum_processes: 2", {}, None),
        (
            "debug: false",
            {},
            "distributed_type=MULTI_CPU (from distributed_type in {}, line 1) asks for several processes, and",
        ),
        ("debug: false", {"num_processes": 1}, None),
        ("debug: false", {"num_processes": 2}, None),
        ("num_processes: 2", {}, None),
    ],
)
def test_what_a_file_says_in_vain_is_told_with_its_line(tmp_path, text, flags, expected):
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: MULTI_CPU\n{text}\n")

    found = told(flags, config_file.read(file))

    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected.format(file))


def test_devices_that_a_file_names_are_told_to_be_of_no_use_to_cpus(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("distributed_type: MULTI_GPU\ngpu_ids: 0,1\n")
    request = LaunchRequest.merge({"cpu": True}, config_file.read(file), {}, script="train.py")

    expected = f"gpu_ids=0,1 (from gpu_ids in {file}, line 2) has no use: cpu=True (from --cpu)."
    assert expected in plan(request, Machine("python")).notes


@pytest.mark.parametrize(
    ("shown", "named", "chosen"),
    [
        (None, "0,1", "0,1"),
        ("", "0,1", None),
        ("2,3", "0,1", None),
        ("0,1,2,3", "2,3", "2,3"),
        ("2, 3", "3,2", "3,2"),
        ("3", "0,1", None),
    ],
)
@pytest.mark.parametrize("place", [{}, {**places.SLURM_TASK_PER_PROCESS}], ids=["alone", "slurm"])
def test_a_file_picks_devices_among_those_that_the_environment_shows(tmp_path, shown, named, chosen, place):
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: MULTI_GPU\ngpu_ids: '{named}'\n")
    machine = Machine("python", devices=Devices(1, "cuda", "CUDA_VISIBLE_DEVICES"), visible=shown)
    request = LaunchRequest.merge({}, config_file.read(file), place, script="train.py")

    request = among_visible(request, machine)
    found = plan(request, machine)

    note = f"gpu_ids={named} (from gpu_ids in {file}, line 2) is left aside: CUDA_VISIBLE_DEVICES={shown} in the environment"
    assert found.env.get("CUDA_VISIBLE_DEVICES") == chosen
    assert any(text.startswith(note) for text in found.notes) is (chosen is None)
    flag = LaunchRequest.merge({"gpu_ids": named}, None, place, script="train.py")
    assert among_visible(flag, machine) is flag, "a flag comes before the environment"
    assert plan(flag, machine).env["CUDA_VISIBLE_DEVICES"] == named


@pytest.mark.parametrize(
    "command", ["launch --dry-run --json --config_file c.yaml s.py", "env --explain --json --config_file c.yaml"]
)
def test_commands_show_devices_of_a_file_as_left_aside(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").touch()
    (tmp_path / "c.yaml").write_text("distributed_type: MULTI_GPU\ngpu_ids: '0,1'\n")
    monkeypatch.setattr(devices, "find", lambda environ: Devices(2, "cuda", "CUDA_VISIBLE_DEVICES"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(sys, "argv", ["accelerate", *command.split()])

    accelerate_cli.main()
    shown = json.loads(capsys.readouterr().out)

    assert "CUDA_VISIBLE_DEVICES" not in shown["environment"]
    assert shown["settings"]["gpu_ids"]["value"] is None
    assert shown["processes"] | {"total": 2, "source": "one for each device that is visible"} == shown["processes"]
    assert any("is left aside: CUDA_VISIBLE_DEVICES=2,3 in" in note for note in shown["notes"])


def test_too_many_processes_for_the_devices_shown_are_told_with_what_shows_them(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("distributed_type: MULTI_GPU\ngpu_ids: 0,1,2,3\nnum_processes: 4\n")
    machine = Machine("python", devices=Devices(1, "cuda", "CUDA_VISIBLE_DEVICES"), visible="0")
    request = among_visible(LaunchRequest.merge({}, config_file.read(file), {}, script="train.py"), machine)

    with pytest.raises(
        SettingError,
        match=r"shows 1 cuda device\(s\) \(CUDA_VISIBLE_DEVICES=0 in the env.*\n.*\n.*show more of them in CUDA_",
    ):
        plan(request, machine)
    with pytest.raises(SettingError, match=r"shows 1 cuda device\(s\)\.\n.*\n.*Pass --num_processes 1, or --cpu"):
        plan(request, replace(machine, visible=None))


def test_one_device_is_told_where_a_file_asks_for_several(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("distributed_type: MULTI_GPU\n")

    def notes(devices: int, **flags: Any) -> tuple[str, ...]:
        request = LaunchRequest.merge(flags, config_file.read(file), {}, script="train.py")
        return plan(request, Machine("python", devices=Devices(devices, "cuda"))).notes

    assert notes(1, gpu_ids="0") == notes(1, nproc_per_node="auto") == ()
    assert [notes(1), notes(2)] == [
        (f"distributed_type=MULTI_GPU (from distributed_type in {file}, line 1) asks for several processes, and nothing says "
         "how many: one is started.",),
        (),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "is_told"), [("MULTI_NPU", True), ("MULTI_XPU", True), ("MULTI_GPU", False)])
def test_devices_of_another_kind_than_the_file_names_are_told(tmp_path, kind, is_told):
    file = tmp_path / "c.yaml"
    file.write_text(f"distributed_type: {kind}\nnum_processes: 2\n")
    request = LaunchRequest.merge({}, config_file.read(file), {}, script="train.py")

    notes = plan(request, Machine("python", devices=Devices(2, "cuda", label="MULTI_GPU"))).notes

    line = f"distributed_type={kind} (from distributed_type in {file}, line 1) has no effect: the devices here are MULTI_GPU, "
    assert notes == ((f"{line}and these are used.",) if is_told else ())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"rdzv_conf": "jion_timeout=5"}, "jion_timeout=5 (from --rdzv_conf) is no option of rdzv_conf. Did you mean 'join"),
        ({"rdzv_conf": "join_timeout=abc"}, "join_timeout=abc (from --rdzv_conf) cannot be read.\nAccepted: a whole number"),
        ({"rdzv_conf": "timeout=0"}, "timeout=0 (from --rdzv_conf) cannot be read."),
        ({"rdzv_conf": "is_host=perhaps", "rdzv_backend": "c10d"}, "Accepted: true or false."),
        ({**FAR, "rdzv_conf": "keep_alive_interval=5"}, "keep_alive_interval=5 (from --rdzv_conf) is an option of c10d, and"),
    ],
)  # fmt: skip
def test_options_for_the_meeting_are_checked_before_anything_starts(flags, expected):
    with pytest.raises(SettingError) as caught:
        told(flags)

    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"rdzv_conf": "join_timeout=30"}, {"timeout": "30"}),
        ({"rdzv_conf": "timeout=30", "max_restarts": 1}, {"join_timeout": "30", "is_host": "0"}),
        ({"rdzv_conf": "timeout=9,join_timeout=30", "rdzv_backend": "c10d"}, {"join_timeout": "30", "is_host": "0"}),
        ({"rdzv_conf": "keep_alive_interval=5", "max_restarts": 1}, {"keep_alive_interval": "5", "is_host": "0"}),
        ({"rdzv_conf": "theirs=5", "rdzv_backend": "theirs"}, {"theirs": "5"}),
    ],
)
def test_how_long_machines_wait_has_one_meaning_whatever_it_is_called(flags, expected):
    found = planned({**FAR, "machine_rank": 1, **flags})

    assert found.rendezvous.options == expected


def test_a_file_may_name_a_way_to_meet_for_runs_that_have_no_need_to(tmp_path):
    (tmp_path / "c.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\nrdzv_backend: c10d\n")
    file = config_file.read(tmp_path / "c.yaml")

    request = LaunchRequest.merge({}, file, places.SLURM_TASK_PER_PROCESS, script="train.py")

    assert plan(request, Machine("python")).kind == "inline"


def test_a_plan_for_mpirun_tells_what_mpirun_will_do():
    flags = {"mpirun_hostfile": "hosts", "num_processes": 4, "gpu_ids": "0,1"}
    request = LaunchRequest.merge(flags, None, {}, script="train.py")
    found = plan(request, Machine("python", devices=FOUR, mpirun=Program(True, "a")))

    shown, text = show.describe(found, request), show.as_text(found, request)

    assert "CUDA_VISIBLE_DEVICES=0,1" in found.command
    assert shown["environment"]["CUDA_VISIBLE_DEVICES"] == {"value": "0,1", "source": "from --gpu_ids"}
    assert shown["processes"] == {"total": 4, "on_each_machine": None, "source": "from --num_processes"}
    assert (shown["machines"]["total"], shown["ranks"], shown["started_by"]) == (None, None, "mpirun")
    assert "processes    4, started by mpirun (from --num_processes)\n" in text
    assert "machines     as mpirun_hostfile=hosts (from --mpirun_hostfile) has them\n" in text
    assert "ranks here" not in text

    request = LaunchRequest.merge({**flags, "num_machines": 2}, None, {}, script="train.py")
    shown = show.describe(plan(request, Machine("python", devices=FOUR, mpirun=Program(True, "a"))), request)
    assert (shown["processes"]["on_each_machine"], shown["machines"]["total"]) == (2, 2)


def test_a_plan_for_one_of_several_tasks_does_not_count_machines():
    request = LaunchRequest.merge({"cpu": True}, None, places.SLURM_TASK_PER_PROCESS, script="train.py")

    shown = show.as_text(plan(request, Machine("python")), request)

    assert "machines     as SLURM has them\n" in shown
    assert "ranks here   3\n" in shown


@pytest.mark.parametrize("task", ["0", "3"])
@pytest.mark.parametrize("flag", ["num_machines=3", "machine_rank=1"])
def test_every_task_of_several_is_told_that_it_has_no_use_for_machines(task, flag):
    node, place = divmod(int(task), 2)
    environ = {
        **places.SLURM_TASK_PER_PROCESS,
        "SLURM_PROCID": task,
        "SLURM_LOCALID": str(place),
        "SLURM_NODEID": str(node),
    }
    name, _, value = flag.partition("=")

    assert told({name: int(value)}, None, environ) == [
        f"{flag} (from --{name}) has no use: SLURM counts and numbers the processes."
    ]


def test_machines_that_nobody_has_numbered_show_no_number_and_no_ranks():
    environ = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "[fd00::1]:29400"}
    flags = {"cpu": True, "num_processes": 4}
    for number in ({}, {"PET_NODE_RANK": "1"}):
        request = LaunchRequest.merge(flags, None, {**environ, **number}, script="train.py")
        found = plan(request, Machine("python"))
        text = show.as_text(found, request)

        assert ("; numbered when they meet\n" in text) is not bool(number)
        assert ("; this is number 1\n" in text, "ranks here   2 to 3\n" in text) == (bool(number), bool(number))
        told = show.describe(found, request)
        assert (told["machines"]["this"], told["ranks"]) == ((1, {"first": 2, "last": 3}) if number else (None, None))


def test_a_hostfile_and_the_program_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="mpirun_hostfile=x cannot be read"):
        mpirun.find(str(tmp_path / "none"), "mpirun_hostfile=x")
    (tmp_path / "hosts").write_text("\n# nobody\n")
    with pytest.raises(SettingError, match="names no host"):
        mpirun.find(str(tmp_path / "hosts"), "mpirun_hostfile=x")
    (tmp_path / "hosts").write_text("a:4\nb:4\n")
    with pytest.raises(LaunchError, match="asks for mpirun, which cannot be run: No such file"):
        mpirun.find(str(tmp_path / "hosts"), "mpirun_hostfile=x")
    for words, is_open_mpi in (("mpirun (Open MPI) 4.1.4", True), ("HYDRA build details:", False)):
        (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{words}'\n")
        (tmp_path / "mpirun").chmod(0o755)
        assert mpirun.find(str(tmp_path / "hosts"), "x") == Program(is_open_mpi, "a")


@pytest.mark.parametrize(
    ("environ", "flags", "is_alone"),
    [
        ({}, {"cpu": True, "num_processes": 2}, True),
        ({}, {"cpu": True, "num_processes": 1, "max_restarts": 1}, False),
        ({}, {"cpu": True, "num_processes": 4, "num_machines": 2, "main_process_ip": "a"}, False),
        ({}, {"cpu": True, "num_processes": 4, "mpirun_hostfile": "hosts"}, False),
        (places.OPENMPI, {"cpu": True}, True),
        (places.SLURM_TASK_PER_PROCESS, {"cpu": True}, False),
    ],
)
def test_ranks_that_are_all_here_meet_on_loopback_and_others_do_not(environ, flags, is_alone):
    program = Program(is_open_mpi=True) if "mpirun_hostfile" in flags else None

    found = in_place(environ, flags, loopback="lo", mpirun=program)

    assert found.env.get("GLOO_SOCKET_IFNAME") == ("lo" if is_alone else None)
    assert ("GLOO_SOCKET_IFNAME=lo" in found.argv) is False
