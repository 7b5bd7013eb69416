"""Real runs by DeepSpeed's launcher: one host, Open MPI, and two hosts. `make deepspeed-launcher` installs what they need."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelerate.launch.family import look
from tests.support import hosts, meeting
from tests.support.hosts import Host
from tests.support.ranks import free_port

pytestmark = pytest.mark.full
LIMIT_SECONDS = 300
LAUNCH = (sys.executable, "-m", "accelerate", "launch", "--cpu", "--deepspeed_hostfile", "hosts")
DIGITS = """
import json, os, pathlib, sys, time
import torch
from sklearn.datasets import load_digits
from accelerate import Accelerator

out, what = pathlib.Path(os.environ["OUT"]), sys.argv[1]
accelerator = Accelerator()
pixels, digits = load_digits(return_X_y=True)
data = torch.utils.data.TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits))
torch.manual_seed(0)
model = torch.nn.Linear(64, 10)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), 0.5), torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
)
for _ in range(3):
    for batch, wanted in loader:
        loss = torch.nn.functional.cross_entropy(model(batch), wanted)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    (out / f"pid{accelerator.process_index}").write_text(str(os.getpid()))
    if what == "raise" and accelerator.process_index == 1:
        raise ValueError("as asked")
    while what == "wait":
        time.sleep(1)
right = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
told = {
    "ranks": accelerator.gather(torch.tensor([accelerator.process_index])).tolist(),
    "kind": str(accelerator.distributed_type),
    "model": type(model).__name__,
    "precision": accelerator.mixed_precision,
    "learned": bool(right > 0.9),
    "weights": sorted(set(accelerator.gather(model.module.weight.sum().detach().reshape(1)).tolist())),
}
(out / str(accelerator.process_index)).write_text(json.dumps(told))
accelerator.end_training()
"""
WAYS = {"local": (), "openmpi": ("--deepspeed_multinode_launcher", "openmpi")}


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `make deepspeed-launcher` does that")
    (tmp_path / "digits.py").write_text(DIGITS)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    prepared = {**meeting.prepare(tmp_path), **allowed, "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    return {name: value for name, value in prepared.items() if not name.startswith("DS_")}


@pytest.fixture(params=WAYS)
def words(request) -> tuple[str, ...]:
    if request.param == "openmpi" and shutil.which("ompi_info") is None:
        pytest.skip("Open MPI is not installed: `make deepspeed-launcher` does that")
    return (*LAUNCH, *WAYS[request.param], "--main_process_port", str(free_port()))


def start(folder: Path, environ: dict[str, str], *command: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / "log"
    command = ("env", "--default-signal=INT", *command)  # in the background of a shell it would be ignored
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=file, stderr=subprocess.STDOUT), log


def pids(folder: Path) -> list[int]:
    return [int(text) for rank in (0, 1) if (text := read(folder / "out" / f"pid{rank}"))]


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_two_processes_learn_digits_together(tmp_path, environ, words):
    child, log = start(tmp_path, environ, *words, "--mixed_precision", "bf16", "digits.py", "learn")

    assert child.wait(LIMIT_SECONDS) == 0, log.read_text()
    told = {rank: json.loads((tmp_path / "out" / str(rank)).read_text()) for rank in (0, 1)}
    assert told[0] == told[1]
    weights = told[0].pop("weights")
    assert len(weights) == 1
    assert told[0] == {
        "ranks": [0, 1],
        "kind": "DistributedType.MULTI_CPU",
        "model": "DistributedDataParallel",
        "precision": "bf16",
        "learned": True,
    }
    assert list((tmp_path / "home").iterdir()) == [], "nothing is written into the user's own file of variables"


def test_a_script_that_raises_ends_the_run_with_its_status(tmp_path, environ, words):
    child, log = start(tmp_path, environ, *words, "digits.py", "raise")

    assert child.wait(LIMIT_SECONDS) == 1, log.read_text()
    said = log.read_text()
    assert "ValueError: as asked" in said
    assert said.splitlines()[-1] == (
        "accelerate: DeepSpeed's launcher with 2 processes exited with code 1; which rank failed, and why, stands above"
    )
    assert [look(pid) for pid in pids(tmp_path)] == [None, None]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_ended_leaves_nothing_running(tmp_path, environ, words, number, status):
    child, log = start(tmp_path, environ, *words, "digits.py", "wait")
    wait_for(lambda: len(pids(tmp_path)) == 2, child, log)

    child.send_signal(number)

    assert child.wait(LIMIT_SECONDS) == status, log.read_text()
    # After SIGKILL it is the guard that ends them.
    wait_for(lambda: [look(pid) for pid in pids(tmp_path)] == [None, None], None, log)
    assert "Traceback" not in log.read_text()


def wait_for(condition, child: subprocess.Popen[bytes] | None, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        assert child is None or child.poll() is None, log.read_text()
        time.sleep(0.05)


# --- two hosts ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> Iterator[tuple[Host, Host]]:
    lacking = hosts.missing()
    if lacking:
        pytest.skip(lacking)
    with hosts.two_hosts() as made:
        (tmp_path / "hosts").write_text("".join(f"{host.address} slots=2\n" for host in made))
        yield made


def finish(*started: tuple[subprocess.Popen[bytes], Path]) -> None:
    for child, _ in started:
        child.wait(LIMIT_SECONDS)
    assert [child.returncode for child, _ in started] == [0] * len(started), "\n".join(
        log.read_text() for _, log in started
    )


def test_each_of_two_hosts_starts_its_own_processes(tmp_path, environ, pair):
    started = []
    for rank, host in enumerate(pair):
        log = tmp_path / f"log{rank}"
        words = (*LAUNCH, "--deepspeed_multinode_launcher", "nossh", "--machine_rank", str(rank), "meet.py")
        started.append((host.start(*words, environ=environ, log=log), log))
    finish(*started)

    assert meeting.results(tmp_path) == meeting.four("host1", "host2")


SSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -o|-p|-l) shift;; esac; shift; done
host=$1; shift
case $host in
{cases}  *) exit 255;;
esac
exec ip netns exec $space unshare --uts env -i HOME=/ "PATH=$PATH" sh -c {inside} $name "$@"
"""


@pytest.mark.parametrize("filter_words", [(), ("--deepspeed_inclusion_filter", "10.77.0.2:1@10.77.0.1")])
def test_pdsh_starts_the_processes_of_two_hosts_with_their_variables_and_words(tmp_path, environ, pair, filter_words):
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed: `make deepspeed-launcher` does that")
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"  # takes what the real one takes, and a login over there has no variables of ours
    cases = "".join(f"  {host.address}) space={host.space} name={host.name};;\n" for host in pair)
    ssh.write_text(SSH.format(cases=cases, inside=shlex.quote('hostname $0 && eval "$*"')))
    ssh.chmod(0o755)
    # pdsh takes variables along only if they are named: these are the user's, in the user's own file.
    (tmp_path / ".deepspeed_env").write_text(f"\nOUT={environ['OUT']}\nHF_HOME={environ['HF_HOME']}\n")
    environ = {**environ, "PATH": f"{tmp_path / 'bin'}:{environ['PATH']}"}
    word = "it's $HOME; 'a' \"b\""

    log = tmp_path / "log"
    finish((pair[0].start(*LAUNCH, *filter_words, "meet.py", word, environ=environ, log=log), log))

    told = {name.removeprefix(f"{word}-"): item for name, item in meeting.results(tmp_path).items()}
    if filter_words:
        assert {rank: (item["met"], item["host"]) for rank, item in told.items()} == {
            "0": ([0, 1, 2], "host1"), "1": ([0, 1, 2], "host1"), "2": ([0, 1, 2], "host2"),
        }  # fmt: skip
    else:
        assert told == meeting.four("host1", "host2")
