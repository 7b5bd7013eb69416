"""Between us and torch's agent: what it is given, and what is made of its failures."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from accelerate.core.errors import LaunchError
from accelerate.launch import elastic
from accelerate.launch.plan import LaunchPlan, Rendezvous


@pytest.mark.parametrize(("config", "seen"), [(SimpleNamespace(), None), (SimpleNamespace(signals_to_handle="X"), "X")])
def test_a_torch_without_the_field_for_signals_starts_too(monkeypatch, config, seen):
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    monkeypatch.setenv(name, "SIGUSR1")
    found = []
    monkeypatch.setattr(
        elastic, "elastic_launch", lambda config, entry: lambda *words: found.append((words, os.environ.get(name)))
    )

    elastic.start(LaunchPlan(kind="elastic", argv=(), env={}), "program", ("x",), config)

    assert found == [(("x",), seen)]
    assert os.environ[name] == "SIGUSR1"


def test_a_port_that_was_taken_after_all_is_named():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        plan = LaunchPlan(kind="elastic", argv=("true",), env={}, rendezvous=Rendezvous("static", endpoint))

        with pytest.raises(LaunchError, match=f"could not meet at {endpoint}") as caught:
            elastic.run(plan)

    assert "no other program listens there" in str(caught.value)


def note(folder: Path, local_rank: int, text: str, time: float) -> Path:
    """Write what torch's handler writes for an exception."""
    file = folder / "attempt_0" / str(local_rank) / "error.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"message": {"message": text, "extraInfo": {"py_callstack": f"Traceback\n{text}", "timestamp": "1"}}}
    file.write_text(json.dumps(data))
    os.utime(file, (time, time))
    return file


LOST = "RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("notes", "order"),
    [
        ({4: LOST, 5: "ValueError: boom"}, [5, 4]),
        ({4: "KeyError: 1", 5: "ValueError: boom"}, [4, 5]),
        ({4: LOST, 5: LOST, 6: "ValueError: boom"}, [6, 4, 5]),
    ],
)
def test_a_rank_that_only_noted_its_exception_can_be_the_cause(tmp_path, notes, order):
    files = {rank: note(tmp_path, rank - 4, text, 1000.0 + rank) for rank, text in notes.items()}
    # The agent saw rank 4 of this second machine fail, and nobody else.
    error = ChildFailedError("script", {4: ProcessFailure(0, 77, 1, str(files[4]))})

    found = elastic._in_order(error)

    assert [failure.rank for failure in found] == order
    assert {failure.rank: failure.pid for failure in found} == {rank: 77 if rank == 4 else None for rank in notes}
    assert found[0].traceback.endswith(notes[order[0]])


def test_a_rank_ended_on_its_way_out_is_the_cause_and_a_half_written_note_is_none(tmp_path):
    lost, cause = note(tmp_path, 0, LOST, 1000.0), note(tmp_path, 1, "ValueError: boom", 1001.0)
    note(tmp_path, 2, "", 1.0).write_text('{"mess')
    error = ChildFailedError(
        "script",
        {0: ProcessFailure(0, 77, 1, str(lost)), 1: ProcessFailure(1, 78, -signal.SIGTERM, str(cause))},
    )

    found = elastic._in_order(error)

    assert [(failure.rank, failure.pid, failure.exitcode) for failure in found] == [(1, 78, 1), (0, 77, 1)]
