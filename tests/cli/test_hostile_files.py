"""Configuration files that are broken, odd or meant to do harm: an error within a second and 100 MB, and no code run."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from accelerate.core.errors import SettingError
from accelerate.settings import config_file, config_text

SECONDS = 1.0
"""Of the processor: a busy machine shall not fail the test."""
KILOBYTES = 100_000

LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "use_cpu: *a39\n"]
)
HEAD = "distributed_type: 'NO'\n"

REFUSED = {
    "empty": ("", "is not a configuration file: it is empty."),
    "only a comment": ("# nothing\n", "is not a configuration file: it is empty."),
    "a tag that runs code": (
        f"{HEAD}commands: !!python/object/apply:os.system ['touch ran']\n",
        "is not a configuration file: line 2 has the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "a tag for a name": (
        f"{HEAD}commands: !!python/name:os.system\n",
        "is not a configuration file: line 2 has the tag",
    ),
    "billion laughs": (
        LAUGHS,
        "is not a configuration file: with its aliases written out it holds more than 2000 values",
    ),
    "laughs in a merge": (
        "a: &a {x: 1}\n" + "".join(f"m{n}: {{<<: [*a, *a, *a, *a, *a, *a]}}\n" for n in range(150)),
        "is not a configuration file: with its aliases written out it holds more than 2000 values",
    ),
    "itself inside": ("a: &a [*a]\n", "is not a configuration file: with its aliases written out"),
    "100 MB": (None, "has 100000000 bytes, which is too large for a configuration file."),
    "brackets": ("a: " + "[" * 60_000, "is not a configuration file: it is nested too deeply, in more than 20 levels."),
    "dashes": ("- " * 30_000, "is not a configuration file: it is nested too deeply"),
    "braces": ("{a: " * 16_000, "is not a configuration file: it is nested too deeply"),
    "many values": ("a: b\n" * 13_000, "is not a configuration file: it holds more than 2000 values."),
    "a long word": (
        f"{HEAD}num_processes: {'9' * 60_000}\n",
        "is not a configuration file: line 2 has a number of more",
    ),
    "a long text": (f"{HEAD}num_processes: {'x' * 60_000}\n", "has a wrong type (num_processes in {path}, line 2)."),
    "a number in another base": (
        f"{HEAD}num_processes: 0x{'f' * 60_000}\n",
        "line 2 has a number of more than 40 digits.",
    ),
    "a number without digits": (f"{HEAD}num_processes: 0x_\n", "is not a configuration file: invalid literal"),
    "a tag that the value does not fit": (f"{HEAD}main_process_ip: !!bool maybe\n", "line 2 has the tag"),
    "a tag for a date": (f"{HEAD}main_process_ip: !!timestamp x\n", "line 2 has the tag"),
    "a tag for nothing": (f'{HEAD}num_processes: !!int ""\n', "line 2 has the tag"),
    "sixties without end": (f"{HEAD}num_processes: {'1:' * 20_000}1\n", "num_processes='1:1:1:1"),
    "broken sixties": (f"{HEAD}num_processes: {'1:' * 500}1.5\n", "num_processes='1:1:1:1"),
    "a key twice": (f"{HEAD}debug: true\ndebug: false\n", "'debug' stands at line 2 and again at line 3."),
    "a nested key twice": (
        f"{HEAD}fsdp_config:\n  fsdp_version: 1\n  fsdp_version: 2\n",
        "'fsdp_config.fsdp_version' stands at line 3 and again at line 4.",
    ),
    "an unknown key": (
        f"{HEAD}num_procesess: 2\n",
        "'num_procesess' is not a key of a configuration file (num_procesess in {path}, line 2). Did you mean "
        "'num_processes'?",
    ),
    "an unknown nested key": (
        f"{HEAD}fsdp_config:\n  fsdp_versoin: 2\n",
        "'fsdp_versoin' is not a key of fsdp_config (fsdp_config.fsdp_versoin in {path}, line 3). Did you mean "
        "'fsdp_version'?",
    ),
    "a wrong type": (
        f"{HEAD}num_machines: [1]\n",
        "num_machines=[1] has a wrong type (num_machines in {path}, line 2).",
    ),
    "a wrong nested type": (
        f"{HEAD}deepspeed_config:\n  zero_stage: two\n",
        "deepspeed_config.zero_stage='two' has a wrong type (deepspeed_config.zero_stage in {path}, line 3).",
    ),
    "a word that is not known": (
        f"{HEAD}mixed_precision: fp61\n",
        "mixed_precision='fp61' is not known (mixed_precision in {path}, line 2). Did you mean 'fp16'?",
    ),
    "an old word that is not known": (
        f"{HEAD}dynamo_backend: inductr\n",
        "dynamo_backend='inductr' is not known (dynamo_backend in {path}, line 2). Did you mean 'inductor'?",
    ),
    "a nested word that is not known": (
        f"{HEAD}dynamo_config:\n  mode: fastest\n",
        "dynamo_config.mode='fastest' is not known (dynamo_config.mode in {path}, line 3).",
    ),
    "a list of devices": (
        f"{HEAD}gpu_ids: [0, 1]\n",
        "gpu_ids=[0, 1] has a wrong type (gpu_ids in {path}, line 2).\nAccepted: `all`, or numbers such as 0,1.",
    ),
    "a section that is none": (f"{HEAD}dynamo_config: yes\n", "dynamo_config=True has a wrong type"),
    "a key that is no word": (f"{HEAD}? [a, b]\n: 1\n", "line 2 has a key that is not a word."),
    "two documents": ("---\na: 1\n---\nb: 1\n", "is not a configuration file: expected a single document"),
    "no text": (b"\x80\x81\x82", "is not a configuration file: it is not UTF-8 text"),
    "nothing but zeros": (b"\0" * 1000, "is not a configuration file: unacceptable character"),
}

MEASURED = (
    "empty", "a tag that runs code", "billion laughs", "laughs in a merge", "100 MB", "brackets", "braces", "many values",
    "a long word", "an unknown key",
)  # fmt: skip

WORKS = {
    "a mark of an editor": "\ufeffdistributed_type: 'NO'\nmixed_precision: bf16\n",
    "no without quotes": "distributed_type: NO\nmixed_precision: no\n",
    "aliases in good measure": "distributed_type: MULTI_GPU\ngpu_ids: &word bf16\nmixed_precision: *word\n",
    "a date": "distributed_type: 'NO'\nmixed_precision: bf16\ntpu_name: 2026-99-99\n",
    "JSON": '{"distributed_type": "NO", "mixed_precision": "bf16"}',
}


PROGRAM = """
import atexit, re, sys
from pathlib import Path
from accelerate.commands.accelerate_cli import main

def note():
    # What ru_maxrss says holds the memory of the process that started this one.
    file = Path("/proc/self/status")
    found = re.search(r"VmHWM:\\s+(\\d+)", file.read_text()) if file.exists() else None
    Path("peak").write_text(found.group(1) if found else "0")

atexit.register(note)
main(sys.argv[1:])
"""


def launch(folder: Path, **environ: str | None) -> tuple[int, str, float, int]:
    """Return the status of a dry run, what it printed, its processor time, and its memory in kilobytes."""
    known = {**os.environ, "HF_HOME": str(folder / "hub"), **environ}
    words = ["--config_file", "c.yaml"] if (folder / "c.yaml").exists() else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "launch", "--dry-run", *words, "s.py"],
        cwd=folder,
        env={name: value for name, value in known.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, seconds, int((folder / "peak").read_text())


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "s.py").touch()
    return tmp_path


def write(path: Path, content: str | bytes | None) -> Path:
    if content is None:
        with open(path, "wb") as file:
            file.truncate(100_000_000)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_by_name(folder, name):
    content, expected = REFUSED[name]
    path = write(folder / "c.yaml", content)

    with pytest.raises(SettingError) as caught:
        config_file.read(path)

    assert expected.format(path=path) in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("name", MEASURED)
def test_a_launch_with_a_bad_file_ends_quickly_in_little_memory_and_runs_nothing(folder, name):
    content, expected = REFUSED[name]
    write(folder / "c.yaml", content)

    status, said, seconds, kilobytes = launch(folder)

    assert (status, expected.format(path="c.yaml") in said, "Traceback" in said) == (2, True, False), said
    assert not (folder / "ran").exists()
    assert (seconds < SECONDS, kilobytes < KILOBYTES) == (True, True), (seconds, kilobytes)
    assert kilobytes > 0 or not Path("/proc/self/status").exists()


@pytest.mark.parametrize("number", ["30000000", "99999999999999999999999"])
def test_a_number_that_no_run_has_is_refused_before_anything_is_counted(folder, number):
    write(folder / "c.yaml", f"distributed_type: MULTI_CPU\nnum_processes: {number}\n")

    status, said, seconds, kilobytes = launch(folder)

    assert status == 2
    assert f"num_processes={number} (from num_processes in c.yaml, line 2) is out of range." in said
    assert (seconds < SECONDS, kilobytes < KILOBYTES) == (True, True), (seconds, kilobytes)


@pytest.mark.parametrize("name", WORKS)
def test_an_odd_file_works(folder, name):
    (folder / "c.yaml").write_text(WORKS[name], encoding="utf-8")

    found = config_file.load_config_from_file(folder / "c.yaml")

    assert found.mixed_precision == ("no" if name == "no without quotes" else "bf16")


@pytest.mark.parametrize(
    "environ",
    [
        {"HOME": "/proc", "HF_HOME": None, "XDG_CACHE_HOME": None},
        {"HOME": None, "HF_HOME": None, "XDG_CACHE_HOME": None},
        {"HF_HOME": "/dev/null"},
        {"HF_HOME": "/nonexistent\nplace"},
    ],
    ids=["HOME cannot be written", "no HOME", "a file for a folder", "a line break"],
)
def test_a_launch_needs_no_home(folder, environ):
    status, said, _, _ = launch(folder, **environ)

    assert (status, "Traceback" in said) == (0, False), said


def test_a_user_that_nobody_knows_has_no_default_file(monkeypatch):
    def unknown(_self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)

    assert config_file.cache_folder({}) == Path("/nonexistent/.cache/huggingface/accelerate")


def test_an_empty_home_is_none():
    assert config_file.cache_folder({"HOME": ""}) == Path("/nonexistent/.cache/huggingface/accelerate")


def test_an_empty_name_of_a_file_is_refused():
    with pytest.raises(ValueError, match="--config_file is empty"):
        config_file.find("")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(folder):
    path = folder / "c.yaml"
    path.write_text(HEAD)
    path.chmod(0)

    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        config_text.parse(path)


def test_a_folder_is_no_file(folder):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        config_text.parse(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it is empty"),
        ('{"distributed_type": "NO", "debug": true, "debug": false}', "'debug' stands at line 1 and again at line 1."),
        (
            '{"distributed_type": "NO", "dynamo_config": {"mode": 1, "mode": 2}}',
            "'dynamo_config.mode' stands at line 1 and again at",
        ),
        ("[" * 60_000, "it is nested too deeply"),
        ('{"a": ' + "[" * 30 + "]" * 30 + "}", "it is nested too deeply, in more than 20 levels"),
        ('{"commands": [' + "1, " * 3000 + "1]}", "it holds more than 2000 values"),
        ('{"num_machines": ' + "9" * 4000 + "}", "line 1 has a number of more than 40 digits"),
        ("[1]", "it does not hold `key: value` lines"),
        ("a: 1", "Expecting value"),
    ],
)
def test_json_is_refused_alike(folder, text, expected):
    path = folder / "c.json"
    path.write_text(text)

    with pytest.raises(ValueError) as caught:
        config_text.parse(path)

    assert expected in str(caught.value)


def test_a_mark_of_an_editor_is_left_out_of_json_too(folder):
    path = folder / "c.json"
    path.write_text('\ufeff{"distributed_type": "NO"}', encoding="utf-8")

    assert config_file.read(path).config.num_processes == 1


def test_the_line_of_every_key_of_json_is_known(folder):
    path = folder / "c.json"
    path.write_text(
        '{\n\t"distributed_type": "NO", "commands": ["mode", "\\"debug\\": 1"],\n "fp8_config": {"backend": "TE"},\n'
        ' "dynamo_config": {\n\t"backend": "eager",\n  "mode": "default"\n },\n "debug": true\n}'
    )

    file = config_file.read(path)

    assert file.origin("dynamo_config.dynamo_backend") == f"dynamo_config.backend in {path}, line 5"
    assert file.origin("dynamo_config.dynamo_mode") == f"dynamo_config.mode in {path}, line 6"
    assert file.origin("debug") == f"debug in {path}, line 8"


def test_a_file_for_sagemaker_is_read_and_refused_by_the_launcher(folder):
    text = "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: DATA_PARALLEL\nec2_instance_type: p3\niam_role_name: r\n"
    (folder / "c.yaml").write_text(text)

    config = config_file.load_config_from_file(folder / "c.yaml")
    _, said, _, _ = launch(folder)

    assert isinstance(config, config_file.SageMakerConfig)
    assert (config.region, config.distributed_type.value) == ("us-east-1", "DATA_PARALLEL")
    assert (
        "compute_environment=AMAZON_SAGEMAKER (compute_environment in c.yaml, line 1) needs SageMaker support" in said
    )
