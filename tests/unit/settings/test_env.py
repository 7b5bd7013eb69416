from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.core.errors import SettingError
from accelerate.settings import env

PROBE = "ACCELERATE_TEST_PROBE"


def test_reading_returns_a_copy():
    copy = env.read()
    copy[PROBE] = "1"
    assert PROBE not in os.environ
    assert env.get(PROBE) is None
    assert env.get(PROBE, "x") == "x"


def test_applied_variables_are_restored(monkeypatch):
    monkeypatch.setenv(PROBE, "before")
    with env.applied({PROBE: "inside", PROBE + "_NEW": "1"}):
        assert os.environ[PROBE] == "inside"
        assert os.environ[PROBE + "_NEW"] == "1"
    assert os.environ[PROBE] == "before"
    assert PROBE + "_NEW" not in os.environ


def test_none_removes_a_variable_for_a_while(monkeypatch):
    monkeypatch.setenv(PROBE, "before")
    with env.applied({PROBE: None}):
        assert PROBE not in os.environ
    assert os.environ[PROBE] == "before"


def test_variables_are_restored_after_an_error():
    with pytest.raises(KeyError), env.applied({PROBE: "1"}):
        raise KeyError
    assert PROBE not in os.environ


@given(
    st.dictionaries(st.sampled_from([PROBE + "_A", PROBE + "_B", PROBE + "_C"]), st.none() | st.sampled_from(["1", ""]))
)
def test_nothing_is_left_whatever_was_applied(variables):
    with env.applied({PROBE + "_A": "outer"}):
        before = env.read()
        with env.applied(variables):
            assert all(env.get(name) == value for name, value in variables.items())
        assert env.read() == before


def test_patching_writes_upper_case_text():
    with env.patch_environment(accelerate_test_probe=3):
        assert os.environ[PROBE] == "3"
    assert PROBE not in os.environ


def test_the_environment_can_be_emptied_for_a_while():
    before = env.read()
    with pytest.raises(KeyError), env.clear_environment():
        assert env.read() == {}
        os.environ[PROBE] = "left behind"
        raise KeyError
    assert env.read() == before


def test_only_names_for_other_libraries_are_announced():
    with env.applied({"MASTER_PORT": None}):
        env.announce("MASTER_PORT", "1")
        assert os.environ["MASTER_PORT"] == "1"
    with pytest.raises(KeyError, match="ACCELERATE_TEST_PROBE is not a variable"):
        env.announce(PROBE, "1")


@pytest.mark.parametrize(("text", "truth"), [("1", True), ("yes", True), ("True", True), ("0", False), ("off", False)])
def test_flags_in_any_spelling(text, truth):
    with env.applied({PROBE: text}):
        assert env.parse_flag_from_env(PROBE) is truth
        assert env.parse_flag_from_env(PROBE, default=not truth) is truth


def test_flags_that_are_unset_or_wrong():
    assert env.parse_flag_from_env(PROBE) is False
    assert env.parse_flag_from_env(PROBE, default=True) is True
    with env.applied({PROBE: "maybe"}), pytest.raises(SettingError, match="'maybe'"):
        env.parse_flag_from_env(PROBE)


def test_choices_and_numbers():
    assert env.parse_choice_from_env(PROBE) == "no"
    assert env.get_int_from_env([PROBE, PROBE + "_B"], 7) == 7
    with env.applied({PROBE: "-1", PROBE + "_B": "3"}):
        assert env.parse_choice_from_env(PROBE) == "-1"
        assert env.get_int_from_env([PROBE, PROBE + "_B"], 7) == 3


def test_a_purged_function_leaves_our_variables_as_they_were():
    @env.purge_accelerate_environment
    def messy(fail):
        os.environ["ACCELERATE_TEST_PROBE"] = "2"
        os.environ["ACCELERATE_TEST_NEW"] = "1"
        if fail:
            raise KeyError
        return 5

    with env.applied({PROBE: "1"}):
        assert messy(fail=False) == 5
        assert env.get(PROBE) == "1"
        with pytest.raises(KeyError):
            messy(fail=True)
        assert env.get(PROBE) == "1"
    assert env.get("ACCELERATE_TEST_NEW") is None


def test_a_purged_class_has_all_methods_purged():
    @env.purge_accelerate_environment
    class Case:
        def test_it(self):
            os.environ["ACCELERATE_TEST_NEW"] = "1"
            return self

    case = Case()
    assert case.test_it() is case
    assert env.get("ACCELERATE_TEST_NEW") is None
