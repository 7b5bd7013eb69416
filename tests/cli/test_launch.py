"""`accelerate launch`, as a user runs it: real processes, real exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import places
from tests.support.ranks import free_port

SHOW = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__, "pid": os.getpid(),
    "env": {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE_") or k in ("OMP_NUM_THREADS", "RANK")},
    "modules": sorted(m for m in ("torch", "accelerate", "runpy") if m in sys.modules),
}))
"""
MEET = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
names = ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")
words = [str(total.item()), *(os.environ[name] for name in names)]
open(os.path.join(os.environ["OUT"], str(dist.get_rank())), "w").write(" ".join(words))
dist.destroy_process_group()
"""
FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    if sys.argv[1] == "raise":
        raise ValueError("boom")
    if sys.argv[1] == "record":
        from torch.distributed.elastic.multiprocessing.errors import record
        @record
        def main():
            raise ValueError("boom")
        main()
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with no configuration file anywhere."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    for name, text in (("show.py", SHOW), ("meet.py", MEET), ("fail.py", FAIL)):
        (tmp_path / name).write_text(text)
    return tmp_path


def accelerate(*words: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


# --- one process -------------------------------------------------------------------------------------------


def test_one_process_runs_as_with_plain_python_and_without_torch(place):
    plain = json.loads(subprocess.check_output([sys.executable, "show.py", "--x", "1", "-q"], text=True))

    done = accelerate("launch", "show.py", "--x", "1", "-q")

    found = json.loads(done.stdout)
    assert done.stderr == ""
    for key in ("argv", "path0", "name", "file", "modules"):
        assert found[key] == plain[key]
    assert found["env"] == {
        "ACCELERATE_DEBUG_MODE": "false",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "false",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_SETTINGS": found["env"]["ACCELERATE_SETTINGS"],
    }


@pytest.mark.skipif(os.name != "posix", reason="there, a process cannot take the place of another")
def test_one_process_takes_the_place_of_the_launcher(place):
    with subprocess.Popen([sys.executable, "-m", "accelerate", "launch", "show.py"], stdout=subprocess.PIPE) as child:
        out, _ = child.communicate(timeout=60)

    assert json.loads(out)["pid"] == child.pid


def test_flags_reach_the_environment_in_either_spelling(place):
    flags = [
        "--mixed-precision",
        "bf16",
        "--gradient_accumulation_steps=3",
        "--num-cpu-threads-per-process",
        "2",
        "--cpu",
    ]

    found = json.loads(accelerate("launch", *flags, "show.py").stdout)["env"]

    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "3"
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["ACCELERATE_USE_CPU"] == "true"


def test_the_command_is_a_module_too(place):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "show.py", "x"]

    assert json.loads(subprocess.check_output(command, text=True))["argv"] == ["show.py", "x"]


def test_a_module_and_a_program(place):
    (place / "package").mkdir()
    (place / "package" / "__main__.py").write_text(SHOW)

    module = json.loads(accelerate("launch", "-m", "package", "a").stdout)
    program = accelerate("launch", "--no_python", sys.executable, "show.py", "b")

    assert module["argv"][1:] == ["a"]
    assert module["path0"] == str(place)
    assert json.loads(program.stdout)["argv"] == ["show.py", "b"]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("1/0", 1), ("", 0)])
def test_the_exit_status_and_the_traceback_are_the_scripts(place, code, status):
    (place / "s.py").write_text(code)
    plain = subprocess.run([sys.executable, "s.py"], capture_output=True, text=True, check=False)

    done = accelerate("launch", "s.py")

    assert done.returncode == status
    assert done.stderr == plain.stderr


def test_a_signal_reaches_the_script(place):
    (place / "s.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\nprint('on', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-m", "accelerate", "launch", "s.py"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGUSR1)
        assert child.wait(30) == 9


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["show.py", "--", "a", "--", "b"], ["--", "a", "--", "b"]),
        (["show.py", "a", "--", "b"], ["a", "--", "b"]),
        (["--", "show.py", "--cpu", "--"], ["--cpu", "--"]),
        (["-qn", "1", "--gpu-ids", "all", "--tee=0", "show.py", "-n", "7"], ["-n", "7"]),
        (["-n1", "show.py"], []),
    ],
)
def test_everything_behind_the_script_reaches_it_untouched(place, words, expected):
    done = accelerate("launch", *words)

    assert json.loads(done.stdout)["argv"] == ["show.py", *expected], done.stderr


@pytest.mark.parametrize("flags", [[], ["--mixed_precision", "fp16", "--gradient_accumulation_steps", "9"]])
def test_a_launch_in_a_launched_script_obeys_its_own_file_not_the_launch_around_it(place, monkeypatch, flags):
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    (place / "c.yaml").write_text(
        "distributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\ndebug: true\ndynamo_config: {backend: eager}\n"
    )
    (place / "outer.py").write_text(
        "import os, sys\nassert 'ACCELERATE_MIXED_PRECISION' in os.environ\n"
        "words = ['-m', 'accelerate', 'launch', '--config_file', 'c.yaml', 'show.py']\n"
        "os.execv(sys.executable, [sys.executable, *words])\n"
    )

    found = json.loads(accelerate("launch", *flags, "outer.py").stdout)["env"]

    expected = {"MIXED_PRECISION": "bf16", "USE_CPU": "true", "DEBUG_MODE": "true", "DYNAMO_BACKEND": "EAGER"}
    for name, value in {**expected, "DYNAMO_MODE": "max-autotune"}.items():
        assert found[f"ACCELERATE_{name}"] == value
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in found


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_caller_that_is_asked_to_end_ends_its_script_first(place, sent):
    (place / "s.py").write_text(
        "import os, signal, sys, time\n"
        f"signal.signal({int(sent)}, lambda *_: sys.exit(3))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    (place / "caller.py").write_text(
        "import signal\n"
        "from accelerate.commands.launch import launch_command, launch_command_parser\n"
        "from accelerate.launch.report import WorkersFailed\n"
        # Under nohup, or behind `&`, these are ignored, and whatever is started ignores them too.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    launch_command(launch_command_parser().parse_args(['s.py']))\n"
        "except WorkersFailed as error:\n    print(error.status, error)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    # In a session of its own, as under a job scheduler: no terminal sends the signal to the script.
    with subprocess.Popen(
        [sys.executable, "caller.py"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        script = int(child.stdout.readline())
        child.send_signal(sent)
        said = child.communicate(timeout=30)[0]

    with pytest.raises(ProcessLookupError):
        os.kill(script, 0)
    expected = f"{128 + sent} accelerate: the launcher received {sent.name} and passed it on to the script\n"
    assert said == ("interrupted\n" if sent == signal.SIGINT else expected)


def test_the_default_file_is_left_aside_with_cpu_and_that_is_said(place):
    file = place / "hub" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nmixed_precision: bf16\n")

    done = accelerate("launch", "--cpu", "show.py")
    quiet = accelerate("launch", "-q", "--cpu", "show.py")
    file.write_text("distributed_type: NO\nnum_processes: 1\n")
    same = accelerate("launch", "--cpu", "show.py")
    far = accelerate("launch", "--cpu", "--dry-run", "--num_machines", "2", "--main_process_ip", "a", "show.py")
    file.write_text("distributed_type: NO\nnum_processes: 2\n")
    wrong = accelerate("launch", "--cpu", "show.py")

    assert json.loads(done.stdout)["env"]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert done.stderr == (
        f"accelerate launch: --cpu leaves {file} aside, which has something to say about: num_processes, "
        "mixed_precision. Name it with --config_file to have it used.\n"
    )
    assert (quiet.stderr, same.stderr) == ("", "")
    assert (far.returncode, "aside" in far.stdout) == (0, False)
    assert (
        f"--cpu leaves {file} aside, which could not be used: num_processes=2 (num_processes in {file}" in wrong.stderr
    )


@pytest.mark.parametrize("task", ["0", "3"])
def test_one_of_several_tasks_speaks_for_all_and_each_one_shows_its_notes_in_a_dry_run(place, monkeypatch, task):
    node, local = divmod(int(task), 2)
    numbers = {"SLURM_PROCID": task, "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
    for name, value in {**places.SLURM_TASK_PER_PROCESS, **numbers}.items():
        monkeypatch.setenv(name, value)
    note = "num_machines=3 (from --num_machines) has no use: SLURM counts and numbers the processes.\n"

    shown = accelerate("launch", "--dry-run", "--cpu", "--num_machines", "3", "show.py")
    done = accelerate("launch", "--cpu", "--num_machines", "3", "show.py")

    assert f"notes\n  {note}" in shown.stdout
    assert (done.returncode, done.stderr) == (0, f"accelerate launch: {note}" if task == "0" else "")


def test_variables_that_nobody_hears_are_told_once(place, monkeypatch):
    monkeypatch.setenv("ACCELERATE_NUM_MACHINES", "2")
    monkeypatch.setenv("PET_NUMA_BINDING", "node")
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", "x.yaml")

    shown = accelerate("launch", "--dry-run", "--cpu", "show.py")
    done = accelerate("launch", "--cpu", "-n", "2", "show.py")

    for name in ("ACCELERATE_NUM_MACHINES", "PET_NUMA_BINDING"):
        assert f"the variable {name} has no effect: " in shown.stdout
    assert "ACCELERATE_CONFIG_FILE has no effect: config_file has none. Pass --config_file." in shown.stdout
    for name in ("ACCELERATE_NUM_MACHINES", "PET_NUMA_BINDING"):
        assert done.stderr.count(name) == 1


def test_a_name_that_the_output_has_no_letters_for_is_spelt_out(place, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (place / "é.py").touch()

    done = accelerate("launch", "--dry-run", "--cpu", "é.py")

    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe9.py" in done.stdout


def test_nobody_has_to_read_a_dry_run_to_its_end(place):
    command = [sys.executable, "-m", "accelerate", "launch", "--dry-run", "show.py"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="closes a stream as a shell does")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "words", ["launch --cpu -n 2 show.py", "launch --cpu show.py", "launch --dry-run --cpu show.py"]
)
def test_a_closed_stream_fails_nothing(place, words, closed):
    (place / "show.py").write_text("")
    command = f"{sys.executable} -m accelerate {words} {closed}"

    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no file without room")
@pytest.mark.parametrize("words", [("launch", "--dry-run", "show.py"), ("env",)])
def test_output_that_cannot_be_written_is_told_in_a_line(place, words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "accelerate", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    expected = "error: standard output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, f"accelerate {words[0]}: {expected}")


# --- several processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flags", "file", "port", "busy port"])
def test_two_processes_meet_on_the_cpu(place, monkeypatch, how):
    monkeypatch.setenv("OUT", str(place / "out"))
    (place / "out").mkdir()
    (place / "c.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with socket.socket() as server:
        server.bind(("", 0))
        port = str(server.getsockname()[1])
        if how == "busy port":
            server.listen()
        else:
            server.close()
        flags = {
            "flags": ["--cpu", "--num_processes", "2"],
            "file": ["--config_file", "c.yaml"],
            "port": ["--cpu", "-n", "2", "--main_process_port", port],
            "busy port": ["--cpu", "-n", "2", "--main_process_port", port],
        }[how]

        done = accelerate("launch", "--num_cpu_threads_per_process", "1", *flags, "meet.py")

    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_text() for file in (place / "out").iterdir()} == dict.fromkeys("01", "3.0 true 1 2")
    assert ("is taken by another program" in done.stderr) == (how == "busy port")
    assert done.stderr.count("\n") == (1 if how == "busy port" else 0), done.stderr


def test_flags_of_torchrun_reach_its_agent(place):
    (place / "s.py").write_text("import os, sys\nprint('rank', os.environ['RANK'], *sys.argv[1:])\nprint('loss')\n")
    words = ["--cpu", "--standalone", "--nproc_per_node", "2", "--local_ranks_filter", "1", "--tee", "1"]
    words += ["--duplicate_stdout_filters", "loss", "--log-dir", "logs", "--run_path"]

    done = accelerate("launch", *words, "s.py", "--standalone")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[rank 1] rank 1 --standalone\n[rank 1] loss\n"
    logs = {f"{file.parent.name}/{file.name}": file.read_text() for file in (place / "logs").rglob("stdout.log")}
    assert logs == {f"rank_{rank}/stdout.log": f"rank {rank} --standalone\nloss\n" for rank in "01"}
    assert [file.read_text() for file in (place / "logs").rglob("filtered_stdout.log")] == ["loss\n"] * 2


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_launchers_meet_as_two_machines(place, monkeypatch, backend):
    monkeypatch.setenv("OUT", str(place / "out"))
    (place / "out").mkdir()
    port = str(free_port())
    words = ["--cpu", "-n", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    command = [sys.executable, "-m", "accelerate", "launch", *words, "--rdzv_backend", backend]
    command += ["--num_cpu_threads_per_process", "1"]

    machines = [subprocess.Popen([*command, "--machine_rank", rank, "meet.py"]) for rank in "10"]

    assert [machine.wait(60) for machine in machines] == [0, 0]
    assert {file.name: file.read_text() for file in (place / "out").iterdir()} == dict.fromkeys("01", "3.0 true 1 1")


@pytest.mark.parametrize(
    ("kind", "status", "ending"),
    [
        ("3", 3, "exited with code 3; what it printed stands above."),
        ("raise", 1, "exited with code 1; what it printed stands above."),
        ("record", 1, "exited with code 1: ValueError: boom"),
        (
            "kill",
            137,
            "was ended by SIGKILL: on Linux this is most often the system running out of memory (see `dmesg`).",
        ),
    ],
)
def test_a_failing_rank_is_named_last_and_gives_the_status(place, kind, status, ending):
    began = time.monotonic()

    done = accelerate("launch", "--cpu", "-n", "2", "fail.py", kind)

    assert done.returncode == status
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("accelerate: rank 1 of 2 (pid ")
    assert lines[-1].endswith(ending)
    assert "elastic_launch" not in done.stderr, "no traceback of the launcher"
    assert "rank 0" not in done.stderr, "a rank that was ended is not the cause"
    assert ("ValueError: boom" in done.stderr) == (kind in ("raise", "record"))
    assert time.monotonic() - began < 30, "the sleeping rank was ended"


def test_quiet_leaves_the_status_only(place):
    done = accelerate("launch", "-q", "--cpu", "-n", "2", "fail.py", "3")

    assert (done.returncode, done.stderr) == (3, "")


def test_a_signal_to_the_launcher_ends_the_workers(place):
    (place / "s.py").write_text(
        "import os, time\nopen(os.environ['RANK'] + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    command = [sys.executable, "-m", "accelerate", "launch", "--cpu", "-n", "2", "s.py"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        files = [place / "0.pid", place / "1.pid"]
        deadline = time.monotonic() + 30
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=30)

    assert child.returncode == 143
    assert errors == "accelerate: the launcher received SIGTERM and ended the workers\n", "torch says nothing itself"
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_failed_workers_are_started_again_when_asked(place):
    (place / "s.py").write_text(
        "import os, sys\nn = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\nprint('try', n, flush=True)\nsys.exit(0 if n else 5)"
    )

    done = accelerate("launch", "--cpu", "--max_restarts", "1", "s.py")

    assert (done.returncode, done.stdout) == (0, "try 0\ntry 1\n")


def test_a_folder_for_logs_gets_both_streams_of_every_process(place):
    (place / "s.py").write_text("import os, sys\nprint('out', os.environ['RANK'])\nprint('err', file=sys.stderr)")

    done = accelerate("launch", "--cpu", "-n", "2", "--log_dir", "logs", "s.py")

    found = {str(file.relative_to(file.parents[1])): file.read_text() for file in (place / "logs").rglob("std*.log")}
    assert found == {
        "rank_0/stdout.log": "out 0\n",
        "rank_1/stdout.log": "out 1\n",
        "rank_0/stderr.log": "err\n",
        "rank_1/stderr.log": "err\n",
    }
    assert "out 0" in done.stdout
    assert "out 1" in done.stdout


def test_a_worker_can_launch_a_script_of_its_own(place):
    (place / "inner.py").write_text(
        "from accelerate import Accelerator\nprint('inner alone:', Accelerator(cpu=True).num_processes, flush=True)"
    )
    (place / "outer.py").write_text(
        "import subprocess, sys\n"
        "command = [sys.executable, '-m', 'accelerate', 'launch', '--cpu', '--num_processes', '1', 'inner.py']\n"
        "sys.exit(subprocess.run(command, timeout=40).returncode)"
    )

    done = accelerate("launch", "--cpu", "-n", "2", "outer.py")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "inner alone: 1\n" * 2


CAUSE = """
import atexit, os, pathlib, time
from accelerate import Accelerator
accelerator = Accelerator()
note = pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"])
if accelerator.process_index == 1:
    atexit.register(time.sleep, 20)  # its end takes longer than that of rank 0
    raise ValueError("boom")
while not note.parent.with_name("1").joinpath(note.name).exists():
    time.sleep(0.05)
raise RuntimeError("Connection closed by peer")
"""


def test_the_rank_that_raised_is_named_though_another_one_ends_before_it(place):
    (place / "s.py").write_text(CAUSE)

    done = accelerate("launch", "--cpu", "-n", "2", "s.py")

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("accelerate: rank 1 of 2 (")
    assert last.endswith("exited with code 1: ValueError: boom")


NAMED = """
import time
from accelerate import Accelerator
from accelerate.core.errors import CheckpointError
if Accelerator().process_index == 0:
    error = CheckpointError("What failed: rank 1: boom")
    error.arose_on = (1,)
    raise error
time.sleep(5)  # as an exception waits for DataLoader workers before anybody sees it
raise ValueError("boom")
"""


def test_the_launcher_waits_for_the_word_of_a_rank_that_others_have_named(place):
    (place / "s.py").write_text(NAMED)

    done = accelerate("launch", "--cpu", "-n", "2", "s.py")

    last = done.stderr.splitlines()[-1]
    assert last.startswith("accelerate: rank 1 of 2 (")
    assert last.endswith("exited with code 1: ValueError: boom")


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nope.py"], "'nope.py' does not exist (the script on the command line, looked for from"),
        (["--no_python", "no-such-program"], "'no-such-program' does not exist"),
        (
            ["--num_procs", "2", "show.py"],
            "--num_procs is not a flag of accelerate launch. Did you mean '--num_processes'?",
        ),
        (["--num_proc", "2", "show.py"], "unrecognized arguments: --num_proc"),
        (["--use_fsdp", "show.py"], "--use_fsdp needs the FSDP engine, which accelerate 2.0 does not have yet."),
        (["--zero-stage", "2", "show.py"], "--zero_stage needs the DeepSpeed engine"),
        (["--tpu", "show.py"], "--tpu needs the TPU launcher"),
        (["--cpu", "--multi_gpu", "show.py"], "cpu=True (from --cpu) contradicts multi_gpu=True (from --multi_gpu)"),
        (["--mixed_precision", "fp32", "show.py"], "mixed_precision='fp32' is not accepted"),
        (["--config_file", "none.yaml", "show.py"], "The configuration file none.yaml does not exist."),
        ([], "the following arguments are required: SCRIPT\n"),
        (["--no_python", "./show.py"], "'./show.py' cannot be run: it is not an executable file"),
        (["--no_python", "show.py"], "'show.py' is not on the PATH (the program after --no_python)."),
        (["--cpu", "-n", "2", "--tee", "9", "show.py"], "tee='9' (from --tee) names no streams."),
    ],
)
def test_a_wrong_command_line_is_one_paragraph_and_status_2(place, words, expected):
    done = accelerate("launch", *words)

    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["nope.py"], ["--config_file", "c.yaml", "show.py"], ["--dry-run", "show.py"]])
def test_a_wrong_command_line_and_a_dry_run_do_not_load_torch(place, words):
    (place / "c.yaml").write_text("distributed_type: MULTI_GPUS\n")
    code = f"""
import sys
from accelerate.commands.accelerate_cli import main
try:
    main(["launch", *{words!r}])
except SystemExit as end:
    assert end.code == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_dry_run_prints_the_plan_and_runs_nothing(place):
    done = accelerate("launch", "--dry-run", "--cpu", "-n", "2", "fail.py", "3")

    assert done.returncode == 0
    assert "-u fail.py 3" in done.stdout
    assert "num_processes=2 (from --num_processes)" in done.stdout


# --- as a function -----------------------------------------------------------------------------------------


def test_the_parser_and_the_command_are_functions_that_return(place, capfd):
    from accelerate.commands.launch import launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--monitor_interval", "0.1", "show.py", "--num_processes", "3"])
    assert args.nondefault == {"monitor_interval"}
    args.mixed_precision = "bf16"  # as clients do

    assert launch_command(args) is None

    found = json.loads(capfd.readouterr().out)
    assert found["env"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert found["argv"] == ["show.py", "--num_processes", "3"]


def test_a_failing_script_is_an_exception_for_callers(place):
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.launch.report import WorkersFailed

    (place / "s.py").write_text("raise SystemExit(4)")

    with pytest.raises(WorkersFailed) as caught:
        launch_command(launch_command_parser().parse_args(["s.py"]))

    assert caught.value.status == 4
