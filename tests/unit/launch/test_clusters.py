"""Where the launcher runs, from environments as the places leave them."""

from __future__ import annotations

import json

import pytest

from accelerate.commands.options import OPTIONS
from accelerate.core.errors import SettingError
from accelerate.launch import clusters, show, torchrun
from accelerate.launch.devices import Devices
from accelerate.launch.machine import Machine
from accelerate.launch.mpirun import Program
from accelerate.launch.plan import plan
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file
from tests.support import places


def asked(environ, flags=None, file=None) -> LaunchRequest:
    return LaunchRequest.merge(flags or {}, file, environ, script="train.py")


def nodes(name, machines, rank, address, port, origins, **others):
    """What a request says where each task stands for its node, every value with its origin."""
    found = {
        "num_machines": machines,
        "machine_rank": rank,
        "main_process_ip": address,
        "main_process_port": port,
        **others,
    }
    if "processes_per_machine" in found:
        found["num_processes"], origins["num_processes"] = (
            found["processes_per_machine"] * machines,
            origins["processes_per_machine"],
        )
    return {field: (value, f"from {name} ({origins[field]})") for field, value in found.items() if value is not None}


def words(num_machines, machine_rank, main_process_ip, main_process_port="", **others):
    return {
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
        "main_process_port": main_process_port,
        **others,
    }


def variables(**found):
    """The same, where each setting has a variable of its own."""
    return {field: (value, f"from the variable {variable}") for field, (value, variable) in found.items()}


SLURM_WORDS = words("SLURM_STEP_NUM_NODES", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
RANK_WORDS = words("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
ROWS = {
    "SLURM, a task for each node": (
        places.SLURM_TASK_PER_NODE,
        nodes("SLURM", 2, 1, "node1", 10_004, SLURM_WORDS),
    ),
    "SLURM, requeued": (places.SLURM_REQUEUED, nodes("SLURM", 2, 1, "node1", 10_004, SLURM_WORDS)),
    "SLURM, with an address set by the batch script": (
        {**places.SLURM_TASK_PER_NODE, "MASTER_ADDR": "ib1", "MASTER_PORT": "6000"},
        nodes("SLURM", 2, 1, "ib1", 6000, {**SLURM_WORDS, "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}),
    ),
    "SLURM, tasks named by PMI too": (places.SLURM_PMI2, nodes("SLURM", 2, 1, "node1", 10_004, SLURM_WORDS)),
    "Open MPI, a task for each node": (
        places.OPENMPI_TASK_PER_NODE,
        nodes(
            "Open MPI", 2, 1, "node-a", 29500,
            words("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR", "MASTER_PORT"),
        ),
    ),
    "Kubeflow Trainer": (
        places.KUBEFLOW,
        variables(
            num_machines=(2, "PET_NNODES"), machine_rank=(1, "PET_NODE_RANK"), processes_per_machine=(4, "PET_NPROC_PER_NODE"),
            num_processes=(8, "PET_NPROC_PER_NODE"), main_process_ip=("train-node-0-0.train", "PET_MASTER_ADDR"),
            main_process_port=(29400, "PET_MASTER_PORT"),
        ),
    ),
    "Kubeflow Trainer, as many processes as devices": (
        places.KUBEFLOW_AUTO,
        variables(
            num_machines=(2, "PET_NNODES"), machine_rank=(1, "PET_NODE_RANK"),
            processes_per_machine=("auto", "PET_NPROC_PER_NODE"),
            main_process_ip=("train-node-0-0.train", "PET_MASTER_ADDR"), main_process_port=(29400, "PET_MASTER_PORT"),
        ),
    ),
    "Kubeflow, elastic": (
        places.KUBEFLOW_ELASTIC,
        variables(
            num_machines=(4, "PET_NNODES"), min_machines=(1, "PET_NNODES"), processes_per_machine=(2, "PET_NPROC_PER_NODE"),
            num_processes=(8, "PET_NPROC_PER_NODE"), main_process_ip=("elastic-worker-0", "PET_RDZV_ENDPOINT"),
            main_process_port=(23456, "PET_RDZV_ENDPOINT"), rdzv_backend=("c10d", "PET_RDZV_BACKEND"),
            max_restarts=(10, "PET_MAX_RESTARTS"), run_id=("job-1", "PET_RDZV_ID"),
        ),
    ),
    "PyTorchJob": (places.PYTORCHJOB, nodes("PyTorchJob", 3, 1, "job-master-0", 23456, RANK_WORDS)),
    "SkyPilot": (
        places.SKYPILOT,
        nodes(
            "SkyPilot", 2, 1, "10.0.0.4", None,
            words("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", processes_per_machine="SKYPILOT_NUM_GPUS_PER_NODE"),
            processes_per_machine=8,
        ),
    ),
    "dstack": (
        places.DSTACK,
        nodes(
            "dstack", 2, 1, "10.128.0.47", None,
            words("DSTACK_NODES_NUM", "DSTACK_NODE_RANK", "DSTACK_MASTER_NODE_IP", processes_per_machine="DSTACK_GPUS_PER_NODE"),
            processes_per_machine=8,
        ),
    ),
    "SageMaker": (
        places.SAGEMAKER,
        nodes(
            "SageMaker", 2, 1, "algo-1", None,
            words("SM_HOSTS", "SM_CURRENT_HOST", "SM_HOSTS", processes_per_machine="SM_NUM_GPUS"), processes_per_machine=8,
        ),
    ),
    "DGX Cloud Lepton": (
        places.LEPTON,
        nodes(
            "DGX Cloud Lepton", 2, 1, "train-0.train-svc", None,
            words("LEPTON_JOB_TOTAL_WORKERS", "LEPTON_JOB_WORKER_INDEX", "LEPTON_JOB_WORKER_PREFIX, LEPTON_SUBDOMAIN"),
        ),
    ),
    "Vertex AI": (
        places.VERTEX,
        nodes(
            "Vertex AI", 3, 2, "cmle-workerpool0-0", 2222,
            words("CLUSTER_SPEC", "CLUSTER_SPEC", "CLUSTER_SPEC", "CLUSTER_SPEC"),
        ),
    ),
    "Vertex AI, with PyTorch's variables": (
        places.VERTEX_PYTORCH, nodes("Vertex AI", 3, 2, "cmle-workerpool0-0", 2222, RANK_WORDS),
    ),
    "AzureML, a task for each node": (places.AZUREML_NODE, nodes("AzureML", 2, 1, "10.0.0.4", 6105, RANK_WORDS)),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_task_for_each_node_says_which_machine_this_is(row):
    environ, expected = ROWS[row]

    request = asked(environ)

    assert {name: (getattr(request, name), origin) for name, origin in request.origins.items()} == expected
    assert request.notes == ()
    text = show.as_text(plan(request, Machine("python")), request)
    for name, (value, origin) in expected.items():
        assert f"  {name}={value} ({origin})" in text.splitlines(), "--dry-run says it"


TASKS = (
    (places.SLURM_TASK_PER_PROCESS, "SLURM", "3 4 1 2 node1 14100"),
    (places.SLURM_FROM_PTY_SHELL, "SLURM", "3 4 0 1 node1 22304"),
    (places.OPENMPI, "Open MPI", "1 2 1 2 127.0.0.1 29500"),
    (places.OPENMPI_TWO_NODES, "Open MPI", "3 4 1 2 node-a 29600"),
    (places.MPICH, "MPICH", "1 2 1 2 127.0.0.1 29500"),
    (places.MPICH_IN_SLURM, "MPICH", "3 4 1 2 node1 29500"),
    (places.PALS, "PALS", "5 8 1 4 nid001 29500"),
    (places.JSRUN, "jsrun", "2 4 0 2 a01 29500"),
    (places.FLUX, "Flux", "3 4 1 2 corona1 29500"),
    (places.AZUREML_PROCESS, "AzureML", "3 4 1 2 10.0.0.4 6105"),
)


@pytest.mark.parametrize(("environ", "name", "ranks"), TASKS)
def test_a_task_for_each_process_says_which_rank_this_is(environ, name, ranks):
    if environ is places.SLURM_FROM_PTY_SHELL:
        environ = {**environ, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "0"}
        ranks = "3 4 0 2 node1 22304"
    request = asked(environ, {"cpu": True})

    assert request.place is not None
    assert request.place.name == name
    assert request.origins["num_processes"].startswith(f"from {name} (")
    env = plan(request, Machine("python")).env
    assert " ".join(env[variable] for variable in places.RANKS) == ranks


@pytest.mark.parametrize("cpu", [True, False], ids=["gloo", "nccl"])
@pytest.mark.parametrize(("environ", "name", "ranks"), TASKS)
def test_tasks_on_several_nodes_do_not_meet_on_the_loopback_of_each(environ, name, ranks, cpu):
    machine = Machine("python", loopback="lo", devices=None if cpu else Devices(4))

    env = plan(asked(environ, {"cpu": cpu}), machine).env

    is_here = env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"]
    expected = ({"GLOO_SOCKET_IFNAME"} if cpu else {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}) if is_here else set()
    assert {variable for variable in env if variable.endswith("_IFNAME")} == expected


def test_tasks_that_meet_at_an_address_of_the_network_are_not_taken_for_neighbours():
    first = {
        **places.AZUREML_PROCESS,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "NODE_RANK": "0",
    }  # nothing says how many are here

    env = plan(asked(first, {"cpu": True}), Machine("python", loopback="lo")).env

    assert (env["LOCAL_WORLD_SIZE"], env.get("GLOO_SOCKET_IFNAME")) == ("4", None)


def test_mpirun_with_hosts_of_a_file_does_not_lead_them_to_their_loopback():
    request = asked({}, {"mpirun_hostfile": "hosts", "num_processes": 4, "cpu": True})

    argv = plan(request, Machine("python", loopback="lo", mpirun=Program(is_open_mpi=True, first_host="a"))).argv

    assert not [word for word in argv if "IFNAME" in word]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        places.TORCHRUN_WORKER,
        places.SLURM_PTY_OF_ONE,
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
        {**places.OPENMPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"CLUSTER_SPEC": '{"cluster": {"ps": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}'},
    ],
)
def test_what_is_no_place(environ):
    request = asked(environ)

    assert (request.num_machines, request.num_processes, request.notes) == (1, None, ())


@pytest.mark.parametrize(
    "environ", [places.SLURM_BATCH, places.SLURM_SHELL, places.SLURM_PTY_SHELL, places.SLURM_INTERACTIVE_STEP]
)
def test_a_shell_or_batch_script_of_slurm_is_no_job_and_is_told_of_the_other_nodes(environ):
    request = asked(environ)

    assert (request.num_machines, request.num_processes) == (1, None)
    assert request.notes == (
        "SLURM gave this job 2 nodes (SLURM_JOB_NUM_NODES), and this command uses one of them. "
        "To use all: srun --ntasks-per-node=1 accelerate launch ...",
    )


def test_the_other_nodes_are_not_told_of_where_several_machines_are_asked_for(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: h\n")

    for request in (
        asked(places.SLURM_BATCH, file=config_file.read(file)),
        asked(places.SLURM_BATCH, {"num_machines": 2, "main_process_ip": "h"}),
    ):
        assert (request.num_machines, request.notes) == (2, ())


@pytest.mark.parametrize("index", [3, "x"])
@pytest.mark.parametrize("pool", [["h0:2222"], 7])
def test_a_description_of_vertex_that_does_not_fit_is_refused(index, pool):
    spec = {"cluster": {"workerpool0": pool}, "task": {"type": "workerpool0", "index": index}}

    with pytest.raises(
        SettingError, match=f"CLUSTER_SPEC in the environment says that this is workerpool0 {index}, and"
    ):
        asked({"CLUSTER_SPEC": json.dumps(spec)})


def test_a_host_of_vertex_may_have_no_port():
    spec = {"cluster": {"workerpool0": ["h0", "h1"]}, "task": {"type": "workerpool0", "index": 1}}

    request = asked({"CLUSTER_SPEC": json.dumps(spec)})

    assert (request.main_process_ip, request.main_process_port, request.machine_rank) == ("h0", None, 1)


def test_one_node_of_a_place_is_this_machine():
    request = asked({**places.SKYPILOT, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"})

    assert (request.num_machines, request.num_processes, request.main_process_ip) == (1, 8, None)


# --- flags, place, file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "values", "note"),
    [
        ({"main_process_ip": "x"}, (2, 1, "x"), "main_process_ip=x (from --main_process_ip) contradicts main_process_ip=node1 (from SLURM (SLURM_STEP_NODELIST))"),
        ({"machine_rank": 0}, (2, 0, "node1"), "machine_rank=0 (from --machine_rank) contradicts machine_rank=1 (from SLURM (SLURM_NODEID))"),
        ({"num_machines": 1}, (1, 0, None), "num_machines=1 (from --num_machines) contradicts 2 (from SLURM (SLURM_STEP_NUM_NODES))"),
        ({"num_machines": 3, "machine_rank": 2, "main_process_ip": "y"}, (3, 2, "y"), "num_machines=3 (from --num_machines) contradicts 2 (from SLURM (SLURM_STEP_NUM_NODES))"),
        ({"num_processes": 1}, (1, 0, None), "num_processes=1 (from --num_processes) contradicts 2 machines (from SLURM (SLURM_STEP_NUM_NODES))"),
        ({"num_machines": 2, "machine_rank": 1, "num_processes": 4}, (2, 1, "node1"), None),
        ({"num_machines": "1:2"}, (2, 1, "node1"), None),
        ({"nproc_per_node": 2}, (2, 1, "node1"), None),
        ({"standalone": True}, (1, 0, None), "standalone=True (from --standalone) contradicts 2 machines (from SLURM (SLURM_STEP_NUM_NODES))"),
    ],
)  # fmt: skip
def test_a_flag_wins_over_the_place_and_the_contradiction_is_noted(flags, values, note):
    request = asked(places.SLURM_TASK_PER_NODE, flags)

    assert (request.num_machines, request.machine_rank, request.main_process_ip) == values
    assert request.notes == ((f"{note}: the flag is followed.",) if note else ())


@pytest.mark.parametrize(
    ("flags", "environ", "processes", "note"),
    [
        ({"nproc_per_node": 8}, {}, 8, "processes_per_machine=8 (from --nproc_per_node) contradicts 2 (from SLURM (SLURM_STEP_NUM_TASKS)): the flag"),
        ({"num_processes": 8}, {}, 8, "num_processes=8 (from --num_processes) contradicts 4 (from SLURM (SLURM_STEP_NUM_TASKS)): the flag"),
        ({}, {"ACCELERATE_NUM_PROCESSES": "2"}, 2, "num_processes=2 (from the variable ACCELERATE_NUM_PROCESSES) contradicts 4 (from SLURM (SLURM_STEP_NUM_TASKS)): the variable"),
        ({}, {"PET_NPROC_PER_NODE": "3"}, 3, "processes_per_machine=3 (from the variable PET_NPROC_PER_NODE) contradicts 2 (from SLURM (SLURM_STEP_NUM_TASKS)): the variable"),
        ({"standalone": True, "num_processes": 2}, {}, 2, "standalone=True (from --standalone) contradicts 4 processes (from SLURM (SLURM_STEP_NUM_TASKS)): the flag"),
    ],
)  # fmt: skip
def test_who_asks_for_another_number_of_processes_than_the_tasks_asks_for_another_run(flags, environ, processes, note):
    request = asked({**places.SLURM_TASK_PER_PROCESS, **environ}, {"cpu": True, **flags})
    planned = plan(request, Machine("python"))

    assert (planned.world_size, request.num_processes, planned.kind) == (processes, processes, "elastic")
    assert request.notes == (f"{note} is followed.",)
    assert request.hidden == ("SLURM_PROCID",)


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ({"nproc_per_node": 2}, ()),
        ({"num_processes": 4}, ()),
        ({"nproc_per_node": "gpu"}, ("processes_per_machine=gpu (from --nproc_per_node) is left aside: SLURM has started the processes.",)),
    ],
)  # fmt: skip
def test_who_says_what_the_tasks_are_changes_nothing(flags, notes):
    request = asked(places.SLURM_TASK_PER_PROCESS, flags)
    planned = plan(request, Machine("python"))

    assert (planned.world_size, request.num_processes, request.notes) == (4, 4, notes)
    source = show.describe(planned, request)["processes"]["source"]
    assert source == ("from --num_processes" if "num_processes" in flags else "from SLURM (SLURM_STEP_NUM_TASKS)")


def test_processes_of_a_machine_are_compared_with_those_of_the_place():
    request = asked(places.SKYPILOT, {"nproc_per_node": 4})

    assert (request.num_machines, request.num_processes) == (2, 8)
    assert request.notes == (
        "num_processes=8 (from --nproc_per_node) contradicts num_processes=16 (from SkyPilot (SKYPILOT_NUM_GPUS_PER_NODE)): "
        "the flag is followed.",
    )
    assert asked(places.SKYPILOT, {"num_processes": 16}).notes == ()


def test_tasks_that_are_spread_unevenly_are_all_processes():
    spread = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NTASKS": "3"}
    tasks = [(0, 0, 0), (1, 0, 1), (2, 1, 0)]  # task, node, the task's number there

    found = []
    for task, node, local in tasks:
        here = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
        request = asked({**places.SLURM_TASK_PER_PROCESS, **spread, **here}, {"cpu": True})
        planned = plan(request, Machine("python", loopback="lo"))
        found.append(" ".join(planned.env[name] for name in places.RANKS[:4]))
        assert (planned.kind, "GLOO_SOCKET_IFNAME" in planned.env) == ("inline", False)

    assert found == ["0 3 0 2", "1 3 1 2", "2 3 0 1"]


def test_a_lone_task_of_mpi_is_a_process_where_the_number_of_nodes_says_so():
    lone = {**places.OPENMPI_TASK_PER_NODE, "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
    first = {**lone, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    counted = {"OMPI_MCA_orte_num_nodes": "2"}

    assert plan(asked({**lone, **counted}, {"cpu": True}), Machine("python")).env["RANK"] == "2"
    assert plan(asked({**first, **counted}, {"cpu": True}), Machine("python")).env["LOCAL_WORLD_SIZE"] == "2"
    with pytest.raises(SettingError, match="^2 of 3 tasks run on this node .*: the one that is alone on another node"):
        asked(first)


@pytest.mark.parametrize("flag", ["num_machines", "nnodes"])
def test_one_way_to_read_a_number_of_machines_that_may_change(flag):
    request = asked(places.SLURM_TASK_PER_NODE, {flag: "1:2", "nproc_per_node": 2})

    assert (request.num_machines, request.min_machines, request.num_processes) == (2, 1, 4)
    assert asked({}, {flag: "2:2", "main_process_ip": "a"}).min_machines is None


def test_a_flag_for_a_fixed_number_of_machines_wins_over_a_variable_for_one_that_may_change():
    request = asked({**places.KUBEFLOW, "PET_NNODES": "1:2"}, {"num_machines": 2})

    assert (request.num_machines, request.min_machines, request.machine_rank) == (2, None, 1)


# --- torchrun's variables ----------------------------------------------------------------------------------


def test_every_variable_of_torchrun_is_read_with_the_type_of_its_flag():
    from torch.distributed.run import get_args_parser

    # Its actions for flags that have a variable.
    theirs = {action.dest for action in get_args_parser()._actions if type(action).__name__ in ("env", "check_env")}
    ours = {option.name: option.kind for option in OPTIONS}

    assert {"nnodes", "rdzv_id", "standalone"} <= theirs <= set(torchrun.VARIABLES)
    text = {int: "3", float: "0.5", bool: "1", str: "words"}
    for flag, read in torchrun.VARIABLES.items():
        assert type(read(text[ours[flag]])) is ours[flag], flag


def test_variables_of_torchrun_are_flags_of_every_run():
    environ = {
        "PET_MAX_RESTARTS": "3", "PET_MONITOR_INTERVAL": "2", "PET_REDIRECTS": "3", "PET_LOG_DIR": "logs", "PET_ROLE": "",
        "PET_LOCAL_RANKS_FILTER": "0", "PET_RDZV_ID": "mine", "PET_STANDALONE": "1", "PET_RUN_PATH": "0",
    }  # fmt: skip

    request = asked(environ)

    found = {name: (getattr(request, name), origin) for name, origin in request.origins.items()}
    assert found == variables(
        max_restarts=(3, "PET_MAX_RESTARTS"), monitor_interval=(2.0, "PET_MONITOR_INTERVAL"), redirects=("3", "PET_REDIRECTS"),
        log_dir=("logs", "PET_LOG_DIR"), local_ranks_filter=("0", "PET_LOCAL_RANKS_FILTER"), run_id=("mine", "PET_RDZV_ID"),
        standalone=(True, "PET_STANDALONE"),
    )  # fmt: skip
    assert request.notes == ()
    assert plan(request, Machine("python")).kind == "elastic"


def test_variables_that_torchrun_has_not_are_told():
    environ = dict.fromkeys(["PET_NNODES", "PET_NUMA_BINDING", "PET_NODE_RANKS", "PET_FOO", "PETER_FOO"], "1")

    begin = "has no effect: torchrun has no such variable."
    assert torchrun.about_unknown(environ) == [
        f"the variable PET_NUMA_BINDING {begin} Pass --numa_binding.",
        f"the variable PET_NODE_RANKS {begin} Did you mean PET_NODE_RANK?",
        f"the variable PET_FOO {begin}",
    ]


@pytest.mark.parametrize("place", [places.OPENMPI_TASK_PER_NODE, places.SLURM_TASK_PER_NODE], ids=["mpi", "slurm"])
def test_a_port_that_is_none_is_refused_and_not_replaced(place):
    with pytest.raises(SettingError, match="MASTER_PORT='29x' in the environment is no port"):
        asked({**place, "MASTER_PORT": "29x"})


def test_variables_of_torchrun_stand_beside_another_place():
    environ = {**places.SLURM_TASK_PER_NODE, "PET_NPROC_PER_NODE": "8", "PET_MAX_RESTARTS": "2"}

    request = asked(environ)

    assert (request.num_machines, request.num_processes, request.max_restarts) == (2, 16, 2)
    assert (request.main_process_ip, request.notes) == ("node1", ())


def test_variables_of_torchrun_that_count_machines_describe_the_whole_run():
    # As the controller of a PyTorchJob sets them, beside its own.
    beside = {"RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}

    request = asked({**places.KUBEFLOW, **beside})

    assert (request.num_machines, request.machine_rank, request.num_processes, request.notes) == (2, 1, 8, ())


def test_an_address_of_ipv6_may_be_in_the_variable():
    request = asked({**places.KUBEFLOW_ELASTIC, "PET_RDZV_ENDPOINT": "[fd00::1]:29400"})

    assert (request.main_process_ip, request.main_process_port) == ("fd00::1", 29400)


def test_a_flag_leaves_the_machines_of_torchruns_variables_aside_and_nothing_else():
    request = asked({**places.KUBEFLOW, "PET_MAX_RESTARTS": "2"}, {"num_processes": 1})

    assert (request.num_machines, request.machine_rank, request.main_process_ip) == (1, 0, None)
    assert (request.num_processes, request.max_restarts) == (1, 2)
    assert request.notes == (
        "num_processes=1 (from --num_processes) contradicts 2 machines (from the variable PET_NNODES): the flag is followed.",
    )


def test_one_machine_of_torchruns_variables_is_this_machine_alone():
    request = asked({**places.KUBEFLOW, "PET_NNODES": "1", "PET_NODE_RANK": "0"}, {"standalone": True})

    assert (request.num_processes, request.main_process_ip, request.notes) == (4, None, ())


def test_a_worker_does_not_follow_the_variables_of_the_run_it_belongs_to():
    assert asked({**places.KUBEFLOW, **places.TORCHRUN_WORKER}).origins == {}


# --- files -------------------------------------------------------------------------------------------------


def written(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return config_file.read(tmp_path / "c.yaml")


def test_a_place_wins_over_the_file_which_speaks_for_each_machine(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_GPU\nnum_machines: 1\nmachine_rank: 0\nnum_processes: 8\n")

    request = asked(places.SLURM_TASK_PER_NODE, file=file)

    assert (request.num_machines, request.machine_rank, request.num_processes) == (2, 1, 16)
    assert request.origins["num_processes"].endswith("line 4, for each of 2 machines")
    assert len(request.notes) == 1
    assert request.notes[0].endswith(
        "contradicts num_machines=2 (from SLURM (SLURM_STEP_NUM_NODES)): SLURM is followed."
    )


@pytest.mark.parametrize("lines", ["", "num_machines: 1\nmachine_rank: 0\n"])
def test_a_file_for_one_machine_speaks_for_each_of_those_that_a_flag_counts(tmp_path, lines):
    file = written(tmp_path, f"distributed_type: MULTI_GPU\nnum_processes: 4\n{lines}")
    flags = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "a"}

    request = asked({}, flags, file)

    assert (request.num_processes, request.num_machines, request.machine_rank) == (8, 2, 1)
    assert request.origin("num_processes").endswith("line 2, for each of 2 machines")
    assert request.notes == (
        f"num_processes=4 (from num_processes in {file.path}, line 2) stands in a file for 1 machine(s): 4 on each of the "
        "2 machine(s) (from --num_machines).",
    )
    assert (asked({}, {**flags, "num_processes": 2}, file).num_processes, asked({}, flags).notes) == (2, ())


def test_a_file_for_several_machines_has_its_share_started_where_a_flag_wants_this_one_alone(tmp_path):
    file = written(
        tmp_path,
        "distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: a\n",
    )

    for flags, origin in (({"standalone": True}, "--standalone"), ({"num_machines": 1}, "--num_machines")):
        request = asked({}, flags, file)
        assert (request.num_processes, request.num_machines) == (2, 1)
        assert request.notes == (
            f"num_processes=4 (from num_processes in {file.path}, line 2) stands in a file for 2 machine(s): 2 on each of "
            f"the 1 machine(s) (from {origin}).",
        )
    assert asked({}, {"standalone": True, "num_processes": 4}, file).notes == ()


def test_the_file_of_config_default_stands_in_the_way_of_no_flag(tmp_path):
    file = written(tmp_path, "distributed_type: 'NO'\nnum_machines: 1\nmachine_rank: 0\nnum_processes: 1\n")

    request = asked({}, {"num_machines": 2, "machine_rank": 0, "main_process_ip": "a"}, file)

    assert (request.num_processes, request.processes_per_machine) == (2, 1)


def test_a_file_counts_the_processes_of_all_machines_where_one_program_starts_them(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_CPU\nnum_processes: 4\n")

    request = asked({}, {"num_machines": 2, "mpirun_hostfile": "hosts"}, file)

    assert (request.num_processes, request.notes) == (4, ())


WRITTEN = "distributed_type: MULTI_CPU\nmachine_rank: 0\nnum_machines: 1\nnum_processes: 2\nrdzv_backend: static\n"


@pytest.mark.parametrize(
    ("environ", "flags"),
    [({}, {"num_machines": "1:2", "main_process_ip": "a"}), (places.KUBEFLOW_ELASTIC, {})],
)
def test_a_file_as_config_writes_it_does_not_stand_against_machines_that_come_and_go(tmp_path, environ, flags):
    request = asked(environ, flags, written(tmp_path, WRITTEN))

    assert request.min_machines == 1
    assert plan(request, Machine("python")).rendezvous.backend == "c10d"


def test_a_file_for_one_machine_does_not_make_each_of_several_the_first_one(tmp_path):
    flags = {"nnodes": "2", "rdzv_backend": "c10d", "rdzv_endpoint": "a:29400"}

    meeting = plan(asked({}, flags, written(tmp_path, WRITTEN)), Machine("python")).rendezvous

    assert (meeting.is_numbered, meeting.options) == (False, {})


def test_a_run_on_this_machine_only_leaves_the_machines_of_a_file_aside(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_CPU\nmachine_rank: 1\nnum_machines: 2\nmain_process_ip: a\n")

    request = asked({}, {"standalone": True, "nproc_per_node": 2}, file)

    assert (request.num_machines, request.machine_rank, request.main_process_ip, request.num_processes) == (
        1,
        0,
        None,
        2,
    )


def test_tasks_that_are_processes_win_over_a_number_in_the_file(tmp_path):
    file = written(tmp_path, "distributed_type: MULTI_CPU\nnum_processes: 2\n")

    request = asked(places.SLURM_TASK_PER_PROCESS, file=file)

    assert request.num_processes == 4
    assert "num_processes=2" in request.notes[0]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({**places.SLURM_TASK_PER_NODE, "SLURM_NODEID": "2"}, "SLURM_NODEID and SLURM_STEP_NUM_NODES"),
        ({**places.SKYPILOT, "SKYPILOT_NODE_RANK": "2"}, "SKYPILOT_NODE_RANK and SKYPILOT_NUM_NODES"),
        ({**places.DSTACK, "DSTACK_NODES_NUM": "two"}, "DSTACK_NODES_NUM='two'"),
        ({**places.SAGEMAKER, "SM_CURRENT_HOST": "algo-9"}, "does not list this machine, SM_CURRENT_HOST='algo-9'"),
        ({**places.SAGEMAKER, "SM_HOSTS": "algo-1"}, "SM_HOSTS='algo-1' in the environment is not JSON"),
        ({**places.KUBEFLOW, "PET_NPROC_PER_NODE": "many"}, "nproc_per_node='many' (from the variable PET_NPROC_PER_NODE) is no"),
        ({**places.KUBEFLOW, "PET_NNODES": "3:2"}, "nnodes='3:2' (from the variable PET_NNODES) is no number of machines"),
        ({**places.KUBEFLOW, "PET_MAX_RESTARTS": "x"}, "PET_MAX_RESTARTS='x' in the environment cannot be read"),
        ({"PET_STANDALONE": "maybe"}, "PET_STANDALONE='maybe' in the environment cannot be read.\nAccepted: true or false"),
    ],
)  # fmt: skip
def test_garbage_is_refused_by_name(environ, expected):
    with pytest.raises(SettingError) as caught:
        asked(environ)
    assert expected in str(caught.value)


def test_rows_read_and_change_nothing():
    for environ, _ in ROWS.values():
        before = json.dumps(environ)
        clusters.find(environ)
        assert json.dumps(environ) == before


def test_mpirun_is_not_started_where_a_place_has_started_the_processes(tmp_path):
    file = written(
        tmp_path, "distributed_type: MULTI_CPU\nnum_processes: 4\nmpirun_config:\n  mpirun_hostfile: hosts\n"
    )

    inside = asked(places.OPENMPI_TWO_NODES, file=file)

    assert asked({}, file=file).mpirun_hostfile == "hosts"
    assert inside.mpirun_hostfile is None
    assert inside.notes[0].endswith("is left aside: Open MPI has started the processes.")
    with pytest.raises(SettingError, match="mpirun_hostfile=mine .* would start all of it"):
        asked(places.OPENMPI_TWO_NODES, {"mpirun_hostfile": "mine", "num_processes": 2})
