"""What a project and the environment say about signals and about continuing."""

from __future__ import annotations

import pytest

from accelerate import Accelerator
from accelerate.core.errors import SettingError, WrongTypeError
from accelerate.runtime import preemption
from accelerate.settings.preemption import names_of, resume_from, signals_from
from accelerate.utils import ProjectConfiguration


def project(signals=None, folder="out", automatic=True) -> ProjectConfiguration:
    return ProjectConfiguration(folder, automatic_checkpoint_naming=automatic, save_on_signals=signals)


@pytest.mark.parametrize("given", [("SIGTERM", "SIGUSR1"), ["TERM", "usr1"], "SIGTERM,SIGUSR1", "term, usr1, SIGTERM"])
def test_signals_may_be_named_in_several_ways(given):
    assert signals_from(project(given), {}) == ("SIGTERM", "SIGUSR1")


def test_the_project_beats_the_variable():
    environ = {"ACCELERATE_SAVE_ON_SIGNALS": "SIGTERM"}
    assert signals_from(project(), environ) == ("SIGTERM",)
    assert signals_from(project(("SIGUSR1",)), environ) == ("SIGUSR1",)
    assert signals_from(project(()), environ) == ()
    assert signals_from(project(), {}) == ()


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL", "SIGTREM", "15"])
def test_a_signal_that_cannot_be_used_is_refused(name):
    with pytest.raises(SettingError, match=rf"names '{name}' \(from --save_on_signals\).*\n.*'SIGTERM', 'SIGUSR1'"):
        names_of(name, "from --save_on_signals")


@pytest.mark.parametrize("given", [15, (15,), {"SIGTERM": True}])
def test_something_else_than_names_is_refused(given):
    with pytest.raises(WrongTypeError, match="from ProjectConfiguration"):
        signals_from(project(given), {})


@pytest.mark.parametrize("config", [project(("SIGTERM",), folder=None), project(("SIGTERM",), automatic=False)])
def test_without_a_place_for_checkpoints_it_is_refused_when_the_accelerator_is_made(config):
    with pytest.raises(SettingError, match="needs checkpoints that are named automatically"):
        Accelerator(cpu=True, project_config=config)
    assert preemption.current is None


def test_the_variable_without_a_place_for_checkpoints_is_refused_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_SAVE_ON_SIGNALS", "SIGTERM")
    with pytest.raises(SettingError, match="from ACCELERATE_SAVE_ON_SIGNALS"):
        Accelerator(cpu=True)


@pytest.mark.parametrize(
    ("text", "asked"), [(None, None), ("", None), ("off", None), ("auto", "auto"), ("a/folder", "a/folder")]
)
def test_what_to_continue(text, asked):
    assert resume_from({} if text is None else {"ACCELERATE_RESUME": text}) == asked
