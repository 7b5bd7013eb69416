"""Runs over two hosts with a wire between them. `make two-hosts` runs all of it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hosts, meeting, places
from tests.support.hosts import Host
from tests.support.ranks import free_port

LIMIT_SECONDS = 120
FOUR_MET = meeting.four("host1", "host2")
LAUNCH = (sys.executable, "-m", "accelerate", "launch")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    lacking = hosts.missing()
    if lacking:
        pytest.skip(lacking)
    with hosts.two_hosts() as made:
        yield made


class Run:
    """A folder to run in, and what was started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.beside: list[subprocess.Popen[bytes]] = []
        self.environ = meeting.prepare(folder)

    def serve(self, host: Host, program: str, *words: str) -> None:
        """Start a program that listens there, and is none of the run."""
        log = self.folder / f"beside-{len(self.beside)}.log"
        self.beside.append(host.start(sys.executable, "-c", program, *words, environ=self.environ, log=log))

    def start(self, host: Host, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"{len(self.started)}.log"
        child = host.start(*command, environ={**self.environ, **variables}, log=log)
        self.started.append((child, log))
        return child

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for _, log in self.started)

    def wait_for_all(self) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        for child, _ in self.started:
            try:
                child.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"still running\n{self.logs()}")
        assert [child.returncode for child, _ in self.started] == [0] * len(self.started), self.logs()

    def results(self) -> dict[str, dict]:
        return meeting.results(self.folder)


@pytest.fixture
def run(tmp_path, pair) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    for host in pair:
        host.fall()
    for child in [*made.beside, *(child for child, _ in made.started)]:
        child.wait(LIMIT_SECONDS)


def slurm_task(task: int, tasks_here: int) -> dict[str, str]:
    """Return what `srun -N2 --ntasks-per-node=N` gives to one of its tasks."""
    node, local = divmod(task, tasks_here)
    return {
        **places.SLURM_TASK_PER_NODE,
        "SLURM_JOB_ID": str(free_port() - 10_000),  # the port is chosen by it
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"host{node + 1}",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(local),
        "SLURM_NTASKS": str(2 * tasks_here),
        "SLURM_STEP_NUM_TASKS": str(2 * tasks_here),
        "SLURM_STEP_NODELIST": "host[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks_here}(x2)",
    }


def test_four_slurm_tasks_on_two_hosts_meet_without_a_flag(run, pair):
    job = slurm_task(0, 2)["SLURM_JOB_ID"]
    for task in (3, 1, 2, 0):
        run.start(pair[task // 2], *LAUNCH, "meet.py", **{**slurm_task(task, 2), "SLURM_JOB_ID": job})

    run.wait_for_all()

    assert run.results() == FOUR_MET


@pytest.mark.full
def test_slurm_tasks_that_are_spread_unevenly_meet(run, pair):
    job = slurm_task(0, 1)["SLURM_JOB_ID"]
    three = {"SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_JOB_ID": job}
    for task in (2, 1, 0):
        run.start(pair[task // 2], *LAUNCH, "--cpu", "meet.py", **{**slurm_task(task, 2), **three})

    run.wait_for_all()

    assert {rank: told["met"] for rank, told in run.results().items()} == {str(rank): [0, 1, 2] for rank in range(3)}


@pytest.mark.full
def test_a_slurm_task_on_each_host_starts_its_processes(run, pair):
    job = slurm_task(0, 1)["SLURM_JOB_ID"]
    for task in (1, 0):
        variables = {**slurm_task(task, 1), "SLURM_JOB_ID": job}
        run.start(pair[task], *LAUNCH, "--cpu", "-n", "4", "meet.py", **variables)

    run.wait_for_all()

    assert run.results() == FOUR_MET


@pytest.mark.full
@pytest.mark.parametrize("how", ["static", "c10d", "name"])
def test_two_hosts_meet_by_machine_rank(run, pair, how):
    address = pair[0].name if how == "name" else pair[0].address
    backend = ["--rdzv_backend", how] if how != "name" else []
    for rank in (1, 0):
        words = ["--cpu", "-n", "4", "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", address]
        run.start(pair[rank], *LAUNCH, *words, *backend, "meet.py")

    run.wait_for_all()

    assert run.results() == FOUR_MET


@pytest.mark.full
def test_two_hosts_meet_by_torchrun(run, pair):
    for rank in (1, 0):
        words = ["--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(rank), "--master_addr", pair[0].address]
        run.start(pair[rank], sys.executable, "-m", "torch.distributed.run", *words, "meet.py")

    run.wait_for_all()

    assert run.results() == FOUR_MET


@pytest.mark.full
def test_scripts_started_by_srun_alone_meet(run, pair):
    job = slurm_task(0, 2)["SLURM_JOB_ID"]
    for task in (3, 1, 2, 0):
        run.start(pair[task // 2], sys.executable, "meet.py", **{**slurm_task(task, 2), "SLURM_JOB_ID": job})

    run.wait_for_all()

    assert run.results() == FOUR_MET


# --- hosts that fall, and come back ------------------------------------------------------------------------

ON_AND_ON = """
import os, pathlib, socket, time
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
out = pathlib.Path(os.environ["OUT"])
host, rank, world = socket.gethostname(), accelerator.process_index, accelerator.num_processes
accelerator.wait_for_everyone()
(out / f"began-{host}-{rank}-of-{world}-{os.getpid()}").touch()
while True:
    told = accelerator.gather(torch.tensor([int((out / "stop").exists())]))
    if told.any():
        break
    time.sleep(0.1)
(out / f"ended-{host}-{rank}-of-{world}").touch()
accelerator.end_training()
"""


def wait_for(run: Run, pattern: str, count: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(found := list((run.folder / "out").glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern}: {[file.name for file in found]}\n{run.logs()}"
        time.sleep(0.1)


@pytest.mark.full
@pytest.mark.parametrize("machines", ["2", "1:2"])
def test_a_host_that_falls_comes_back_and_the_run_goes_on(run, pair, machines):
    (run.folder / "on.py").write_text(ON_AND_ON)

    def launch(rank: int) -> None:
        words = ["--cpu", "-n", "4", "--num_machines", machines, "--max_restarts", "3"]
        words += ["--machine_rank", str(rank), "--main_process_ip", pair[0].address]
        # How long others wait for a machine that says nothing, and for more machines than the fewest: 15 and 30 s.
        words += ["--rdzv_conf", "keep_alive_interval=1,last_call_timeout=5"]
        run.start(pair[rank], *LAUNCH, *words, "on.py")

    for rank in (0, 1):
        launch(rank)
    wait_for(run, "began-host?-?-of-4-*", 4)
    pair[1].fall()
    if machines == "1:2":
        wait_for(run, "began-host1-?-of-2-*", 2)
    launch(1)
    wait_for(run, "began-host?-?-of-4-*", 8)
    (run.folder / "out" / "stop").touch()
    fallen = run.started.pop(1)
    run.wait_for_all()

    assert fallen[0].wait() != 0
    ended = sorted(file.name for file in (run.folder / "out").glob("ended-*"))
    assert ended == [f"ended-host{1 + rank // 2}-{rank}-of-4" for rank in range(4)]


# --- machines that do not fit together ---------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backend", ["static", "c10d"])
@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        (
            ("0 --num_machines 2 --nproc_per_node 1", "1 --num_machines 3 --nproc_per_node 1"),
            r"\(host\d\) was told that this run has \d machine\(s\) \(num_machines\), and machine \d \(host\d\) that it has",
        ),
        (
            ("0 --num_machines 2 -n 2", "1 --num_machines 2 -n 4"),
            r"\(host\d\) was told that this run has \d process\(es\) \(num_processes\), and machine \d \(host\d\) that it",
        ),
        (
            ("0 --num_machines 2 -n 2", "1 --num_machines 2 -n 2 --rdzv_backend OTHER"),
            r"\(host\d\) meets the others by (c10d|static), and machine \d \(host\d\) by (c10d|static) \(rdzv_backend\)\.",
        ),
        (
            ("0 --num_machines 3 -n 3", "1 --num_machines 3 -n 3", "1 --num_machines 3 -n 3"),
            r"Two machines say that they are machine 1: host\d and host\d\.",
        ),
    ],
    ids=["machines", "processes", "backend", "rank"],
)
def test_machines_that_contradict_each_other_are_all_told_at_once(run, pair, backend, machines, expected):
    began = time.monotonic()
    other = "c10d" if backend == "static" else "static"
    for at, machine in enumerate(machines):
        words = ["--cpu", "--main_process_ip", pair[0].address, "--rdzv_backend", backend, "--machine_rank"]
        words += machine.replace("OTHER", other).split()
        run.start(pair[int(at == len(machines) - 1)], *LAUNCH, *words, "meet.py")
    for child, _ in run.started:
        assert child.wait(LIMIT_SECONDS) == 2, run.logs()

    assert time.monotonic() - began < LIMIT_SECONDS
    for _, log in run.started:
        assert re.search(expected, log.read_text()), run.logs()
        assert "Traceback" not in log.read_text()


# --- a first machine that is not there ---------------------------------------------------------------------


WRONG = {
    "10.77.0.9": "no host has that address",
    "10.99.0.1": "no way leads there",
    "nowhere.invalid": "no such name",
    "10.77.0.2": "the other host",
}
WAYS = ["static", "c10d", "alone"]
"""How the machines meet: two that the launcher knows, and ranks that somebody else has placed."""


def start_lost(run: Run, host: Host, way: str, rank: int, address: str, port: int) -> None:
    """Start machine `rank` of two, which will not find machine 0 at `address`."""
    if way == "alone":
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        texts = {name: str(value) for name, value in place.items()}
        run.start(host, sys.executable, "meet.py", MASTER_ADDR=address, **texts)
        return
    words = ["--cpu", "-n", "2", "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", address]
    run.start(host, *LAUNCH, *words, "--main_process_port", str(port), "--rdzv_backend", way, "meet.py")


def check_told(run: Run, way: str, expected: dict[str, str]) -> None:
    """Wait for all that were started, and check the beginning and the end of the sentence that each ended with."""
    began = time.monotonic()
    for child, _ in run.started:
        assert child.wait(LIMIT_SECONDS) == (1 if way == "alone" else 2), run.logs()
    seconds = time.monotonic() - began

    for (begin, end), (_, log) in zip(expected.items(), run.started, strict=True):
        told = log.read_text()
        assert re.search(f"{re.escape(begin)}.*, tried for 2[0-9] s: {end}", told), told
        lines = [line for line in told.splitlines() if ": waiting for the first machine at " not in line]
        if way == "alone":
            assert "The address comes from MASTER_ADDR in the environment" in told
            assert "[c10d]" not in told, "nothing of torch's"
        else:
            assert "(from --main_process_ip)" in told
            assert len(lines) == 3, "nothing of torch's"
    assert seconds < 30 + 10, f"20 s of trying, and starting launchers on a busy machine: {run.logs()}"


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_first_machine_that_cannot_be_found_is_an_error_within_30_seconds(run, pair, way, rank):
    expected = {}
    for address in WRONG:
        if address != pair[rank].address:
            # Each has a port of its own: they try at the same time.
            port = free_port()
            start_lost(run, pair[rank], way, rank, address, port)
            begin = "This is machine 0, and" if rank == 0 else "The first machine cannot be reached at"
            expected[f"{begin} {address}:{port}"] = ""

    check_told(run, way, expected)


OTHERS = {
    "says nothing": "time.sleep(600)",
    r"says b'SSH-2\.0-here": "client.sendall(b'SSH-2.0-here'); time.sleep(600)",
    r"says b'HTTP/1\.1 400": "client.recv(9); client.sendall(b'HTTP/1.1 400 Bad Request'); time.sleep(600)",
}
"""What another program at the address says -> how it does so."""
OTHER = """
import socket, sys, threading, time

def serve(client):
    {}

with socket.create_server(("", int(sys.argv[1]))) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_another_program_at_the_main_address_is_an_error_within_30_seconds(run, pair, way):
    expected = {}
    for says, body in OTHERS.items():
        port = free_port()
        run.serve(pair[0], OTHER.format(body), str(port))
        start_lost(run, pair[1], way, 1, pair[0].address, port)
        begin = f"The first machine cannot be reached at {pair[0].address}:{port}"
        expected[begin] = f"another program answers there, and {says}"

    check_told(run, way, expected)


SILENT_NAME_SERVER = """
import socket, time
with socket.socket(type=socket.SOCK_DGRAM) as server:
    server.bind(("", 53))
    time.sleep(600)
"""


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_a_name_server_that_does_not_answer_is_an_error_within_30_seconds(run, pair, way):
    run.serve(pair[0], SILENT_NAME_SERVER)
    port = free_port()
    with pair[1].asking_for_names(pair[0]):
        start_lost(run, pair[1], way, 1, "train-0.example.org", port)

        begin = f"The first machine cannot be reached at train-0.example.org:{port}"
        check_told(run, way, {begin: r"the name cannot be resolved \(no name server answers\)"})
