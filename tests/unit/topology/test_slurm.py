"""SLURM's own ways of writing lists."""

from __future__ import annotations

import pytest

from accelerate.core.errors import SettingError
from accelerate.topology import Process, detect, slurm
from tests.support import places


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[1-3,7]", "node1 node2 node3 node7"),
        ("gpu[08-11],login2,cpu-a[1,3]", "gpu08 gpu09 gpu10 gpu11 login2 cpu-a1 cpu-a3"),
        ("rack[1-2]n[01-02]", "rack1n01 rack1n02 rack2n01 rack2n02"),
        ("n[1-2].cluster", "n1.cluster n2.cluster"),
        ("", ""),
    ],
)
def test_a_list_of_hosts_is_written_out(text, hosts):
    assert slurm.expand(text) == tuple(hosts.split())


def test_a_script_under_srun_finds_its_rank_without_a_launcher():
    expected = Process(rank=3, world_size=4, local_rank=1, local_world_size=2, source="slurm", address="node1:14100")

    assert detect(places.SLURM_TASK_PER_PROCESS) == expected
    assert detect({**places.SLURM_TASK_PER_PROCESS, "MASTER_ADDR": "a", "MASTER_PORT": "1"}).address == "a:1"


def test_tasks_may_be_spread_unevenly():
    environ = {
        **places.SLURM_TASK_PER_PROCESS, "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip

    found = detect(environ)

    assert (found.rank, found.local_rank, found.local_world_size) == (2, 0, 1)


def test_tasks_on_one_node_meet_on_it():
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}

    assert detect({**places.SLURM_TASK_PER_PROCESS, **one}).address == "127.0.0.1:14100"


@pytest.mark.parametrize(
    "environ",
    [
        places.SLURM_BATCH,
        places.SLURM_SHELL,
        places.SLURM_PTY_SHELL,
        places.SLURM_INTERACTIVE_STEP,
        places.SLURM_PTY_OF_ONE,
    ],
)
def test_a_script_in_a_shell_or_batch_script_is_alone(environ):
    assert detect(environ) == Process()


def test_jobs_and_steps_beside_each_other_meet_at_different_ports():
    ports = {slurm.port(job, step) for job in range(500, 600) for step in range(5)}

    assert len(ports) == 500
    assert min(ports) >= 10_000
    assert max(ports) < 30_000


def test_garbage_is_refused_by_name():
    with pytest.raises(SettingError, match="SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE"):
        detect({**places.SLURM_TASK_PER_PROCESS, "SLURM_LOCALID": "2"})
    nameless = {k: v for k, v in places.SLURM_TASK_PER_PROCESS.items() if not k.endswith("NODELIST")}
    with pytest.raises(SettingError, match="SLURM_STEP_NODELIST does not name them"):
        detect(nameless)
