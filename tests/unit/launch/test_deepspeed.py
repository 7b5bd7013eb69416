"""DeepSpeed's launcher: which command it is called by, what is refused, and what becomes of its processes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accelerate.core import available
from accelerate.core.errors import LaunchError, MissingPackage, SettingError, UnsupportedCombination
from accelerate.launch import deepspeed, preflight, runner, show
from accelerate.launch.deepspeed import Found, Start
from accelerate.launch.family import look
from accelerate.launch.machine import Machine
from accelerate.launch.plan import LaunchPlan, plan
from accelerate.launch.report import RunPreempted, WorkersFailed
from accelerate.launch.request import LaunchRequest
from accelerate.settings import config_file
from tests.support import places

TWO = {"a": 2, "b": 2}
RUNNER = "python -m deepspeed.launcher.runner --hostfile hosts"
SCRIPT = "train.py --lr 1"
MEET = "--master_addr a --master_port 29500"


def asked(flags: dict[str, Any], environ: dict[str, str] | None = None, file: Any = None) -> LaunchRequest:
    return LaunchRequest.merge(flags, file, environ or {}, script="train.py", script_args=("--lr", "1"))


def planned(flags: dict[str, Any], slots: dict[str, int] | None = None, **facts: Any) -> LaunchPlan:
    request = asked({"deepspeed_hostfile": "hosts", "cpu": True, **flags})
    own = frozenset({"localhost", "here"})
    found = Found(request.deepspeed_multinode_launcher or "pdsh", "hosts", slots or TWO, own, ("MINE=1",))
    return plan(request, Machine("python", cores=8, loopback="lo", deepspeed=found, **facts))


def launcher(name: str, **flags: Any) -> dict[str, Any]:
    return {"deepspeed_multinode_launcher": name, **flags}


def include(text: str, **flags: Any) -> dict[str, Any]:
    return {"deepspeed_inclusion_filter": text, **flags}


NAMES = (
    "ACCELERATE_DEBUG_MODE ACCELERATE_DYNAMO_BACKEND ACCELERATE_DYNAMO_MODE ACCELERATE_DYNAMO_USE_FULLGRAPH "
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION ACCELERATE_MIXED_PRECISION ACCELERATE_USE_CPU DS_ACCELERATOR MASTER_ADDR "
    "MASTER_PORT OMP_NUM_THREADS"
).split()
NAMED = shlex.quote(f"--launcher_args={' '.join(f'-x {name}' for name in NAMES)}")
COMMANDS = [
    ({}, TWO, f"--no_local_rank --launcher pdsh {MEET} {SCRIPT}"),
    (launcher("pdsh"), TWO, f"--no_local_rank --launcher pdsh {MEET} {SCRIPT}"),
    (
        launcher("nossh", machine_rank=1, num_machines=2),
        TWO,
        f"--node_rank 1 --no_ssh --no_local_rank {MEET} {SCRIPT}",
    ),
    (
        launcher("openmpi", num_processes=4),
        TWO,
        f"--no_local_rank --launcher openmpi --no_ssh_check {MEET} {NAMED} {SCRIPT}",
    ),
    (launcher("mpich"), TWO, f"--no_local_rank --launcher mpich --no_ssh_check {MEET} {SCRIPT}"),
    (launcher("impi"), TWO, f"--no_local_rank --launcher impi --no_ssh_check {MEET} {SCRIPT}"),
    (launcher("mvapich"), TWO, f"--no_local_rank --launcher mvapich --no_ssh_check {MEET} {SCRIPT}"),
    (launcher("slurm"), TWO, f"--no_local_rank --launcher slurm --no_ssh_check {MEET} {SCRIPT}"),
    # One host: this one is reached without a program, another one by it.
    ({}, {"here": 2}, f"--no_local_rank --launcher pdsh --no_ssh_check --master_addr 127.0.0.1 --master_port 29500 {SCRIPT}"),
    ({}, {"a": 2}, f"--no_local_rank --launcher pdsh --force_multi {MEET} {SCRIPT}"),
    (launcher("nossh"), {"a": 2}, f"--node_rank 0 --no_ssh --no_local_rank --master_addr 127.0.0.1 --master_port 29500 {SCRIPT}"),
    (launcher("slurm"), {"a": 2}, f"--no_local_rank --launcher slurm --no_ssh_check --force_multi {MEET} {SCRIPT}"),
    # Fewer processes, filters, another meeting point.
    ({"num_processes": 2, "num_machines": 2}, TWO, f"--no_local_rank --launcher pdsh --num_gpus 1 {MEET} {SCRIPT}"),
    (include("a:1@b"), TWO, f"--no_local_rank --launcher pdsh --include a:1@b {MEET} {SCRIPT}"),
    (
        {"deepspeed_exclusion_filter": "a:1", "num_processes": 3},
        TWO,
        f"--no_local_rank --launcher pdsh --exclude a:1 {MEET} {SCRIPT}",
    ),
    (launcher("slurm", **include("b")), TWO, "--no_local_rank --launcher slurm --no_ssh_check --force_multi --include b "
     f"--master_addr b --master_port 29500 {SCRIPT}"),
    (
        {"main_process_ip": "10.0.0.1", "main_process_port": 4000},
        {"localhost": 1, "b": 3},
        f"--no_local_rank --launcher pdsh --master_addr 10.0.0.1 --master_port 4000 {SCRIPT}",
    ),
    # What is run.
    ({"module": True}, TWO, f"--no_local_rank --launcher pdsh {MEET} --module {SCRIPT}"),
    ({"no_python": True}, TWO, f"--no_local_rank --launcher pdsh {MEET} --no_python {SCRIPT}"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "slots", "expected"), COMMANDS)
def test_the_runner_is_called_with_hosts_way_and_meeting_point(flags, slots, expected):
    found = planned(flags, slots)

    assert (found.kind, shlex.join(found.command)) == ("deepspeed", f"{RUNNER} {expected}")


def test_every_way_to_reach_hosts_has_a_snapshot():
    shown = {flags.get("deepspeed_multinode_launcher", "pdsh") for flags, _, _ in COMMANDS}

    assert shown == set(deepspeed.WAYS)


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ({}, {"a": (0, 1), "b": (0, 1)}),
        ({"num_processes": 2}, {"a": (0,), "b": (0,)}),
        (include("b:1"), {"b": (1,)}),
        (include("b@a:0"), {"a": (0,), "b": (0, 1)}),
        (include("a:0@a:1"), {"a": (0, 1)}),
        ({"deepspeed_exclusion_filter": "a"}, {"b": (0, 1)}),
        ({"deepspeed_exclusion_filter": "a:0@b:0,1"}, {"a": (1,)}),
    ],
)
def test_filters_and_counts_choose_slots_as_deepspeed_does(flags, hosts):
    found = planned(flags)

    assert found.start is not None
    assert (dict(found.start.hosts), found.world_size) == (hosts, sum(map(len, hosts.values())))


def test_processes_learn_where_they_meet_and_use_loopback_only_where_all_are_here():
    far, near = planned({}), planned({}, {"localhost": 2})

    assert (far.env["MASTER_ADDR"], far.env["MASTER_PORT"], far.env["DS_ACCELERATOR"]) == ("a", "29500", "cpu")
    assert "GLOO_SOCKET_IFNAME" not in far.env
    assert (near.env["MASTER_ADDR"], near.env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert far.env["OMP_NUM_THREADS"] == near.env["OMP_NUM_THREADS"] == "4"


def test_the_users_own_variables_go_along_where_our_file_takes_the_place_of_theirs():
    starts = [
        planned(flags, slots).start for flags, slots in (({}, TWO), ({}, {"here": 1}), (launcher("openmpi"), TWO))
    ]

    assert [(start.by_shell, start.env_lines) for start in starts if start] == [
        (True, ("MINE=1",)),
        (False, ()),
        (False, ()),
    ]


def test_a_preflight_is_run_by_all_processes():
    found = preflight.before(planned(launcher("slurm")), "python").command

    assert found[found.index(str(preflight.SCRIPT)) :] == (
        str(preflight.SCRIPT), "--then", "python", "-u", "train.py", "--lr", "1",
    )  # fmt: skip


def test_a_plan_shows_the_command_the_hosts_and_the_processes():
    request = asked({"deepspeed_hostfile": "hosts", "cpu": True, **include("a@b:1")})
    found = plan(request, Machine("python", deepspeed=Found("pdsh", "hosts", TWO)))

    text, values = show.as_text(found, request), show.describe(found, request)

    assert values["command"] == list(found.command)
    assert values["hosts"] == {"a": [0, 1], "b": [1]}
    assert (values["processes"]["total"], values["processes"]["source"]) == (3, "the slots of hosts")
    assert "hosts        a (slots 0,1), b (slots 1)" in text
    assert "processes    3, started by DeepSpeed's launcher (the slots of hosts)" in text
    assert "machines     2 (the hosts of hosts)" in text


def test_mpich_is_said_to_lose_the_status():
    assert "ends with status 0 even if a script fails" in planned(launcher("mpich")).notes[0]
    assert planned(launcher("impi")).notes == ()


# --- what is refused ---------------------------------------------------------------------------------------

HOSTS = "deepspeed_hostfile=hosts (from --deepspeed_hostfile)"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (launcher("ssh"), "deepspeed_multinode_launcher=ssh (from --deepspeed_multinode_launcher) is not known."),
        (launcher("standard"), f"contradicts {HOSTS}: `standard` is torch's launcher"),
        (launcher("openmpi", **include("a")), "deepspeed_inclusion_filter=a (from --deepspeed_inclusion_filter) contradicts"),
        (include("a", deepspeed_exclusion_filter="b"), "only one of them is applied"),
        (launcher("slurm", module=True), "module=True (from --module) contradicts"),
        (launcher("mpich", no_python=True), "no_python=True (from --no_python) contradicts"),
        ({"machine_rank": 1, "num_machines": 2}, "machine_rank=1 (from --machine_rank) contradicts"),
        ({"main_process_port": 0}, "main_process_port=0 (from --main_process_port) contradicts"),
        ({"mpirun_hostfile": "x"}, f"mpirun_hostfile=x (from --mpirun_hostfile) contradicts {HOSTS}"),
        ({"gpu_ids": "0,2", "cpu": False}, f"gpu_ids=0,2 (from --gpu_ids) contradicts {HOSTS}"),
        ({"max_restarts": 1}, f"max_restarts=1 (from --max_restarts) contradicts {HOSTS}"),
        ({"log_dir": "x"}, f"log_dir=x (from --log_dir) contradicts {HOSTS}"),
        ({"nproc_per_node": "gpu", "cpu": False}, "the slots of the hosts say how many processes there are"),
        ({"run_path": True}, "run_path=True (from --run_path) contradicts"),
        ({"redirects": "3"}, "redirects=3 (from --redirects) contradicts"),
        ({"nnodes": "1:2"}, "min_machines=1 (from --nnodes) contradicts"),
    ],
)  # fmt: skip
def test_what_deepspeeds_launcher_cannot_do_is_refused(flags, expected):
    with pytest.raises(SettingError) as caught:
        asked({"deepspeed_hostfile": "hosts", "cpu": True, **flags})

    assert expected in str(caught.value)


def test_every_setting_that_is_refused_is_one():
    assert set(deepspeed._REFUSED) - set(LaunchRequest.__dataclass_fields__) == set()


@pytest.mark.parametrize(
    ("flags", "slots", "expected"),
    [
        ({"num_processes": 6}, TWO, "num_processes=6 (from --num_processes) contradicts the hosts: a:0,1, b:0,1 of hosts are 4"),
        ({"num_processes": 3}, TWO, "num_processes=3 (from --num_processes) contradicts the hosts"),
        ({"num_processes": 2, **include("a:0")}, TWO, "contradicts the hosts: a:0 of hosts with deepspeed_inclusion_filter=a:0 (from"),
        (launcher("openmpi", num_processes=2), TWO, "num_processes=2 (from --num_processes) contradicts the hosts"),
        ({"num_machines": 1}, TWO, "num_machines=1 (from --num_machines) contradicts the hosts: 2 host(s) are used of hosts"),
        (launcher("nossh", machine_rank=2), TWO, "machine_rank=2 (from --machine_rank) contradicts the hosts"),
        (launcher("impi"), {"a": 1, "b": 2}, "With impi, DeepSpeed's launcher wants as many slots on each host"),
        (launcher("slurm", **include("a:1@b:1")), TWO, "With slurm, DeepSpeed's launcher cannot choose single slots"),
        ({}, {"localhost": 1, "b": 1}, "2 hosts would meet at 'localhost'"),
        (include("c"), TWO, "deepspeed_inclusion_filter=c (from --deepspeed_inclusion_filter): 'c' is no host of the file."),
        (include("a:2"), TWO, "'a:2' names no slots of a."),
        (include("a:x"), TWO, "'a:x' names no slots of a."),
        ({"deepspeed_exclusion_filter": "a@b"}, TWO, "(from --deepspeed_exclusion_filter): nothing is left."),
    ],
)  # fmt: skip
def test_hosts_filters_and_counts_that_do_not_fit_are_refused(flags, slots, expected):
    with pytest.raises(SettingError) as caught:
        planned(flags, slots)

    assert expected in str(caught.value)


def file_with(folder: Path, text: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\n{text}")
    return config_file.read(path)


def test_a_file_asks_for_it_by_the_same_keys(tmp_path):
    written = file_with(tmp_path, "deepspeed_config: {deepspeed_hostfile: ~/h, deepspeed_multinode_launcher: nossh}\n")

    found = asked({}, file=written)

    assert found.deepspeed == "deepspeed_hostfile"
    assert found.deepspeed_hostfile == os.path.expanduser("~/h")
    assert "deepspeed_config.deepspeed_multinode_launcher in" in found.origin("deepspeed_multinode_launcher")


def test_the_standard_launcher_is_torchs(tmp_path):
    written = file_with(tmp_path, "deepspeed_config: {deepspeed_multinode_launcher: standard}\n")
    request = asked({"num_processes": 2, "cpu": True}, file=written)

    assert request.deepspeed is None
    assert plan(request, Machine("python")).kind == "elastic"


def test_training_with_deepspeed_stays_refused(tmp_path):
    written = file_with(tmp_path, "deepspeed_config: {deepspeed_hostfile: h, zero_stage: 2}\n")

    with pytest.raises(UnsupportedCombination, match="zero_stage .*needs the DeepSpeed engine"):
        asked({}, file=written)


CLOUD = {"DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "a", "DSTACK_GPUS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("environ", "flags", "kept"),
    [
        (places.SLURM_TASK_PER_PROCESS, {}, None),
        (places.SLURM_TASK_PER_PROCESS, {"deepspeed_multinode_launcher": "nossh"}, None),
        (places.SLURM_TASK_PER_NODE, {}, None),
        ({**places.SLURM_TASK_PER_NODE, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}, {}, None),
        (places.SLURM_TASK_PER_NODE, {"deepspeed_multinode_launcher": "nossh"}, True),
        (places.SLURM_BATCH, {}, True),
        (CLOUD, {}, None),
        (CLOUD, {"deepspeed_multinode_launcher": "nossh", "main_process_ip": "a"}, True),
        ({**CLOUD, "DSTACK_NODE_RANK": "0"}, {}, False),
        ({**CLOUD, "DSTACK_NODE_RANK": "0", "DSTACK_NODES_NUM": "1"}, {}, True),
    ],
)
def test_one_task_starts_the_processes_of_all_machines(environ, flags, kept):
    flags = {"deepspeed_hostfile": "hosts", "cpu": True, **flags}
    if kept is None:
        with pytest.raises(
            SettingError, match=r"deepspeed_hostfile=hosts .* each of the \d tasks here .* would start all"
        ):
            asked(flags, environ)
        return

    request = asked(flags, environ)

    assert request.notes == (
        ()
        if kept
        else (
            "deepspeed_hostfile=hosts (from --deepspeed_hostfile) starts all of it from here, the first of 2 "
            "(from dstack (DSTACK_NODES_NUM)): the others must not run this command.",
        )
    )
    assert ("machine_rank" in request.origins) == (flags.get("deepspeed_multinode_launcher") == "nossh")


# --- the machine -------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Pretend that DeepSpeed is installed, in a version."""
    monkeypatch.setattr(deepspeed, "require", lambda *_args, **_named: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.19.8")


def test_deepspeed_is_an_optional_package(monkeypatch, tmp_path):
    monkeypatch.setattr(available, "is_installed", lambda *_: False)

    with pytest.raises(MissingPackage) as caught:
        deepspeed.find("nossh", str(tmp_path), HOSTS, {})

    assert str(caught.value).splitlines() == [
        f"{HOSTS} needs the package 'deepspeed', which is not installed.",
        "Run: pip install deepspeed",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "names no host."),
        ("# a slots=2\n", "names no host."),
        ("a slots=2\nb\n", "Line 2 of deepspeed_hostfile=x cannot be read: 'b'."),
        ("a slots=0\n", "Line 1 of deepspeed_hostfile=x cannot be read"),
        ("a slots=1\na slots=2\n", "Line 2 of deepspeed_hostfile=x names a host for the second time: 'a slots=2'."),
    ],
)
def test_a_file_of_hosts_that_deepspeed_could_not_use_is_refused(text, expected):
    with pytest.raises(SettingError, match=re.escape(expected)):
        deepspeed.read_hosts(text, "deepspeed_hostfile=x")


def test_hosts_and_the_program_are_looked_for(installed, tmp_path, monkeypatch):
    file, programs = tmp_path / "hosts", tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(SettingError, match="deepspeed_hostfile=x cannot be read: .*No such file"):
        deepspeed.find("nossh", str(file), "deepspeed_hostfile=x", {})
    with pytest.raises(SettingError, match="no file names the hosts"):
        deepspeed.find("nossh", str(file), "deepspeed_inclusion_filter=x", {})
    file.write_text("# two\n\na slots=2\n  b   slots=4  \n")

    for name, way in deepspeed.WAYS.items():
        if way.program is not None:
            with pytest.raises(LaunchError, match=f"by {name}, and '{way.program}' is not on the PATH"):
                deepspeed.find(name, str(file), "x", {})
            (programs / way.program).touch(0o755)
        found = deepspeed.find(name, str(file), "x", {})
        assert (found.way, found.slots) == (name, {"a": 2, "b": 4})
        (programs / (way.program or "")).unlink() if way.program else None
    assert "localhost" in found.own_names


def test_pdsh_is_not_needed_to_reach_this_machine(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("localhost slots=2\n")

    assert deepspeed.find(None, str(tmp_path / "hosts"), "x", {}).way == "pdsh"


def test_nossh_needs_a_deepspeed_that_knows_it(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.14.4")

    with pytest.raises(LaunchError, match=r"needs DeepSpeed 0\.14\.5, and 0\.14\.4 is installed"):
        deepspeed.find("nossh", str(tmp_path / "hosts"), "x", {})


def test_the_users_files_of_variables_are_read_from_home_and_here(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, line in ((home, "A=1"), (here, "B=2 3")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(f"\n{line}\n\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (here / "other").write_text("C=3")

    assert deepspeed.user_lines({}) == ("A=1", "B=2 3")
    assert deepspeed.user_lines({"DS_ENV_FILE": "other"}) == ("C=3",)

    (here / "other").write_bytes(b"A=\xe9")
    with pytest.raises(
        SettingError, match="here/other, which DeepSpeed's launcher reads for variables, cannot be read"
    ):
        deepspeed.user_lines({"DS_ENV_FILE": "other"})


# --- through the shell of another host ---------------------------------------------------------------------

HARD = (
    "plain",
    "",
    "a b",
    "it's",
    'say "x"',
    "$HOME `ls` \\",
    "{'a': [1, 2]}",
    "x;y",
    "*",
    "a$b",
    '\\"',
    "ä,ß",
    "a\tb",
)


def as_the_runner_has_it(word: str) -> str:
    """Treat a word of the script's as DeepSpeed 0.19's runner does for pdsh."""
    return '"{}"'.format(word.replace('"', '\\"')) if " " in word else word


def test_words_reach_the_script_through_the_runner_and_a_shell_as_they_are():
    start = Start("python", (), "hosts", TWO_HOSTS, "a", 1, is_here=False, by_shell=True)
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"

    words = deepspeed.command(start, ("a program", *HARD), ())

    assert words[3:5] == ("--no_python", "'a program'")
    line = " ".join([shlex.quote(sys.executable), "-c", shlex.quote(program), *map(as_the_runner_has_it, words[5:])])
    told = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == list(HARD)


TWO_HOSTS = {"a": (0, 1), "b": (0, 1)}


def test_variables_reach_the_script_through_the_runner_and_a_shell_as_they_are():
    lines = [deepspeed.env_line(f"V{number}", value) for number, value in enumerate(HARD)]

    exports = []
    for line in lines:  # as DeepSpeed 0.19's runner does
        name, value = line.split("=", maxsplit=1)
        value = value.strip()
        quoted = f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value
        exports.append(f"export {name}={quoted}; ")
    program = f"import json, os; print(json.dumps([os.environ[f'V{{n}}'] for n in range({len(HARD)})]))"
    line = "".join(exports) + shlex.join([sys.executable, "-c", program])
    told = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == list(HARD)


# --- the runner as a child ---------------------------------------------------------------------------------

FAKE = """
import os, pathlib, signal, subprocess, sys, time
out, what = pathlib.Path(os.environ["OUT"]), sys.argv[-1]
worker = "import pathlib, os, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
if what == "tell":
    file = pathlib.Path(os.environ["DS_ENV_FILE"])
    (out / "told").write_text(oct(file.stat().st_mode)[-3:] + "\\n" + file.read_text())
    (out / "file").write_text(str(file))
elif what.startswith("status"):
    sys.exit(int(what[6:]))
elif what == "save":
    pathlib.Path(os.environ["ACCELERATE_PREEMPTED_NOTE"]).write_text("saved")
else:  # a launcher of this machine with a worker, the launcher's own death, or a signal to us
    child = subprocess.Popen([sys.executable, "-c", worker, str(out / "pid")])
    while not (out / "pid").exists() or not (out / "pid").read_text():
        time.sleep(0.01)
    if what == "leave":
        sys.exit(1)
    os.kill(os.getppid(), getattr(signal, what))
    child.wait()
    (out / "heard of it").touch()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a plan with a runner of ours in the place of DeepSpeed's."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "runner.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path))

    def call(what: str, **options: Any) -> None:
        start = Start(sys.executable, (), "hosts", {"localhost": (0, 1)}, "a", 1, is_here=True, **options)
        argv = (sys.executable, "-u", "train.py", what)
        runner.run(LaunchPlan(kind="deepspeed", argv=argv, env={"A": "1 2", "B": "3"}, start=start))

    return call


def is_gone(file: Path) -> bool:
    return look(int(file.read_text())) is None


def test_the_runner_reads_our_variables_from_a_file_of_its_own_that_goes_with_it(run, tmp_path):
    run("tell", by_shell=True, env_lines=("MINE=1",))

    assert (tmp_path / "told").read_text().splitlines() == ["600", "MINE=1", "A=1 2", "B=3"]
    assert not Path((tmp_path / "file").read_text()).exists()


@pytest.mark.parametrize(
    ("status", "expected"),
    [(3, (3, "exited with code 3")), (247, (137, "was ended by SIGKILL")), (255, (255, "exited with code 255"))],
)
def test_a_failure_has_the_status_of_the_process(run, status, expected):
    with pytest.raises(WorkersFailed, match=f"DeepSpeed's launcher with 2 processes {expected[1]}") as caught:
        run(f"status{status}")

    assert caught.value.status == expected[0]


@pytest.mark.parametrize(("what", "told"), [("status75", "what it said stands above"), ("save", "saved")])
def test_a_run_that_saved_itself_has_not_failed(run, what, told):
    with pytest.raises(RunPreempted, match=told):
        run(what)


def test_nothing_is_left_of_a_run_whose_runner_leaves_its_processes(run, tmp_path):
    with pytest.raises(WorkersFailed):
        run("leave")

    assert is_gone(tmp_path / "pid")


@pytest.mark.parametrize(
    ("name", "expected"), [("SIGTERM", WorkersFailed), ("SIGINT", KeyboardInterrupt), ("SIGHUP", WorkersFailed)]
)
def test_a_signal_ends_the_runners_child_and_the_runner_says_so_itself(run, tmp_path, name, expected):
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(expected) as caught:
        run(name)

    assert is_gone(tmp_path / "pid")
    assert (tmp_path / "heard of it").exists(), "the runner would end at once, and its child without a grace"
    assert signal.getsignal(signal.SIGTERM) == before
    if expected is WorkersFailed:
        assert (caught.value.status, str(caught.value)) == (
            128 + getattr(signal, name),
            f"accelerate: the launcher received {name} and ended DeepSpeed's launcher with its processes",
        )


def test_with_pdsh_the_runner_gets_the_signal_since_it_ends_the_other_hosts(run, tmp_path):
    with pytest.raises(WorkersFailed):
        run("SIGTERM", by_shell=True)

    assert is_gone(tmp_path / "pid")
    assert not (tmp_path / "heard of it").exists()


def test_without_deepspeed_the_command_line_says_what_to_install(tmp_path):
    if available.is_deepspeed_available():
        pytest.skip("it is installed")
    (tmp_path / "s.py").touch()
    words = ("-m", "accelerate", "launch", "--deepspeed_hostfile", "hosts", "s.py")

    ended = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stderr.splitlines()[1]) == (2, "Run: pip install deepspeed")
