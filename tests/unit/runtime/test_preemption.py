"""One process that waits for signals: its handlers, and what it does at a place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from torch.distributed import TCPStore

from accelerate import Accelerator
from accelerate.collectives.crossing import Crossing
from accelerate.core.errors import CheckpointError, SettingError
from accelerate.runtime import preemption, state
from accelerate.utils import Preempted, ProjectConfiguration

BOTH = ("SIGTERM", "SIGUSR1")


class Left(Exception):
    pass


def leave(reason: str) -> None:
    raise Left(reason)


@pytest.fixture
def start():
    def begin(leave=leave) -> preemption.Watch:
        preemption.start(BOTH, state.start(state.ProcessSettings(cpu=True)), leave, lambda: True)
        assert preemption.current is not None
        return preemption.current

    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)]
    yield begin
    preemption.stop()
    for name, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
        signal.signal(name, handler)


def test_it_stops_at_the_first_place_after_a_signal(start):
    watch = start()
    watch.reach()
    os.kill(os.getpid(), signal.SIGUSR1)
    watch.end()
    with pytest.raises(Left, match="^rank 0 received SIGUSR1$"):
        watch.reach()


def test_a_signal_while_it_saves_is_ignored_with_a_word(start, capfd):
    def save(reason: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        watch.reach()  # a loop over a prepared loader in a hook of the save
        raise Left

    watch = start(save)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Left):
        watch.reach()
    assert capfd.readouterr().err == "accelerate: SIGTERM again: rank 0 is saving already.\n"


def test_after_a_save_that_failed_signals_have_their_usual_effect(start):
    def fail(reason: str) -> None:
        raise CheckpointError("no space left")

    before = signal.getsignal(signal.SIGTERM)
    watch = start(fail)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(CheckpointError, match="no space left"):
        watch.reach()
    assert preemption.current is None
    assert signal.getsignal(signal.SIGTERM) == before
    watch.reach()  # a loop that goes on holds it still


def test_a_store_that_is_gone_does_not_end_the_run(start):
    code = "import sys, torch.distributed as dist; s = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"
    command = [sys.executable, "-c", f"{code}; print(s.port, flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        crossing = Crossing(TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False), "test", 0, 2)
        keeper.kill()
    watch = start()
    watch._crossing = crossing
    os.kill(os.getpid(), signal.SIGTERM)
    watch.end()
    with pytest.warns(RuntimeWarning, match="Rank 0 cannot ask the others to save the run.* does not answer"):
        watch.reach()
    assert preemption.current is None


def test_what_an_earlier_run_left_does_not_have_the_save_refused(tmp_path):
    for name in ("checkpoint_0", "checkpoint_9", "checkpoint_10"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",))
    accelerator = Accelerator(cpu=True, project_config=project)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        accelerator.check_preemption()
    assert left.value.folder == tmp_path / "checkpoints" / "checkpoint_11"
    assert left.value.code == 75


def test_handlers_are_put_back(start):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    start()
    assert signal.getsignal(signal.SIGUSR1) not in (before, signal.SIG_IGN)
    preemption.stop()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    assert preemption.current is None


def test_a_handler_that_was_set_later_stays(start):
    start()
    later = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGUSR1, later)
    preemption.stop()
    assert signal.getsignal(signal.SIGUSR1) is later


def test_a_handler_that_was_there_is_called_too(start):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    watch = start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    with pytest.raises(Left):
        watch.reach()


def test_a_forked_copy_is_ended_by_the_signal(start):
    start()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_second_one_is_refused(start):
    start()
    with pytest.raises(SettingError, match="second Accelerator"):
        start()


def test_elsewhere_than_in_the_main_thread_it_is_refused(start):
    raised = []

    def run() -> None:
        try:
            start()
        except SettingError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread only" in raised[0]
    assert preemption.current is None
