"""Where workers print, from the flags to the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import LogsSpecs, Std

from accelerate.core.errors import SettingError
from accelerate.launch import agent, elastic
from accelerate.launch.logs import Logs
from accelerate.launch.machine import Machine
from accelerate.launch.plan import plan
from accelerate.launch.request import LaunchRequest


def configured(**flags: Any) -> Any:
    request = LaunchRequest.merge({"cpu": True, "num_processes": 2, **flags}, None, {}, script="train.py")
    return elastic.launch_config(plan(request, Machine("python", cores=2)))


@pytest.mark.parametrize(
    ("flags", "in_files", "on_terminal"),
    [
        ({}, {}, {0: "oe", 1: "oe"}),
        ({"log_dir": "logs"}, {0: "oe", 1: "oe"}, {0: "oe", 1: "oe"}),
        ({"log_dir": "logs", "tee": "0"}, {}, {0: "oe", 1: "oe"}),
        ({"log_dir": "logs", "tee": "2"}, {0: "e", 1: "e"}, {0: "oe", 1: "oe"}),
        ({"log_dir": "logs", "redirects": "3"}, {0: "oe", 1: "oe"}, {}),
        ({"log_dir": "logs", "redirects": "0:0,1:3"}, {1: "oe"}, {0: "oe"}),
        ({"log_dir": "logs", "redirects": "3", "tee": "1"}, {0: "oe", 1: "oe"}, {0: "o", 1: "o"}),
        ({"log_dir": "logs", "redirects": "3", "tee": "0"}, {0: "oe", 1: "oe"}, {}),
        ({"local_ranks_filter": "1"}, {}, {1: "oe"}),
        ({"log_dir": "logs", "local_ranks_filter": "0"}, {0: "oe", 1: "oe"}, {0: "oe"}),
    ],
)
def test_flags_decide_what_files_and_what_the_terminal_gets(tmp_path, monkeypatch, flags, in_files, on_terminal):
    monkeypatch.chdir(tmp_path)
    logs = configured(**flags).logs_specs
    assert isinstance(logs, Logs)

    found = logs.placed(tmp_path / "notes").reify({rank: {"RANK": str(rank)} for rank in range(2)})
    logs.finish()

    files, terminal = {}, {}
    for rank in range(2):
        paths = {"o": ("stdout", found.stdouts[rank]), "e": ("stderr", found.stderrs[rank])}
        kept = {letter for letter, (_, path) in paths.items() if path not in ("", os.devnull)}
        shown = {letter for letter, (name, path) in paths.items() if not path or name in logs.streams[rank].shown}
        assert all(Path(paths[letter][1]).is_relative_to("logs") for letter in kept)
        files |= {rank: "".join(sorted(kept, reverse=True))} if kept else {}
        terminal |= {rank: "".join(sorted(shown, reverse=True))} if shown else {}
    assert (files, terminal) == (in_files, on_terminal)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"redirects": "3"}, "redirects=3 (from --redirects) takes the workers' output from the terminal, and no folder"),
        ({"tee": "9"}, "tee='9' (from --tee) names no streams.\nAccepted: 0 for none, 1 for standard output"),
        ({"redirects": "0:3;1:3", "log_dir": "a"}, "redirects='0:3;1:3' (from --redirects) names no streams."),
        ({"duplicate_stdout_filters": "loss"}, "duplicate_stdout_filters=loss (from --duplicate_stdout_filters) chooses"),
        ({"duplicate_stdout_filters": "loss", "tee": "3"}, "Pass --log_dir FOLDER too, and --tee 1 or 3"),
        ({"duplicate_stdout_filters": "loss", "tee": "2", "log_dir": "a"}, "stdout is not kept"),
        ({"duplicate_stderr_filters": "loss", "redirects": "0:1", "log_dir": "a"}, "stderr is not kept"),
    ],
)  # fmt: skip
def test_output_that_would_be_lost_is_refused_before_torch_is_loaded(flags, expected):
    with pytest.raises(SettingError) as caught:
        LaunchRequest.merge(flags, None, {}, script="train.py")

    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"tee": "2:3"}, "tee=2:3 (from --tee) names worker 2, and this machine has 2.\nAccepted: 0 to 1"),
        (
            {"redirects": "0:3,2:3,3:1", "log_dir": "a"},
            "redirects=0:3,2:3,3:1 (from --redirects) names worker 2, 3, and",
        ),
        ({"local_ranks_filter": "1,5"}, "local_ranks_filter=1,5 (from --local_ranks_filter) names worker 5, and"),
    ],
)
def test_workers_that_a_machine_does_not_have_are_refused(flags, expected):
    far = {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "a"}

    for several in ({}, far):
        with pytest.raises(SettingError) as caught:
            configured(**several, **flags)
        assert expected in str(caught.value)


def test_lines_are_chosen_of_files_that_some_worker_writes():
    flags = {"log_dir": "a", "redirects": "1:3", "duplicate_stderr_filters": "loss"}

    assert LaunchRequest.merge(flags, None, {}, script="train.py").duplicate_stderr_filters == "loss"


class Elsewhere(LogsSpecs):
    """Rules for logs as a package may register them."""

    def reify(self, envs: Any) -> Any:
        raise NotImplementedError

    @property
    def root_log_dir(self) -> str:
        return self._root_log_dir or ""


class Narrow(Elsewhere):
    """The same, of a package that knows only folders."""

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__(log_dir)


def test_a_class_of_logs_gets_what_torchrun_gives_it(monkeypatch):
    monkeypatch.setattr(agent, "_logs_class", lambda name: {"theirs": Elsewhere}[name])

    config = configured(
        logs_specs="theirs",
        log_dir="a",
        tee="3",
        redirects="1:2",
        local_ranks_filter="0",
        duplicate_stdout_filters="x,y",
    )

    logs = config.logs_specs
    assert (logs._root_log_dir, logs._tee, logs._redirects, logs._local_ranks_filter) == (
        "a",
        Std.ALL,
        {1: Std.ERR},
        {0},
    )
    assert config.duplicate_stdout_filters == ["x", "y"]


def test_a_class_of_logs_that_cannot_take_what_was_asked_is_refused(monkeypatch):
    monkeypatch.setattr(agent, "_logs_class", lambda name: Narrow)

    with pytest.raises(SettingError, match="logs_specs='narrow' .from --logs_specs. does not take what torchrun gives"):
        configured(logs_specs="narrow", tee="3")
