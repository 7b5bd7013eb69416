"""`AcceleratorState`, and several Accelerators in one process."""

from __future__ import annotations

import pytest
import torch

from accelerate import Accelerator, PartialState
from accelerate.core.enums import DynamoBackend
from accelerate.core.errors import NotStarted, SettingError, UnsupportedCombination
from accelerate.session.state import AcceleratorState
from accelerate.settings import env


def test_an_accelerator_creates_it():
    assert AcceleratorState._shared_state == {}
    with pytest.raises(SettingError, match="an Accelerator creates it") as caught:
        AcceleratorState()
    assert "accelerator = Accelerator()" in str(caught.value)
    accelerator = Accelerator(cpu=True)
    assert AcceleratorState().__dict__ is accelerator.state.__dict__ is AcceleratorState._shared_state
    assert AcceleratorState().initialized


def test_it_shows_the_process_and_the_run():
    state = Accelerator(cpu=True, mixed_precision="bf16").state
    assert (state.device, state.num_processes, state.process_index) == (torch.device("cpu"), 1, 0)
    assert (state.is_main_process, state.is_local_main_process, state.is_last_process) == (True, True, True)
    assert (state.use_distributed, state.fork_launched, state.is_fsdp2) == (False, False, False)
    assert state.mixed_precision == "bf16"
    assert state.dynamo_plugin.backend is DynamoBackend.NO
    assert (state.deepspeed_plugin, state.deepspeed_plugins, state.parallelism_config) == (None, None, None)
    assert repr(state).endswith("Device: cpu\n\nMixed precision type: bf16\n")
    with pytest.raises(AttributeError, match="no attribute 'fsdp_plugin'"):
        state.fsdp_plugin  # noqa: B018


def test_it_acts_as_the_process_state_does(capsys):
    state = Accelerator(cpu=True).state
    state.wait_for_everyone()
    state.print("hi")
    assert capsys.readouterr().out == "hi\n"
    with state.split_between_processes([1, 2]) as share, state.main_process_first(), state.local_main_process_first():
        assert share == [1, 2]
    state.destroy_process_group()


def test_a_further_accelerator_shares_it():
    first = Accelerator(cpu=True, mixed_precision="bf16")
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert Accelerator().mixed_precision == "bf16"
    assert Accelerator().state.__dict__ is first.state.__dict__


def test_a_further_accelerator_of_another_precision_is_refused():
    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(SettingError) as caught:
        Accelerator(mixed_precision="no")
    assert "mixed_precision='no' contradicts 'bf16'" in str(caught.value)
    assert "Accepted: 'bf16', or no mixed_precision." in str(caught.value)
    assert "with Accelerator(...) as accelerator" in str(caught.value)


def test_a_variable_that_has_changed_asks_again():
    with env.applied({"ACCELERATE_MIXED_PRECISION": "bf16"}):
        Accelerator(cpu=True)
    assert Accelerator().mixed_precision == "bf16", "nobody asks for another one"
    with (
        env.applied({"ACCELERATE_MIXED_PRECISION": "no"}),
        pytest.raises(SettingError, match=r"'no' \(from ACCELERATE_MIXED_PRECISION\) contradicts 'bf16'"),
    ):
        Accelerator()


def test_a_variable_that_an_argument_has_overruled_stays_so():
    with env.applied({"ACCELERATE_MIXED_PRECISION": "no"}):
        Accelerator(cpu=True, mixed_precision="bf16")
        assert Accelerator().mixed_precision == "bf16"


def test_the_cpu_cannot_be_chosen_after_another_device():
    with env.applied({"ACCELERATE_TORCH_DEVICE": "meta"}):
        Accelerator()
    with pytest.raises(SettingError, match="cpu=True contradicts meta") as caught:
        Accelerator(cpu=True)
    assert "ACCELERATE_USE_CPU=true" in str(caught.value)


def test_after_a_reset_attributes_say_so():
    state = Accelerator(cpu=True).state
    AcceleratorState._reset_state()
    assert AcceleratorState._shared_state == {}
    assert PartialState._shared_state != {}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState._shared_state == {}
    with pytest.raises(NotStarted, match="AcceleratorState has no 'device': it was reset"):
        state.device  # noqa: B018


def test_engines_that_are_missing_say_so():
    state = Accelerator(cpu=True).state
    for call in (lambda: state.get_deepspeed_plugin("x"), lambda: state.select_deepspeed_plugin("x")):
        with pytest.raises(UnsupportedCombination, match="needs the DeepSpeed engine"):
            call()
    for name in ("deepspeed_plugin", "fsdp_plugin", "torch_tp_plugin", "megatron_lm_plugin", "parallelism_config"):
        with pytest.raises(UnsupportedCombination, match=rf"{name}='x' \(an argument of AcceleratorState\) needs"):
            AcceleratorState(**{name: "x"})


def test_options_of_the_group_after_it_was_joined_are_ignored_with_a_word():
    from tests.support.ranks import run_on_ranks

    assert run_on_ranks(late_options, 2) == ["InitProcessGroupKwargs(backend='gloo') comes too late"] * 2


def late_options() -> str:
    import warnings

    from accelerate.utils import InitProcessGroupKwargs

    PartialState()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    return str(caught[0].message).partition(":")[0]
