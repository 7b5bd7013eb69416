"""Between us and torch's agent: what it is given."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher import api

from accelerate.core.errors import LaunchError, SettingError
from accelerate.core.last_words import LAUNCHER_VARIABLE
from accelerate.core.leaving import NOTE_VARIABLE
from accelerate.launch import elastic, loopback
from accelerate.launch.plan import LaunchPlan, Rendezvous
from accelerate.launch.report import WorkersFailed
from accelerate.settings import env

NAME = "TORCHELASTIC_SIGNALS_TO_HANDLE"


def test_the_variable_for_signals_is_set_for_torch_and_put_back(monkeypatch):
    monkeypatch.setenv(NAME, "SIGUSR1")
    found = []
    monkeypatch.setattr(
        elastic, "elastic_launch", lambda config, entry: lambda *words: found.append((words, os.environ.get(NAME)))
    )
    plan = LaunchPlan(kind="elastic", argv=(), env={})

    elastic.start(plan, "program", ("x",), elastic.launch_config(plan))

    assert found == [(("x",), "SIGTERM,SIGINT,SIGHUP,SIGQUIT")]
    assert os.environ[NAME] == "SIGUSR1"


def test_workers_alone_are_marked_as_the_runs(monkeypatch):
    found = []

    def launch(config, entry):
        workers = {0: {"RANK": "0"}}
        config.logs_specs.reify(workers)
        return lambda *words: found.append((env.read(), workers[0]))

    monkeypatch.setattr(elastic, "elastic_launch", launch)
    plan = LaunchPlan(kind="elastic", argv=(), env={})

    elastic.start(plan, "program", (), elastic.launch_config(plan))

    [(own, worker)] = found
    assert {NOTE_VARIABLE, LAUNCHER_VARIABLE} <= worker.keys()
    assert not {NOTE_VARIABLE, LAUNCHER_VARIABLE} & own.keys(), "what else this process starts is not the run's"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_signal_that_nohup_has_set_off_stays_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config = elastic.launch_config(LaunchPlan(kind="elastic", argv=(), env={}))
    finally:
        signal.signal(signal.SIGHUP, before)

    assert config.signals_to_handle == "SIGTERM,SIGINT,SIGQUIT"


def test_a_port_that_was_taken_after_all_is_named():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        plan = LaunchPlan(kind="elastic", argv=("true",), env={}, rendezvous=Rendezvous(endpoint=endpoint))

        with pytest.raises(LaunchError, match=f"could not meet at {endpoint}") as caught:
            elastic.run(plan)

    assert "no other program listens there" in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        (LaunchPlan(kind="elastic", argv=(), env={}), loopback.BACKEND),
        (
            LaunchPlan(
                kind="elastic", argv=(), env={}, nodes=2, rendezvous=Rendezvous("c10d", "a:1", {"is_host": "1"})
            ),
            "accelerate-c10d",
        ),
        (
            LaunchPlan(kind="elastic", argv=(), env={}, nodes=2, rendezvous=Rendezvous("static", "a:1")),
            "accelerate-static",
        ),
    ],
)
def test_the_ways_to_meet_that_a_plan_names_are_ours(plan, backend):
    assert elastic.launch_config(plan).rdzv_backend == backend


def test_the_store_of_one_machine_listens_to_it_alone():
    meeting = loopback.OneMachine(0, "run")

    first, again = meeting.next_rendezvous(), meeting.next_rendezvous()

    port = first.bootstrap_store_info.master_port
    listening = [
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]
    first.store.set("key", "value")
    assert not again.store.check(["key"]), "an attempt sees nothing of the one before"


@pytest.mark.parametrize(("options", "seconds"), [({}, 600), ({"timeout": "30"}, "30")])
def test_machines_wait_for_each_other_for_ten_minutes(options, seconds):
    meeting = Rendezvous("static", "a:29500", options)

    config = elastic.launch_config(LaunchPlan(kind="elastic", argv=(), env={}, nodes=2, rendezvous=meeting))

    assert config.rdzv_configs["timeout"] == seconds


@pytest.mark.parametrize(
    ("text", "flag", "seconds"), [(None, None, 30), ("", None, 30), ("2", None, 2), ("2", 7, 7), ("x", 7, 7)]
)
def test_the_grace_is_the_flags_then_that_of_torchs_variable(monkeypatch, text, flag, seconds):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", text)
    plan = LaunchPlan(kind="elastic", argv=(), env={}, grace_seconds=flag)
    config = elastic.launch_config(plan)

    with elastic._watched(plan, config, Path("unused")) as run:
        pass

    assert run.grace_seconds == seconds
    assert getattr(config, "shutdown_timeout", seconds) == seconds


@pytest.mark.parametrize("text", ["soon", "-3", "1.5"])
def test_a_variable_for_the_grace_that_is_no_number_is_named(monkeypatch, text):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", text)

    with pytest.raises(
        SettingError, match=f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT='{text}' in the environment cannot be read"
    ):
        elastic.launch_config(LaunchPlan(kind="elastic", argv=(), env={}))


def test_machines_that_lose_each_other_are_not_told_that_they_could_not_meet(monkeypatch):
    def launch(config, entry):
        def run(*words):
            api.LocalElasticAgent.run_.pids = {0: 1}
            raise RendezvousConnectionError("nobody has answered for 30 s\nframe #0")

        return run

    monkeypatch.setattr(elastic, "elastic_launch", launch)
    plan = LaunchPlan(kind="elastic", argv=(), env={}, nodes=2, rendezvous=Rendezvous("c10d", "node-a:29500"))

    with pytest.raises(WorkersFailed) as caught:
        elastic.start(plan, "program", (), elastic.launch_config(plan))

    assert str(caught.value) == (
        "accelerate: the machines have lost each other at node-a:29500, and the workers here were ended: "
        "nobody has answered for 30 s"
    )
    assert caught.value.status == 1
