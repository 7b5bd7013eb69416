"""Real runs of Open MPI and MPICH. `make mpi` installs them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import hosts, meeting
from tests.support.ranks import free_port

pytestmark = pytest.mark.full
LIMIT_SECONDS = 240
LAUNCH = (sys.executable, "-m", "accelerate", "launch")
TWO_MET = {str(rank): {"met": [0, 1], "local": rank} for rank in range(2)}
KINDS = ("openmpi", "mpich")


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    return {**meeting.prepare(tmp_path), **allowed, "MASTER_PORT": str(free_port())}


def program(kind: str) -> str:
    found = shutil.which(f"mpirun.{kind}")
    if found is None:
        pytest.skip(f"mpirun.{kind} is not installed: `make mpi` does that")
    return found


def named_mpirun(folder: Path, kind: str, environ: dict[str, str]) -> None:
    """Let one of the two be found under the name `mpirun`."""
    (folder / "bin").mkdir()
    file = folder / "bin" / "mpirun"
    file.write_text(f'#!/bin/sh\nexec {program(kind)} "$@"\n')
    file.chmod(0o755)
    environ["PATH"] = f"{folder / 'bin'}:{environ['PATH']}"


def reach(folder: Path, environ: dict[str, str], pair: tuple[hosts.Host, hosts.Host], slots: tuple[int, int]) -> None:
    """Write a file that names two hosts, and let Open MPI get there."""
    (folder / "hosts").write_text(
        "".join(f"{host.address} slots={count}\n" for host, count in zip(pair, slots, strict=True))
    )
    agent = folder / "agent"  # stands for ssh
    cases = "".join(f"  {host.address}) space={host.space} name={host.name};;\n" for host in pair)
    inside = shlex.quote('hostname $0 && eval "$*"')
    agent.write_text(
        f"#!/bin/bash\nhost=$1; shift\ncase $host in\n{cases}esac\n"
        f'exec ip netns exec $space unshare --uts sh -c {inside} $name "$@"\n'
    )
    agent.chmod(0o755)
    environ |= {"OMPI_MCA_plm_rsh_agent": str(agent), "OMPI_MCA_oob_tcp_if_include": "eth0"}


def finish(child: subprocess.Popen[bytes], log: Path) -> None:
    assert child.wait(LIMIT_SECONDS) == 0, log.read_text()


def start(folder: Path, environ: dict[str, str], *command: str) -> None:
    log = folder / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=folder, env=environ, stdout=file, stderr=subprocess.STDOUT)
    finish(child, log)


def told(folder: Path) -> dict[str, dict]:
    return {rank: {name: item[name] for name in ("met", "local")} for rank, item in meeting.results(folder).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launcher", [(sys.executable,), LAUNCH], ids=["script", "launcher"])
def test_processes_of_mpirun_meet_without_a_flag(tmp_path, environ, kind, launcher):
    start(tmp_path, environ, program(kind), "-np", "2", *launcher, "meet.py")

    assert told(tmp_path) == TWO_MET


def test_tasks_that_mpirun_spreads_unevenly_meet_or_are_refused(tmp_path, environ):
    lacking = hosts.missing()
    if lacking:
        pytest.skip(lacking)
    with hosts.two_hosts() as pair:
        reach(tmp_path, environ, pair, slots=(2, 1))
        del environ["OMPI_MCA_rmaps_base_oversubscribe"]
        meet_at = ("-x", "OUT", "-x", f"MASTER_ADDR={pair[0].address}", "-x", f"MASTER_PORT={environ['MASTER_PORT']}")
        command = (program("openmpi"), "--hostfile", "hosts", "-np", "3", *meet_at)
        finish(
            pair[0].start(*command, *LAUNCH, "--cpu", "meet.py", environ=environ, log=tmp_path / "log"),
            tmp_path / "log",
        )
        untold = pair[0].start(
            *command, "env", "-u", "OMPI_MCA_orte_num_nodes", *LAUNCH, "--cpu", "meet.py", environ=environ,
            log=tmp_path / "untold",
        )  # fmt: skip
        status = untold.wait(LIMIT_SECONDS)

    assert {rank: told["met"] for rank, told in meeting.results(tmp_path).items()} == {
        str(rank): [0, 1, 2] for rank in range(3)
    }
    assert status == 2, (tmp_path / "untold").read_text()
    assert "2 of 3 tasks run on this node" in (tmp_path / "untold").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_launcher_starts_mpirun(tmp_path, environ, kind):
    named_mpirun(tmp_path, kind, environ)
    (tmp_path / "hosts").write_text("# here\n127.0.0.1\n")
    port = environ.pop("MASTER_PORT")

    words = ("--cpu", "--mpirun_hostfile", "hosts", "-n", "2", "--main_process_port", port)
    start(tmp_path, environ, *LAUNCH, *words, "meet.py")

    assert told(tmp_path) == TWO_MET


@pytest.mark.parametrize("kind", KINDS)
def test_the_processes_of_mpirun_are_checked_before_they_become_the_script(tmp_path, environ, kind):
    named_mpirun(tmp_path, kind, environ)
    (tmp_path / "hosts").write_text("127.0.0.1\n")
    port = environ.pop("MASTER_PORT")

    words = ("--cpu", "--mpirun_hostfile", "hosts", "-n", "2", "--main_process_port", port, "--preflight")
    start(tmp_path, environ, *LAUNCH, *words, "meet.py")

    assert told(tmp_path) == TWO_MET


@pytest.mark.parametrize("count", [(), ("--num_machines", "2")], ids=["by the file", "by number"])
def test_the_launcher_starts_mpirun_on_two_hosts(tmp_path, environ, count):
    lacking = hosts.missing()
    if lacking:
        pytest.skip(lacking)
    named_mpirun(tmp_path, "openmpi", environ)
    del environ["MASTER_PORT"]
    with hosts.two_hosts() as pair:
        reach(tmp_path, environ, pair, slots=(2, 2))
        log = tmp_path / "log"
        words = ("--cpu", "--mpirun_hostfile", "hosts", "-n", "4", *count)
        child = pair[0].start(*LAUNCH, *words, "meet.py", environ=environ, log=log)
        finish(child, log)

    assert meeting.results(tmp_path) == meeting.four("host1", "host2")
