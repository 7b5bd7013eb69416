"""Who this process is, from environments as launchers leave them."""

from __future__ import annotations

import pytest

from accelerate.core.errors import SettingError
from accelerate.topology import SOURCES, Process, attached, connect, detect, mpi, slurm, torchrun
from tests.support import places

# What each launcher sets, recorded; variables of no interest here left out.
TORCHRUN = {
    "GROUP_RANK": "0", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
}  # fmt: skip
TORCHRUN_ALONE = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
TORCHRUN_TWO_NODES = {
    **TORCHRUN, "GROUP_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a",
}  # fmt: skip
USE_ENV = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
OPENMPI_TWO_NODES = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "node-a", "MASTER_PORT": "29600",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "0", "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
INTEL = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INTEL_TWO_NODES = {
    "PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "10.0.0.1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2"}


def place(rank, world_size, local_rank, local_world_size, source, address):
    return Process(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        source=source,
        address=address,
    )


@pytest.mark.parametrize(
    ("environ", "process"),
    [
        pytest.param({}, Process(), id="no launcher"),
        pytest.param(DEEPSPEED, place(3, 4, 1, 2, "torchrun", "a:29500"), id="DeepSpeed's launcher, two hosts"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"},
            place(1, 2, 0, 1, "torchrun", "pod-0:29500"),
            id="one process in each container",
        ),
        pytest.param(TORCHRUN, place(1, 2, 1, 2, "torchrun", "127.0.0.1:29511"), id="torchrun"),
        pytest.param(TORCHRUN_ALONE, place(0, 1, 0, 1, "torchrun", "127.0.0.1:29511"), id="torchrun, one process"),
        pytest.param(TORCHRUN_TWO_NODES, place(3, 4, 1, 2, "torchrun", "node-a:29511"), id="torchrun, two nodes"),
        pytest.param(
            USE_ENV, place(1, 2, 1, 2, "torchrun", "127.0.0.1:29500"), id="torch.distributed.launch --use_env"
        ),
        pytest.param(OPENMPI, place(1, 2, 1, 2, "mpi", "127.0.0.1:29500"), id="Open MPI"),
        pytest.param(OPENMPI_TWO_NODES, place(3, 4, 1, 2, "mpi", "node-a:29600"), id="Open MPI, two nodes"),
        pytest.param(MVAPICH, place(0, 2, 0, 2, "mpi", "127.0.0.1:29500"), id="MVAPICH2"),
        pytest.param(INTEL, place(1, 2, 1, 2, "mpi", "127.0.0.1:29500"), id="Intel MPI"),
        pytest.param(INTEL_TWO_NODES, place(2, 4, 0, 2, "mpi", "10.0.0.1:29500"), id="Intel MPI, two nodes"),
        pytest.param(MPICH, place(1, 2, 1, 2, "mpi", "127.0.0.1:29500"), id="MPICH, one node"),
        pytest.param({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "1"}, Process(), id="mpirun -n 1"),
        pytest.param({"LOCAL_RANK": "-1"}, Process(), id="LOCAL_RANK=-1, as old scripts set it"),
        pytest.param({"LOCAL_RANK": "0"}, Process(), id="LOCAL_RANK alone"),
        pytest.param(
            {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"}, Process(), id="one process and nowhere to meet"
        ),
        pytest.param(
            {**OPENMPI, **TORCHRUN}, place(1, 2, 1, 2, "torchrun", "127.0.0.1:29511"), id="torchrun under MPI"
        ),
        pytest.param({**TORCHRUN, "MASTER_ADDR": "fe80::1"}, place(1, 2, 1, 2, "torchrun", "fe80::1:29511"), id="IPv6"),
    ],
)
def test_detect(environ, process):
    assert detect(environ) == process


@pytest.mark.parametrize(
    ("variables", "local_world_size"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1"}, 2),
        ({"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1", "NODE_COUNT": "2"}, 2),
        ({"RANK": "1", "LOCAL_RANK": "1", "NODE_RANK": "0", "NODE_COUNT": "2"}, 2),
        ({"RANK": "1", "LOCAL_RANK": "1", "NODE_RANK": "0", "NODE_COUNT": "2", "LOCAL_WORLD_SIZE": "3"}, 3),
        ({"RANK": "3", "LOCAL_RANK": "0", "NODE_RANK": "3"}, 1),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 2),
        ({"RANK": "1", "LOCAL_RANK": "1"}, 4),
    ],
)
def test_processes_of_a_machine_are_counted_where_nobody_says_how_many_there_are(variables, local_world_size):
    found = detect({**USE_ENV, "WORLD_SIZE": "4", **variables})

    assert (found.local_rank, found.local_world_size) == (int(variables["LOCAL_RANK"]), local_world_size)


def test_detection_changes_nothing():
    environ = dict(TORCHRUN)
    detect(environ)
    assert environ == TORCHRUN


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"LOCAL_RANK": "zero"}, "LOCAL_RANK='zero' in the environment is not a rank or size"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' in the environment"),
        ({**TORCHRUN, "RANK": ""}, "RANK is not set, although other variables say that a launcher"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK is not set, although"),
        ({**TORCHRUN, "RANK": "2"}, "rank 2 is not below the world size 2 (RANK and WORLD_SIZE in the environment)"),
        ({**TORCHRUN, "WORLD_SIZE": "0", "RANK": "0"}, "rank 0 is not below the world size 0"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "rank 2 is not below the world size 2 (LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "(LOCAL_RANK and LOCAL_WORLD_SIZE in the environment)"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set, although"),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x'"),
        (
            {**OPENMPI, "OMPI_COMM_WORLD_RANK": "2"},
            "(OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE in the environment)",
        ),
        (
            {**MVAPICH, "MV2_COMM_WORLD_LOCAL_SIZE": "0"},
            "rank 0 is not below the world size 0 (MV2_COMM_WORLD_LOCAL_RANK",
        ),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT='abc' in the environment is no port."),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT='0' in the environment is no port."),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT='65536' in the environment is no port."),
        ({**OPENMPI, "MASTER_PORT": "29x"}, "MASTER_PORT='29x' in the environment is no port."),
        ({**places.SLURM_TASK_PER_PROCESS, "MASTER_PORT": "29x"}, "MASTER_PORT='29x' in the environment is no port."),
        ({**INTEL, "MPI_LOCALRANKID": "2"}, "(MPI_LOCALRANKID and MPI_LOCALNRANKS in the environment)"),
    ],
)
def test_garbage_is_refused_by_name(environ, words):
    with pytest.raises(SettingError) as caught:
        detect(environ)
    assert words in str(caught.value)
    assert "Accepted: " in str(caught.value)


@pytest.mark.parametrize("environ", [OPENMPI_TWO_NODES, INTEL_TWO_NODES])
def test_mpi_on_several_nodes_must_say_where_they_meet(environ):
    environ = {name: value for name, value in environ.items() if not name.startswith("MASTER")}
    with pytest.raises(SettingError, match="several nodes, and MASTER_ADDR does not say") as caught:
        detect(environ)
    assert "mpirun -x MASTER_ADDR=" in str(caught.value)


def test_an_existing_group_wins_over_all_variables(monkeypatch):
    monkeypatch.setattr(connect, "existing_group", lambda: (2, 3))
    assert detect({}) == place(2, 3, 2, 3, "attached", None)
    assert detect({**OPENMPI, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == place(2, 3, 0, 1, "attached", None)


def test_sources_are_asked_in_order():
    assert SOURCES == (attached.find, torchrun.find, mpi.find, slurm.find)


def test_who_has_a_group_to_join():
    assert not Process().is_distributed
    assert detect(TORCHRUN_ALONE).is_distributed
    assert detect(OPENMPI).is_distributed


def test_one_process_alone_may_leave_its_port_to_the_system():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

    assert detect({**alone, "MASTER_PORT": "0"}).address == "127.0.0.1:0"
    assert detect({**alone, "MASTER_PORT": ""}).address == "127.0.0.1:29500"
