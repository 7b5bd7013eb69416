"""Every option from every source: argument > environment > place > file > default, and what `--dry-run` says of it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from accelerate.commands.env import env_command, env_command_parser
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.commands.launching import request_from
from accelerate.commands.options import OPTIONS
from accelerate.core.errors import SettingError, UnsupportedCombination
from accelerate.launch import show
from accelerate.launch.deepspeed import Found
from accelerate.launch.devices import Devices
from accelerate.launch.machine import Machine
from accelerate.launch.mpirun import Program
from accelerate.launch.plan import plan
from accelerate.launch.request import LaunchRequest
from accelerate.launch.torchrun import AGENT_FIELDS, VARIABLES
from tests.support import places

PARSER = launch_command_parser()


@dataclass(frozen=True)
class Row:
    """One option: how each source gives it, as (what is written, what it means)."""

    field: str
    flag: tuple[list[str], Any]
    variable: tuple[str, str, Any] | None = None
    key: tuple[str, Any] | None = None
    """A line of the file, and its value; a nested section is written on one line."""
    beside: tuple[str, ...] = ()
    """Flags that it cannot do without."""
    new: tuple[str, ...] = ()
    """A flag that does not repeat the default, where `flag` does."""

    @property
    def place(self) -> tuple[dict[str, str], Any, str] | None:
        """The variables of a place, the value, and where that is said to come from."""
        if self.field in SLURM:
            value, variable = SLURM[self.field]
            return places.SLURM_TASK_PER_NODE, value, f"from SLURM ({variable})"
        if self.field in PET:
            name, text, value = PET[self.field]
            return {name: text}, value, f"from the variable {name}"
        return None


def switch(field: str, variable: str | None = None, key: str | None = None, **more: Any) -> Row:
    return Row(
        field,
        ([f"--{field}"], True),
        (variable, "no", False) if variable else None,
        (f"{key}: true", True) if key else None,
        **more,
    )


KEPT = ("--log_dir", "logs")
COMPILED = ("--dynamo_backend", "eager")
SEVERAL = ("--num_machines", "2", "--main_process_ip", "node0")

ROWS = (
    Row(
        "num_processes",
        (["-n", "4"], 4),
        ("ACCELERATE_NUM_PROCESSES", "3", 3),
        ("num_processes: 2", 2),
        new=("-n", "3"),
    ),
    Row("processes_per_machine", (["--nproc_per_node", "auto"], "auto"), new=("--nproc_per_node", "5")),
    Row("num_machines", (["--num_machines", "3"], 3), None, ("num_machines: 2", 2), ("--main_process_ip", "node0")),
    Row("min_machines", (["--nnodes", "1:2"], 1), beside=("--main_process_ip", "node0")),
    Row("machine_rank", (["--node_rank", "0"], 0), None, ("machine_rank: 1", 1), SEVERAL, ("--node_rank", "1")),
    Row("main_process_ip", (["--main_process_ip", "a"], "a"), None, ("main_process_ip: b", "b")),
    Row("main_process_port", (["--main_process_port", "1"], 1), None, ("main_process_port: 2", 2)),
    Row("same_network", (["--same_network"], True), None, ("same_network: false", False)),
    Row(
        "rdzv_backend",
        (["--rdzv_backend", "static"], "static"),
        None,
        ("rdzv_backend: c10d", "c10d"),
        new=("--rdzv_backend", "c10d"),
    ),
    Row("gpu_ids", (["--gpu_ids", "0"], ("0",)), None, ("gpu_ids: 1,2", ("1", "2")), ("-n", "1")),
    Row(
        "mixed_precision",
        (["--mixed-precision", "no"], "no"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "bf16"),
        ("mixed_precision: fp16", "fp16"),
        new=("--mixed_precision", "bf16"),
    ),
    Row(
        "gradient_accumulation_steps",
        (["--gradient_accumulation_steps", "1"], 1),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", 2),
    ),
    Row("num_cpu_threads_per_process", (["--num_cpu_threads_per_process", "3"], 3), ("OMP_NUM_THREADS", "2", 2)),
    Row("cpu", (["--cpu"], True), ("ACCELERATE_USE_CPU", "no", False), ("use_cpu: true", True)),
    switch("enable_cpu_affinity", "ACCELERATE_CPU_AFFINITY", "enable_cpu_affinity"),
    switch("debug", "ACCELERATE_DEBUG_MODE", "debug"),
    Row(
        "dynamo_backend",
        (["--dynamo_backend", "no"], "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "eager"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "inductor"),
        new=("--dynamo_backend", "eager"),
    ),
    Row(
        "dynamo_mode",
        (["--dynamo_mode", "default"], "default"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "max-autotune"),
        ("dynamo_config: {mode: reduce-overhead}", "reduce-overhead"),
        COMPILED,
        ("--dynamo_mode", "max-autotune"),
    ),
    *(
        Row(
            f"dynamo_use_{name}",
            ([f"--dynamo_use_{name}"], True),
            (f"ACCELERATE_DYNAMO_USE_{name.upper()}", "0", False),
            (f"dynamo_config: {{dynamo_use_{name}: true}}", True),
            COMPILED,
        )
        for name in ("fullgraph", "dynamic", "regional_compilation")
    ),
    Row(
        "mpirun_hostfile",
        (["--mpirun_hostfile", "hosts"], "hosts"),
        None,
        ("mpirun_config: {mpirun_hostfile: others}", "others"),
        beside=("-n", "2"),
    ),
    *(
        Row(
            f"deepspeed_{name}",
            ([f"--deepspeed_{name}", value], value),
            None,
            (f"deepspeed_config: {{deepspeed_{name}: {other}}}", other),
        )
        for name, value, other in (
            ("hostfile", "hosts", "others"),
            ("inclusion_filter", "one", "two"),
            ("exclusion_filter", "one", "two"),
            ("multinode_launcher", "nossh", "openmpi"),
        )
    ),
    Row("resume", (["--resume", "off"], "off"), ("ACCELERATE_RESUME", "auto", "auto"), new=("--resume", "auto")),
    Row("save_on_signals", (["--save_on_signals", "USR1"], "USR1"), ("ACCELERATE_SAVE_ON_SIGNALS", "TERM", "TERM")),
    switch("multi_gpu"),
    switch("module"),
    switch("no_python"),
    switch("run_path"),
    switch("quiet"),
    switch("standalone"),
    switch("virtual_local_rank"),
    Row("local_addr", (["--local_addr", "a"], "a")),
    Row("run_id", (["--rdzv_id", "a"], "a")),
    Row("rdzv_conf", (["--rdzv_conf", "timeout=9"], {"timeout": "9"})),
    Row("grace_seconds", (["--shutdown_timeout", "9"], 9)),
    Row("max_restarts", (["--max_restarts", "0"], 0), new=("--max_restarts", "1")),
    Row("monitor_interval", (["--monitor_interval", "0.1"], 0.1), new=("--monitor_interval", "2")),
    Row("tee", (["--tee", "0"], "0"), new=("--tee", "3")),
    Row("log_dir", (["--log_dir", "a"], "a")),
    Row("role", (["--role", "default"], "default"), new=("--role", "trainer")),
    Row("start_method", (["--start_method", "fork"], "fork")),
    Row("event_log_handler", (["--event_log_handler", "null"], "null")),
    Row("numa_binding", (["--numa_binding", "node"], "node")),
    Row("signals_to_handle", (["--signals_to_handle", "SIGTERM"], "SIGTERM")),
    Row("duplicate_stdout_filters", (["--duplicate_stdout_filters", "a,b"], "a,b"), beside=KEPT),
    Row("duplicate_stderr_filters", (["--duplicate_stderr_filters", "a"], "a"), beside=KEPT),
    Row("redirects", (["-r", "3"], "3"), beside=KEPT),
    Row("local_ranks_filter", (["--local_ranks_filter", "0"], "0")),
    Row("logs_specs", (["--logs_specs", "mine"], "mine")),
)

SLURM = {
    "num_machines": (2, "SLURM_STEP_NUM_NODES"),
    "machine_rank": (1, "SLURM_NODEID"),
    "main_process_ip": ("node1", "SLURM_STEP_NODELIST"),
    "main_process_port": (10_004, "SLURM_JOB_ID"),
}
PET = {
    "num_processes": ("PET_NPROC_PER_NODE", "5", 5),
    "processes_per_machine": ("PET_NPROC_PER_NODE", "cpu", "cpu"),
    "min_machines": ("PET_NNODES", "2:3", 2),
    "standalone": ("PET_STANDALONE", "1", True),
    "rdzv_backend": ("PET_RDZV_BACKEND", "etcd", "etcd"),
    "rdzv_conf": ("PET_RDZV_CONF", "timeout=8", {"timeout": "8"}),
    "run_id": ("PET_RDZV_ID", "b", "b"),
    "max_restarts": ("PET_MAX_RESTARTS", "2", 2),
    "monitor_interval": ("PET_MONITOR_INTERVAL", "0.2", 0.2),
    "grace_seconds": ("PET_SHUTDOWN_TIMEOUT", "8", 8),
    "tee": ("PET_TEE", "3", "3"),
    "redirects": ("PET_REDIRECTS", "2", "2"),
    "local_ranks_filter": ("PET_LOCAL_RANKS_FILTER", "1", "1"),
    **{name: (f"PET_{name.upper()}", "b", "b") for name in ("role", "log_dir", "local_addr", "event_log_handler")},
    **{name: (f"PET_{name.upper()}", "b", "b") for name in ("duplicate_stdout_filters", "duplicate_stderr_filters")},
    "signals_to_handle": ("PET_SIGNALS_TO_HANDLE", "SIGINT", "SIGINT"),
    "start_method": ("PET_START_METHOD", "spawn", "spawn"),
    **{name: (f"PET_{name.upper()}", "1", True) for name in ("module", "no_python", "run_path", "virtual_local_rank")},
}
"""Field -> a variable of torchrun, its text, and what that means."""

SOURCES = ("flag", "variable", "place", "key")
"""The first one that speaks decides."""


def combinations() -> list[Any]:
    found = []
    for row in ROWS:
        there = [name for name in SOURCES if getattr(row, name) is not None]
        for count in range(len(there) + 1):
            found += [
                pytest.param(row, given, id=f"{row.field}-{'+'.join(given) or 'default'}")
                for given in itertools.combinations(there, count)
            ]
    return found


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function that asks for `row` through the sources `given`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file, script = tmp_path / "c.yaml", tmp_path / "s.py"
    script.touch(0o755)

    def asked(row: Row, given: tuple[str, ...]) -> LaunchRequest:
        words = [*row.beside, "--config_file", str(file)]
        file.write_text("distributed_type: MULTI_GPU\n" + (f"{row.key[0]}\n" if row.key and "key" in given else ""))
        if row.variable and "variable" in given:
            monkeypatch.setenv(*row.variable[:2])
        if row.place and "place" in given:
            for name, text in row.place[0].items():
                monkeypatch.setenv(name, text)
        if "flag" in given:
            words += row.flag[0]
        return request_from(PARSER.parse_args([*words, str(script)]))

    return asked


@pytest.mark.parametrize(("row", "given"), combinations())
def test_the_strongest_source_decides_and_is_named(ask, tmp_path, row, given):
    request = ask(row, given)

    found, origin = getattr(request, row.field), request.origin(row.field)
    if not given:
        if row.field not in ("num_machines", "gpu_ids"):
            assert found == LaunchRequest.__dataclass_fields__[row.field].default or row.field == "rdzv_conf"
        assert origin == "the default"
    elif given[0] == "flag":
        assert found == row.flag[1]
        assert origin.startswith("from --")
        assert origin.removeprefix("from --").replace("-", "_") in {option.name for option in OPTIONS}
    elif given[0] == "variable":
        assert found == row.variable[2]
        assert origin == f"from the variable {row.variable[0]}"
    elif given[0] == "place":
        assert (found, origin) == row.place[1:]
    else:
        assert found == row.key[1]
        assert origin.endswith(f"in {tmp_path / 'c.yaml'}, line 2")
        assert row.key[0].partition(":")[0] in origin


def test_the_table_has_a_row_for_every_setting_and_for_every_variable_of_torchrun():
    assert {row.field for row in ROWS} == set(show.settings(LaunchRequest(script="s.py")))
    elsewhere = {"PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_RDZV_ENDPOINT"}  # beside PET_NNODES
    assert {name for name, *_ in PET.values()} == {f"PET_{flag.upper()}" for flag in VARIABLES} - elsewhere


DEVICES = Devices(4, "cuda", "CUDA_VISIBLE_DEVICES")
MACHINE = Machine("python", DEVICES, cores=8, logical_cores=16)


@dataclass(frozen=True)
class Situation:
    """A kind of run, as flags, the environment and the machine make it."""

    words: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    devices: int = 0


SITUATIONS = {
    "one process": Situation(),
    "two processes": Situation(("-n", "2")),
    "four devices": Situation(devices=4),
    "two machines": Situation(("-n", "6", *SEVERAL)),
    "mpirun": Situation(("-n", "6", "--mpirun_hostfile", "hosts")),
    "DeepSpeed's launcher": Situation(("-n", "6", "--deepspeed_hostfile", "hosts")),
    "a task for each process": Situation(
        environ={**places.SLURM_TASK_PER_PROCESS, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    ),
}

AS_IT_IS = {
    ("multi_gpu", "four devices"): "all devices are used in any case",
    ("standalone", "two processes"): "they meet on this machine in any case",
    ("standalone", "four devices"): "they meet on this machine in any case",
    ("mpirun_hostfile", "mpirun"): "the kind of run says so already",
    ("deepspeed_hostfile", "DeepSpeed's launcher"): "the kind of run says so already",
}
"""Flags that ask for what happens anyway."""


def outcome(words: Sequence[str], situation: Situation, folder: Path) -> tuple[Any, LaunchRequest | None]:
    """Return what comes of a command line: the plan as plain values, or the complaint."""
    try:
        request = request_from(PARSER.parse_args([*words, str(folder / "s.py")]))
        program = Program(is_open_mpi=True) if request.mpirun_hostfile else None
        way, file = request.deepspeed_multinode_launcher or "pdsh", request.deepspeed_hostfile or "x"
        found = Found(way, file, {"one": 3, "two": 3}) if request.deepspeed else None
        machine = replace(MACHINE, devices=replace(DEVICES, count=situation.devices), mpirun=program, deepspeed=found)
        return asdict(plan(request, machine)), request
    except SettingError as error:
        return str(error), None


@pytest.mark.parametrize("kind", SITUATIONS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.field)
def test_a_flag_changes_the_plan_or_is_told_or_is_refused(tmp_path, monkeypatch, row, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "s.py").touch(0o755)
    situation, flag = SITUATIONS[kind], row.new or tuple(row.flag[0])
    for name, text in situation.environ.items():
        monkeypatch.setenv(name, text)
    words = (*situation.words, *row.beside)

    without, _ = outcome(words, situation, tmp_path)
    found, request = outcome((*words, *flag), situation, tmp_path)

    if isinstance(without, str):
        return  # what the flag cannot do without does not go here
    assert (found == without) == ((row.field, kind) in AS_IT_IS)
    if request is None:
        assert f"{row.field}=" in found or flag[0] in found
    else:
        usual = LaunchRequest.__dataclass_fields__[row.field].default
        assert getattr(request, row.field) != usual, "a flag that repeats the default shows nothing"


@pytest.mark.parametrize("name", AGENT_FIELDS)
def test_an_option_of_torchs_agent_reaches_the_plan_as_it_is(ask, name):
    row = next(row for row in ROWS if row.field == name)

    assert plan(ask(row, ("flag",)), MACHINE).agent == {name: row.flag[1]}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.field)
def test_a_plan_prints_every_setting_with_its_source(ask, row):
    request = ask(row, ("flag",))
    planned = plan(request, MACHINE)

    found = json.loads(show.as_json(planned, request))

    assert found["settings"][row.field]["source"] == request.origin(row.field)
    assert request.describe(row.field) in show.as_text(planned, request)
    assert all(item["source"] for item in found["environment"].values())


def test_a_plan_names_the_source_of_processes_ranks_and_variables():
    request = LaunchRequest.merge(
        {"processes_per_machine": 2, "nnodes": "2", "main_process_ip": "node0", "machine_rank": 1}
        | {"mixed_precision": "bf16", "gpu_ids": "2,3"},
        None,
        {"ACCELERATE_DEBUG_MODE": "1"},
        script="s.py",
    )

    found = show.describe(plan(request, MACHINE), request)

    assert found["processes"] == {"total": 4, "on_each_machine": 2, "source": "from --processes_per_machine"}
    assert (found["machines"]["source"], found["ranks"]) == ("from --nnodes", {"first": 2, "last": 3})
    assert found["rendezvous"]["endpoint"] == "node0:29500"
    sources = {name: item["source"] for name, item in found["environment"].items()}
    assert sources["ACCELERATE_MIXED_PRECISION"] == "from --mixed_precision"
    assert sources["ACCELERATE_DEBUG_MODE"] == "from the variable ACCELERATE_DEBUG_MODE"
    assert sources["CUDA_VISIBLE_DEVICES"] == "from --gpu_ids"
    assert sources["ACCELERATE_DYNAMO_MODE"] == "the default"
    assert sources["OMP_NUM_THREADS"].startswith("the launcher")


# --- torchrun's names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nnodes", "2", "--nproc_per_node", "3", "--master_addr", "h"], (6, 2, None, "h", None)),
        (["--nnodes=1:3", "--nproc-per-node=2", "--rdzv-endpoint", "h:7"], (6, 3, 1, "h", 7)),
        (["--rdzv_endpoint", "[::1]:7"], (None, 1, None, "::1", 7)),
        (["--rdzv_endpoint", "h"], (None, 1, None, "h", None)),
        (["--master_addr", "h", "--master_port", "8", "--main_process_ip", "h"], (None, 1, None, "h", 8)),
    ],
)
def test_torchruns_words_mean_ours(ask, tmp_path, words, expected):
    request = request_from(PARSER.parse_args([*words, str(tmp_path / "s.py")]))

    names = ("num_processes", "num_machines", "min_machines", "main_process_ip", "main_process_port")
    assert tuple(getattr(request, name) for name in names) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--nnodes", "2", "--num_machines", "3"],
            "num_machines=3 (from --num_machines) contradicts 2 (from --nnodes)",
        ),
        (["--nnodes", "3:2"], "nnodes='3:2' (from --nnodes) is no number of machines."),
        (["--nproc_per_node", "many"], "nproc_per_node='many' (from --nproc_per_node) is no number of processes."),
        (["-n", "3", "--nproc_per_node", "2"], "num_processes=3 (from --num_processes) contradicts 2 on each of 1"),
        (["-n", "3", "--nproc_per_node", "gpu"], "processes_per_machine=gpu (from --nproc_per_node) contradicts"),
        (
            ["--nproc_per_node", "gpu", "--cpu"],
            "processes_per_machine=gpu (from --nproc_per_node) contradicts cpu=True",
        ),
        (["--rdzv_endpoint", "a:b"], "rdzv_endpoint='a:b' (from --rdzv_endpoint) is no address."),
        (
            ["--master_port", "8", "--main_process_port", "9"],
            "main_process_port=9 (from --main_process_port) contradic",
        ),
        (["--shutdown_timeout", "8", "--grace_seconds", "9"], "grace_seconds=9 (from --grace_seconds) contradicts 8"),
        (["--local_ranks_filter", "a"], "local_ranks_filter='a' (from --local_ranks_filter) names no ranks."),
        (["--signals_to_handle", "SIGTERN"], "signals_to_handle names 'SIGTERN' (from --signals_to_handle)"),
        (
            ["--standalone", "--main_process_port", "9"],
            "standalone=True (from --standalone) contradicts main_process_p",
        ),
        (
            ["--standalone", "--nnodes", "2"],
            "standalone=True (from --standalone) contradicts num_machines=2 (from --nno",
        ),
        (["--run_path", "-m"], "run_path=True (from --run_path) contradicts module=True"),
        (
            ["--nnodes", "1:2", "--rdzv_backend", "static", "--master_addr", "h"],
            "min_machines=1 (from --nnodes) contradicts rdzv_backend=static (from --rdzv_backend)",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_both_sources(ask, tmp_path, words, expected):
    with pytest.raises(SettingError) as caught:
        request_from(PARSER.parse_args([*words, str(tmp_path / "s.py")]))

    assert expected in str(caught.value)


@pytest.mark.parametrize(("word", "count"), [("auto", 4), ("gpu", 4), ("cpu", 16), (2, 2)])
def test_processes_of_a_machine_are_counted_by_word(word, count):
    environ = {"ACCELERATE_USE_CPU": "1"} if word == "cpu" else {}
    request = LaunchRequest.merge({"nproc_per_node": word}, None, environ, script="s.py")

    assert plan(request, MACHINE).processes_per_node == count


def test_devices_that_are_asked_for_must_be_there():
    request = LaunchRequest.merge({"nproc_per_node": "gpu"}, None, {}, script="s.py")

    with pytest.raises(SettingError, match="asks for one process on each device, and this machine shows none"):
        plan(request, replace(MACHINE, devices=Devices(0)))


@pytest.mark.parametrize(("devices", "cpu"), [(Devices(0), False), (None, True), (Devices(2, "xpu"), False)])
def test_workers_cannot_be_bound_near_devices_that_are_not_there(devices, cpu):
    request = LaunchRequest.merge({"numa_binding": "node", "cpu": cpu}, None, {}, script="s.py")

    with pytest.raises(SettingError, match="binds each worker near its NVIDIA device, and this run has none"):
        plan(request, replace(MACHINE, devices=devices))


def test_a_flag_for_a_machine_replaces_the_total_of_the_file(ask, tmp_path):
    row = next(row for row in ROWS if row.field == "num_processes")
    (tmp_path / "hub").mkdir()
    ask(row, ("key",))

    words = ["--config_file", str(tmp_path / "c.yaml"), "--nproc_per_node", "8", str(tmp_path / "s.py")]

    assert request_from(PARSER.parse_args(words)).describe("num_processes") == "num_processes=8 (from --nproc_per_node)"


def test_the_agent_of_torch_gets_what_was_asked(tmp_path):
    from accelerate.launch import elastic

    flags = {
        "signals_to_handle": "SIGTERM",
        "virtual_local_rank": True,
        "duplicate_stdout_filters": "loss,lr",
        "numa_binding": "node",
        "event_log_handler": "console",
        "local_ranks_filter": "0,2",
        "redirects": "0:1",
        "rdzv_id": "mine",
        "nnodes": "1:3",
        "main_process_ip": "node0",
        "num_processes": 9,
        "log_dir": str(tmp_path),
        "local_addr": "here",
    }
    request = LaunchRequest.merge(flags, None, {}, script="s.py")

    config: Any = elastic.launch_config(plan(request, MACHINE))

    logs = config.logs_specs
    assert (config.signals_to_handle, config.virtual_local_rank, config.event_log_handler) == (
        "SIGTERM",
        True,
        "console",
    )
    assert (logs._filters, config.numa_options.affinity_mode.value) == (
        {"stdout": ["loss", "lr"], "stderr": []},
        "node",
    )
    assert (config.run_id, config.local_addr) == ("mine", "here")
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, 3, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("accelerate-c10d", "node0:29500")
    assert logs._local_ranks_filter == {0, 2}
    assert {rank: value.value for rank, value in logs._redirects.items()} == {0: 1}


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ({"of_next_year": "1"}, "--of_next_year 1 is an option that torch"),
        ({"numa_binding": "near"}, "numa_binding='near' is not known (from --numa_binding)."),
        ({"logs_specs": "mine"}, "logs_specs='mine' is not registered (from --logs_specs)."),
    ],
)
def test_what_the_installed_torch_does_not_know_is_refused(agent, expected):
    from accelerate.launch import elastic

    planned = replace(plan(LaunchRequest(script="s.py", num_processes=2, cpu=True), MACHINE), agent=agent)

    with pytest.raises(SettingError) as caught:
        elastic.launch_config(planned)

    assert expected in str(caught.value)


# --- what the commands print -------------------------------------------------------------------------------


@pytest.fixture
def quiet_place(tmp_path, monkeypatch):
    """A folder with a default file and one variable, and nothing else that speaks."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "1")
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "INFO")
    monkeypatch.setenv("ACCELERATE_USE_CPUS", "1")
    monkeypatch.setenv("ACCELERATE_NUM_MACHINES", "2")
    monkeypatch.setenv("PET_FOO", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("distributed_type: MULTI_CPU\nmixed_precision: bf16\n")
    return file


def test_env_explain_prints_every_setting_with_its_source(quiet_place, capsys):
    env_command(env_command_parser().parse_args(["--explain"]))
    text = capsys.readouterr().out
    env_command(env_command_parser().parse_args(["--explain", "--json"]))
    found = json.loads(capsys.readouterr().out)

    place = f"in {quiet_place}, line"
    assert found["file"] == str(quiet_place)
    assert found["settings"]["debug"] == {"value": True, "source": "from the variable ACCELERATE_DEBUG_MODE"}
    assert found["settings"]["mixed_precision"]["source"] == f"from mixed_precision {place} 2"
    assert found["settings"]["cpu"]["source"] == f"from distributed_type {place} 1"
    assert found["settings"]["max_restarts"] == {"value": 0, "source": "the default"}
    assert set(found["settings"]) == {row.field for row in ROWS}
    assert found["variables of workers"] == {"ACCELERATE_LOG_LEVEL": "INFO"}
    assert f"  mixed_precision=bf16 (from mixed_precision {place} 2)\n" in text
    assert "max_restarts=0" in text.partition("\ndefaults ")[2]
    assert {row.field for row in ROWS} <= set(
        re.findall(r"\w+", text.partition("\nsettings\n")[2].partition("\nnotes\n")[0])
    )
    assert f"\nfile         {quiet_place}\n" in text
    assert text.endswith("\nvariables that each worker reads\n  ACCELERATE_LOG_LEVEL=INFO\n")
    assert "ACCELERATE_USE_CPUS has no effect" in text
    assert "Did you mean ACCELERATE_USE_CPU?" in found["notes"][-3]
    assert found["notes"][-2].endswith(
        "ACCELERATE_NUM_MACHINES has no effect: num_machines has none. Pass --num_machines."
    )
    assert "PET_FOO has no effect" in found["notes"][-1]


def test_a_dry_run_prints_json_that_names_the_line(quiet_place, tmp_path, capsys):
    (tmp_path / "s.py").touch()

    launch_command(PARSER.parse_args(["--dry-run", "--json", "-n", "2", str(tmp_path / "s.py")]))

    found = json.loads(capsys.readouterr().out)
    assert (
        found["environment"]["ACCELERATE_MIXED_PRECISION"]["source"] == f"from mixed_precision in {quiet_place}, line 2"
    )
    assert (found["processes"]["total"], found["ranks"], found["started_by"]) == (2, {"first": 0, "last": 1}, "elastic")


def test_json_without_a_dry_run_is_refused(tmp_path):
    with pytest.raises(SettingError, match="--json is the form in which --dry-run prints"):
        launch_command(PARSER.parse_args(["--json", "s.py"]))


def test_a_namespace_that_was_changed_counts_as_given_and_may_lack_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    args = PARSER.parse_args([str(Path(__file__))])
    args.num_processes = 3
    for name in ("json", "nnodes", "fsdp_version"):
        delattr(args, name)

    assert request_from(args).describe("num_processes") == "num_processes=3 (from --num_processes)"
    args.use_fsdp = True
    with pytest.raises(UnsupportedCombination, match="--use_fsdp needs the FSDP engine"):
        request_from(args)


@pytest.mark.parametrize(
    ("flag", "named"), [("--tpu_cluster", "--tpu_cluster"), ("--no-tpu-cluster", "--no_tpu_cluster")]
)
def test_of_two_flags_for_one_thing_the_given_one_is_named(flag, named):
    with pytest.raises(UnsupportedCombination, match=f"^{named} needs"):
        request_from(PARSER.parse_args([flag, str(Path(__file__))]))
