"""Loggers that know ranks."""

from __future__ import annotations

import inspect
import logging

import pytest

from accelerate import PartialState
from accelerate.collectives import SingleProcess
from accelerate.runtime import state
from accelerate.runtime.log import get_logger
from accelerate.settings import env
from accelerate.topology import Process
from tests.support.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def levels():
    root = logging.root.level
    yield
    logging.root.setLevel(root)


@pytest.fixture
def logger(caplog):
    caplog.set_level(logging.DEBUG)
    return get_logger("tests.log")


def as_rank(rank, world_size, monkeypatch):
    PartialState()
    from dataclasses import replace

    runtime = replace(state.current(), process=Process(rank=rank, world_size=world_size), collectives=SingleProcess())
    monkeypatch.setitem(state.SHARED, "_runtime", runtime)


def texts(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tests.log"]


def test_a_message_carries_the_rank(logger, caplog):
    PartialState()
    logger.info("loaded %d rows", 3)
    assert texts(caplog) == ["[RANK 0] loaded 3 rows"]


def test_other_ranks_log_when_told_to(logger, caplog, monkeypatch):
    as_rank(1, 2, monkeypatch)
    logger.info("a")
    logger.info("b", main_process_only=False)
    logger.info("c", main_process_only=False, in_order=True)
    logger.info("d", main_process_only=True, in_order=True)
    assert texts(caplog) == ["[RANK 1] b", "[RANK 1] c"]


def test_a_message_before_ranks_are_known_is_refused(logger):
    with pytest.raises(RuntimeError, match=r"Create an Accelerator\(\) or a PartialState\(\)"):
        logger.info("too early")


def test_levels_are_respected(logger, caplog):
    PartialState()
    caplog.set_level(logging.WARNING)
    logger.info("hidden")
    logger.info("hidden too", main_process_only=False, in_order=True)
    logger.warning("shown")
    assert texts(caplog) == ["[RANK 0] shown"]


def test_every_method_finds_the_callers_line(logger, caplog):
    PartialState()
    line = inspect.currentframe().f_lineno + 1
    logger.info("a")
    logger.warning("b")
    logger.info("c", main_process_only=False, in_order=True)
    assert [(record.filename, record.lineno) for record in caplog.records if record.name == "tests.log"] == [
        ("test_log.py", line),
        ("test_log.py", line + 1),
        ("test_log.py", line + 2),
    ]


def test_a_warning_is_logged_once(logger, caplog):
    PartialState()
    for _ in range(3):
        logger.warning_once("only %s", "once")
        logger.warning_once("other")
    assert texts(caplog) == ["[RANK 0] only once", "[RANK 0] other"]


def test_the_level_comes_from_the_argument_or_the_environment(caplog):
    PartialState()
    assert get_logger("tests.log.a", log_level="DEBUG").logger.level == logging.DEBUG
    with env.applied({"ACCELERATE_LOG_LEVEL": "error"}):
        assert get_logger("tests.log.b").logger.level == logging.ERROR
        assert get_logger("tests.log.c", log_level="info").logger.level == logging.INFO
    assert get_logger("tests.log.d").logger.level == logging.NOTSET


def test_a_level_that_is_not_known_is_refused_with_its_source():
    with env.applied({"ACCELERATE_LOG_LEVEL": "foo"}):
        with pytest.raises(
            ValueError, match=r"ACCELERATE_LOG_LEVEL='foo' is not known \(from the environment\)\.\nAccepted: .*INFO"
        ):
            get_logger("tests.log.d")
        with pytest.raises(ValueError, match=r"log_level='loud' is not known \(the argument\)"):
            get_logger("tests.log.d", log_level="loud")


def log_three() -> str:
    import io
    import logging

    from accelerate import PartialState
    from accelerate.logging import get_logger

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.root.handlers = [handler]
    PartialState()
    logger = get_logger("ranks", log_level="INFO")
    logger.info("a")
    logger.info("b", main_process_only=False)
    logger.info("c", main_process_only=False, in_order=True)
    return stream.getvalue()


def test_two_ranks_log_as_in_the_peer():
    assert run_on_ranks(log_three, 2) == ["[RANK 0] a\n[RANK 0] b\n[RANK 0] c\n", "[RANK 1] b\n[RANK 1] c\n"]
