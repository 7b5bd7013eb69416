from __future__ import annotations

import pytest

from accelerate.core import errors
from accelerate.core.errors import explain, nearest


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SettingError, ValueError),
        (errors.WrongTypeError, TypeError),
        (errors.UnsupportedCombination, ValueError),
        (errors.UnsupportedCombination, NotImplementedError),
        (errors.MissingPackage, ImportError),
        (errors.NotStarted, AttributeError),
        (errors.CheckpointError, RuntimeError),
        (errors.LaunchError, RuntimeError),
        (errors.DistributedOperationException, Exception),
    ],
)
def test_each_error_is_ours_and_the_builtin_callers_expect(kind, builtin):
    assert issubclass(kind, errors.AccelerateError)
    with pytest.raises(builtin, match="text"):
        raise kind("text")


def test_the_parts_of_a_message_stand_in_order():
    text = explain("x=3 is wrong (from X).", accepted=(1, "two"), remedy="Pass 1.")
    assert text == "x=3 is wrong (from X).\nAccepted: 1, 'two'.\nPass 1."


def test_a_message_may_lack_parts():
    assert explain("Only this.") == "Only this."
    assert explain("This.", accepted="anything else") == "This.\nAccepted: anything else."
    assert explain("This.", remedy="Do that.") == "This.\nDo that."


@pytest.mark.parametrize(
    ("word", "candidates", "meant"),
    [
        ("bf61", ["bf16", "fp8"], "bf16"),
        ("zzzzzz", ["bf16", "fp8"], None),
        ("num_gpus", ["gpu_ids", "num_processes"], None),
        # as it was written, whatever the spelling
        ("BF61", ["bf16"], "bf16"),
        ("--tpu_confg", ["tpu-config"], "tpu-config"),
        ("--port", ["main_process_port"], "main_process_port"),
        ("num-proc", ["num_processes"], "num_processes"),
        # one that begins with the word, then one that has it as a part, then one that looks alike
        ("port", ["main_port", "port_range"], "port_range"),
        ("numpro", ["num_machines", "num_processes"], "num_processes"),
        ("debug", ["debgu", "debug_mode"], "debug_mode"),
        ("debug", ["debgu", "no_debug"], "no_debug"),
        ("cess", ["main_process_port"], None),
        ("num", ["num_processes", "num_machines"], "num_processes"),
        ("n", ["num_processes"], None),
    ],
)
def test_the_nearest_word_is_offered(word, candidates, meant):
    assert nearest(word, candidates) == (f" Did you mean {meant!r}?" if meant else "")
