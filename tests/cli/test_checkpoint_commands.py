"""`accelerate checkpoint` and `accelerate merge-weights`, as typed in a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from accelerate.checkpoint.weights import load_weights
from tests.support.checkpoint_files import write_weights

from ..unit.checkpoint.support import Counter, Run, Tied


def accelerate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    run = Run(folder, automatic_checkpoint_naming=True).having(models=[Tied()], custom_objects=[Counter(1)])
    for step in range(3):
        run.save(step=step)
    (folder / "checkpoints" / "checkpoint_2" / "model.safetensors").unlink()
    return folder


def test_inspect_prints_a_table(project: Path) -> None:
    done = accelerate("checkpoint", "inspect", project / "checkpoints" / "checkpoint_1")
    assert done.returncode == 0
    assert "checkpoint_1: a checkpoint\nhealth: complete" in done.stdout
    assert "number of processes: 1   step: 1   iteration: 1" in done.stdout
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "  " in line}
    assert rows["model.safetensors"][-3:] == ["2", "13", "float32"]


def test_inspect_prints_a_line_for_each_checkpoint_of_a_project(project: Path) -> None:
    lines = accelerate("checkpoint", "inspect", project).stdout.splitlines()
    assert "checkpoints: 3 checkpoints" in lines[0]
    assert "INCOMPLETE: model.safetensors is missing" in next(line for line in lines if "checkpoint_2 " in line)
    assert [line for line in lines if line.startswith("->")] == [line for line in lines if " checkpoint_1 " in line]
    assert lines[-1] == "load_state() takes checkpoint_1, if its content is what was written (`verify` reads it)."


def test_inspect_prints_json(project: Path) -> None:
    one = json.loads(accelerate("checkpoint", "inspect", project / "checkpoints" / "checkpoint_1", "--json").stdout)
    assert (one["health"], one["saved"]["step"]) == ("complete", 1)
    assert {file["name"]: file["num_parameters"] for file in one["files"]}["model.safetensors"] == 13
    many = json.loads(accelerate("checkpoint", "inspect", "--json", project).stdout)
    assert many["newest"] == "checkpoint_1"


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    Run().having(custom_objects=[Counter(1)]).save(tmp_path / "c")
    (tmp_path / "c" / "evil\x1b[2J\nname").write_text("")
    shown = accelerate("checkpoint", "inspect", tmp_path / "c").stdout
    assert "\x1b" not in shown
    assert "evil\\x1b[2J\\nname" in shown


def test_verify_ends_with_0_for_a_whole_checkpoint_and_with_1_for_a_damaged_one(project: Path) -> None:
    whole = accelerate("checkpoint", "verify", project / "checkpoints" / "checkpoint_0")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.endswith("all as they were written\n")
    all_of_them = accelerate("checkpoint", "verify", project)
    assert all_of_them.returncode == 1
    assert "checkpoint_2: DAMAGED\n  model.safetensors is missing\n" in all_of_them.stdout
    as_json = accelerate("checkpoint", "verify", project, "--json")
    assert as_json.returncode == 1
    assert [len(verdict["problems"]) for verdict in json.loads(as_json.stdout)] == [1, 0, 0]


def test_convert_writes_shards_and_says_what_it_did(project: Path, tmp_path: Path) -> None:
    source = project / "checkpoints" / "checkpoint_0"
    done = accelerate("checkpoint", "convert", source, tmp_path / "new", "--max-shard-size", "40")
    assert done.returncode == 0, done.stderr
    assert f"{source} is a checkpoint.\n{tmp_path / 'new'} is new: " in done.stdout
    assert (tmp_path / "new" / "model-00001-of-00002.safetensors").is_file()
    assert accelerate("checkpoint", "verify", tmp_path / "new").returncode == 0
    again = accelerate("checkpoint", "convert", source, tmp_path / "new")
    assert again.returncode == 2
    assert "There is something at" in again.stderr
    as_json = json.loads(accelerate("checkpoint", "convert", tmp_path / "new", tmp_path / "one", "--json").stdout)
    assert "model.safetensors" in as_json["files"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["checkpoint"], "the following arguments are required: inspect|verify|convert"),
        (["checkpoint", "look", "x"], "invalid choice: 'look'"),
        (["checkpoint", "inspect", "nowhere"], "There is no folder nowhere."),
        (["checkpoint", "verify", "nowhere"], "There is no folder nowhere."),
        (["checkpoint", "convert", "nowhere", "out"], "There is no folder nowhere."),
        (["checkpoint", "convert", "nowhere", "out", "--max-shard-size", "big"], "size='big' is not a size in bytes."),
        (["checkpoint", "convert", "nowhere"], "the following arguments are required: output"),
        (["merge-weights", "nowhere", "out"], "nowhere is no sharded checkpoint"),
        (["merge-weights", "nowhere"], "the following arguments are required: output_path"),
    ],
)
def test_a_wrong_call_is_refused_with_status_2(words: list[str], expected: str) -> None:
    done = accelerate(*words)
    assert done.returncode == 2
    assert expected in done.stderr


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save({"model": {"w": torch.arange(4.0)}}, checkpoint_id=tmp_path / "fsdp", no_dist=True)
    return tmp_path / "fsdp"


@pytest.mark.parametrize("dashes", ["_", "-"])
def test_merge_weights(sharded: Path, tmp_path: Path, dashes: str) -> None:
    done = accelerate("merge-weights", sharded, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"The merged weights are in {tmp_path / 'out'}.\n")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    unsafe, remove = (name.replace("_", dashes) for name in ("unsafe_serialization", "remove_checkpoint_dir"))
    done = accelerate("merge-weights", sharded, tmp_path / "out", f"--{unsafe}", f"--{remove}")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "out") == ["pytorch_model.bin"]
    assert torch.equal(load_weights(tmp_path / "out")["w"], torch.arange(4.0))
    assert not sharded.exists()


@pytest.mark.full
@pytest.mark.parametrize("form", ["safetensors", "pickle", "sharded"])
def test_converting_256_mb_holds_one_tensor_of_16_mb_in_memory(tmp_path: Path, form: str) -> None:
    state = {f"w{n}": torch.ones(4, 2**20) for n in range(16)}
    if form == "sharded":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_dcp.save(state, checkpoint_id=tmp_path / "from", no_dist=True)
    else:
        (tmp_path / "from").mkdir()
        write_weights(
            state, tmp_path / "from" / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
        )
    code = f"""
import re
from pathlib import Path
from accelerate.checkpoint.convert import convert, plan

def used(_=0):
    # Pages of files do not count: they go when somebody needs the memory.
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

folder, before, seen = Path({str(tmp_path)!r}), used(), []
convert(plan(folder / "from"), folder / "many", 50 * 10**6, lambda _: seen.append(used()))
convert(plan(folder / "many"), folder / "one", None, lambda _: seen.append(used()))
print(max(seen) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "model.safetensors").stat().st_size > 2**28
    print(f"{form}: {done.stdout.strip()} MB more at most")
    assert int(done.stdout) < 60
