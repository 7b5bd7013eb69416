"""Variables of the environment: which are known, which are refused, and which were meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import accelerate
from accelerate.launch.request import FIELD_OF
from accelerate.settings import origins, variables


def test_what_turns_an_engine_off_is_fine():
    off = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_FP8_BACKEND": "NO", "FSDP_OFFLOAD_PARAMS": "0"}

    variables.refuse_absent({**off, "PARALLELISM_CONFIG_TP_SIZE": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"})


def test_the_list_holds_every_name_that_the_code_uses():
    root = Path(accelerate.__file__).parent
    used = {
        name
        for file in root.rglob("*.py")
        if file.name != "variables.py"
        for name in re.findall(r'"(ACCELERATE_[A-Z0-9_]*[A-Z0-9])"', file.read_text(encoding="utf-8"))
    }

    assert used - variables.KNOWN == set()
    assert set(variables.OBEYED) - used == set(), "a variable on the list that nobody reads"


def test_every_variable_of_a_launch_is_on_the_list():
    assert {name for name in FIELD_OF if name.startswith("ACCELERATE_")} <= set(variables.OBEYED)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ACCELERATE_MIXED_PRECISON", "ACCELERATE_MIXED_PRECISION"),
        ("ACCELERATE_USE_CPUS", "ACCELERATE_USE_CPU"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        ("ACELERATE_USE_CPU", "ACCELERATE_USE_CPU"),
        ("ACCELARATE_MIXED_PRECISION", "ACCELERATE_MIXED_PRECISION"),
        ("ACCELERATED_DEBUG_MODE", "ACCELERATE_DEBUG_MODE"),
        ("ACCELERATOR_TYPE", None),
        ("TORCH_DEVICE", None),
        ("ACCELERATE_CONFIG_FILE", None),
        ("ACCELERATE_KT_MODE", None),
        ("ACCELERATE_FP8_BACKEND", None),
        ("ACCELERATE_DEEPSPEED_ON", None),
        ("MY_ACCELERATE_MIXED_PRECISION", None),
        ("ACCELERATE_MY_OWN", None),
        ("accelerate_mixed_precision", None),
    ],
)
def test_a_misspelt_variable_is_told_with_the_one_that_was_meant(name, meant):
    assert variables.misspelt({name: "1", "ACCELERATE_USE_CPU": "1"}) == ({name: meant} if meant else {})


def test_a_launch_tells_of_every_other_variable_that_begins_like_ours():
    names = [
        "ACCELERATE_NUM_MACHINES", "ACCELERATE_ENABLE_FOO", "ACCELERATE_USE_CPUS", "ACCELERATE_USE_CPU",
        "ACCELERATE_KT_MODE", "ACCELERATE_FP8_BACKEND", "ACCELERATE_SETTINGS", "ACCELERATOR_TYPE", "TORCH_DEVICE",
    ]  # fmt: skip

    assert variables.about_unknown(dict.fromkeys(names, "1"), ["num_machines", "cpu"]) == [
        "the variable ACCELERATE_NUM_MACHINES has no effect: num_machines has none. Pass --num_machines.",
        "the variable ACCELERATE_ENABLE_FOO has no effect: accelerate does not know it.",
    ]


def test_a_remark_names_the_flag_as_long_as_the_value_is_the_launchers():
    text = origins.pack({"ACCELERATE_MIXED_PRECISION": ("bf16", "from --mixed_precision", None)}, ["told"])
    environ = {"ACCELERATE_SETTINGS": text, "ACCELERATE_MIXED_PRECISION": "bf16"}

    assert origins.origin(environ, "ACCELERATE_MIXED_PRECISION") == "from --mixed_precision, given to the launcher"
    environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
    assert origins.origin(environ, "ACCELERATE_MIXED_PRECISION") == "from ACCELERATE_MIXED_PRECISION"
    assert origins.origin({}, "ACCELERATE_DEBUG_MODE") == "from ACCELERATE_DEBUG_MODE"
    assert origins.was_told(environ, "told")
    assert not origins.was_told({}, "told")


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"schema":2,"origins":{}}', '{"schema":1,"origins":[1]}'])
def test_a_remark_that_cannot_be_read_says_nothing(text):
    environ = {"ACCELERATE_SETTINGS": text, "ACCELERATE_USE_CPU": "1"}

    assert origins.origin(environ, "ACCELERATE_USE_CPU") == "from ACCELERATE_USE_CPU"
    assert not origins.was_told(environ, "x")
    assert origins.before_launch(environ) == {origins.VARIABLE: None}
