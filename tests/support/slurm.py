"""A real SLURM of two virtual nodes on this machine: no systemd, no cgroups, two `slurmd` under names of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .ranks import free_port

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
LIMIT_SECONDS = 60


def missing() -> str | None:
    """Say what this machine lacks for it, if it lacks something."""
    if os.geteuid() != 0:
        return "daemons of SLURM are started as root"
    own = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if own.returncode:
        return "no mount namespaces here, in which the nodes get names"
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    return f"{', '.join(lacking)} not installed: `make slurm` does that" if lacking else None


def _configuration(folder: Path, host: str, cores: int) -> str:
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cores} RealMemory=1000 State=UNKNOWN"
        for name in NODES
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """Start SLURM; yield the environment in which its commands find it. All daemons are ended on exit."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    file = folder / "slurm.conf"
    file.write_text(_configuration(folder, host, cores=4))
    environ = {**os.environ, "SLURM_CONF": str(file), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    started = [_munge(folder)]
    try:
        foreground = {"env": environ, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(["slurmctld", "-D"], **foreground))
        # Their names are known to the nodes alone, and to what runs there.
        hosts = folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES))
        named = ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]
        for node in NODES:
            started.append(subprocess.Popen([*named, "slurmd", "-D", "-N", node], **foreground))
        _wait_until_idle(environ, folder)
        yield environ
        subprocess.run(["scancel", "-u", "root"], env=environ, check=False, timeout=LIMIT_SECONDS)
    finally:
        for daemon in reversed([daemon for daemon in started if daemon]):
            daemon.terminate()
        for daemon in filter(None, started):
            try:
                daemon.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _munge(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start the daemon by which the parts of SLURM know each other, unless it runs."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return None
    key = Path("/etc/munge/munge.key")
    if not key.exists() or not key.stat().st_size:
        key.write_bytes(secrets.token_bytes(1024))
    shutil.chown(key, "munge", "munge")
    key.chmod(0o400)
    for place in ("/run/munge", "/etc/munge", "/var/lib/munge", "/var/log/munge"):
        Path(place).mkdir(exist_ok=True)
        shutil.chown(place, "munge", "munge")
    with (folder / "munged.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["munged", "--foreground", "--force"], user="munge", group="munge", stdout=log, stderr=log
        )
    deadline = time.monotonic() + LIMIT_SECONDS
    while subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline and daemon.poll() is None, (folder / "munged.log").read_text()
        time.sleep(0.1)
    return daemon


def _wait_until_idle(environ: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        told = subprocess.run(["sinfo", "-hN", "-o", "%N %t"], env=environ, capture_output=True, text=True, check=False)
        if sorted(told.stdout.split("\n")) == ["", *(f"{node} idle" for node in NODES)]:
            return
        assert time.monotonic() < deadline, f"{told.stdout}{told.stderr}\n{(folder / 'slurmctld.log').read_text()}"
        time.sleep(0.2)
