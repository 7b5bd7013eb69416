"""Keywords and environment become settings; what contradicts or is not accepted is refused in four parts."""

from __future__ import annotations

import inspect
import warnings

import pytest

from accelerate import Accelerator
from accelerate.core.enums import DynamoBackend, PrecisionType, RNGType
from accelerate.core.errors import AccelerateError, SettingError, UnsupportedCombination, WrongTypeError
from accelerate.settings.arguments import resolve
from accelerate.settings.options.accumulation import GradientAccumulationPlugin
from accelerate.settings.options.compile import TorchDynamoPlugin
from accelerate.settings.options.data import DataLoaderConfiguration
from accelerate.settings.options.handlers import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from accelerate.settings.options.project import ProjectConfiguration

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Accelerator.__init__).parameters.items()
    if name != "self"
}


def settings(environ=None, **given):
    return resolve({**DEFAULTS, **given}, environ or {})


def refusal(kind, environ=None, **given) -> str:
    with pytest.raises(AccelerateError) as caught:
        settings(environ, **given)
    assert type(caught.value) is kind
    return str(caught.value)


# What is said nothing about -------------------------------------------------------------------------------------


def test_defaults():
    found = settings()
    assert found.mixed_precision is None
    assert (found.cpu, found.device_placement, found.step_scheduler_with_optimizer) == (False, True, True)
    assert found.accumulation == GradientAccumulationPlugin(num_steps=1)
    assert found.data == DataLoaderConfiguration()
    assert found.compile.backend is DynamoBackend.NO
    assert found.rng_types == (RNGType.GENERATOR,)
    assert found.origin == {}


def test_plain_arguments_are_kept():
    found = settings(cpu=True, device_placement=False, step_scheduler_with_optimizer=False)
    assert (found.cpu, found.device_placement, found.step_scheduler_with_optimizer) == (True, False, False)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        settings().cpu = True


# Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["bf16", "BF16", PrecisionType.BF16])
def test_a_precision_is_named_in_any_way(value):
    assert settings(mixed_precision=value).mixed_precision is PrecisionType.BF16


def test_the_variable_names_the_precision_where_no_argument_does():
    environ = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    found = settings(environ)
    assert found.mixed_precision is PrecisionType.FP16
    assert found.origin == {"mixed_precision": "from ACCELERATE_MIXED_PRECISION"}
    found = settings(environ, mixed_precision="no")
    assert found.mixed_precision is PrecisionType.NO
    assert found.origin == {"mixed_precision": "from the argument mixed_precision"}


def test_a_wrong_precision():
    text = refusal(SettingError, mixed_precision="fp32")
    assert "mixed_precision='fp32' is not a precision (from the argument mixed_precision)." in text
    assert "Accepted: 'no', 'fp8', 'fp16', 'bf16'." in text
    assert text.endswith("For plain float32 pass mixed_precision='no'.")


def test_a_wrong_precision_in_the_environment():
    text = refusal(SettingError, {"ACCELERATE_MIXED_PRECISION": "half"})
    assert "mixed_precision='half' is not a precision (from ACCELERATE_MIXED_PRECISION)." in text
    assert text.endswith("or unset the variable.")


# Accumulation ---------------------------------------------------------------------------------------------------


def test_steps_come_from_the_argument_a_plugin_or_the_environment():
    assert settings(gradient_accumulation_steps=3).accumulation.num_steps == 3
    plugin = GradientAccumulationPlugin(num_steps=4)
    assert settings(gradient_accumulation_plugin=plugin).accumulation is plugin
    assert settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "5"}).accumulation.num_steps == 5


def test_the_launchers_steps_win_over_the_argument_and_say_so():
    with pytest.warns(UserWarning, match=r"gradient_accumulation_steps=2 .* gives way to 5 .*ACCELERATE_GRADIENT"):
        found = settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "5"}, gradient_accumulation_steps=2)
    assert found.accumulation.num_steps == 5


def test_equal_steps_are_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, gradient_accumulation_steps=2)


def test_a_plugin_wins_over_the_environment():
    plugin = GradientAccumulationPlugin(num_steps=4)
    found = settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "5"}, gradient_accumulation_plugin=plugin)
    assert found.accumulation.num_steps == 4


def test_steps_and_a_plugin():
    text = refusal(
        SettingError,
        gradient_accumulation_steps=2,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3),
    )
    assert (
        "gradient_accumulation_steps=2 and gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3" in text
    )
    assert "Accepted: one of the two." in text
    assert "Pass only GradientAccumulationPlugin(num_steps=2, ...)." in text


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "two", None])
def test_a_wrong_number_of_steps(value):
    text = refusal(SettingError, gradient_accumulation_steps=value)
    assert f"gradient_accumulation_steps={value!r} is not a number of batches." in text
    assert "Accepted: an integer >= 1." in text
    assert "Pass 1 for none." in text


def test_a_wrong_number_of_steps_in_the_environment():
    text = refusal(SettingError, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"})
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment='auto' is not" in text


@pytest.mark.parametrize("value", [0, -3, 1.5, "2"])
def test_a_plugin_checks_its_steps(value):
    with pytest.raises(SettingError, match=r"num_steps=.* is not a number of batches") as caught:
        GradientAccumulationPlugin(num_steps=value)
    assert repr(value) in str(caught.value)
    assert "Pass num_steps=1" in str(caught.value)


# Data -----------------------------------------------------------------------------------------------------------


def test_split_batches_is_the_same_as_in_the_configuration():
    assert settings(split_batches=True).data == DataLoaderConfiguration(split_batches=True)
    config = DataLoaderConfiguration(split_batches=True)
    assert settings(split_batches=True, dataloader_config=config).data is config


def test_split_batches_twice_and_not_alike():
    text = refusal(SettingError, split_batches=False, dataloader_config=DataLoaderConfiguration(split_batches=True))
    assert (
        "split_batches=False (argument of Accelerator) contradicts split_batches=True (in dataloader_config)." in text
    )
    assert "Set it in DataLoaderConfiguration only." in text


# Project --------------------------------------------------------------------------------------------------------


def test_the_projects_folder(tmp_path):
    found = settings(project_dir=tmp_path).project
    assert (found.project_dir, found.logging_dir) == (str(tmp_path), str(tmp_path))
    config = ProjectConfiguration(logging_dir="logs")
    found = settings(project_dir="runs", project_config=config).project
    assert found is config
    assert (found.project_dir, found.logging_dir) == ("runs", "logs")
    assert settings(project_config=ProjectConfiguration("runs"), project_dir="runs").project.project_dir == "runs"


def test_two_folders():
    text = refusal(SettingError, project_dir="a", project_config=ProjectConfiguration(project_dir="b"))
    assert "project_dir='a' (argument of Accelerator) contradicts project_dir='b' (in project_config)." in text
    assert "Set it in ProjectConfiguration only." in text


@pytest.mark.parametrize("limit", [0, -3, "2", 2.0, True])
def test_a_limit_that_keeps_no_checkpoint_is_refused(limit):
    with pytest.raises(SettingError, match=r"ProjectConfiguration\(total_limit=[^*]*an integer >= 1, or None"):
        ProjectConfiguration(total_limit=limit)


@pytest.mark.parametrize("limit", [None, 1, 100])
def test_a_limit_for_checkpoints(limit):
    assert ProjectConfiguration(total_limit=limit).total_limit == limit


# Compilation ----------------------------------------------------------------------------------------------------


def test_a_back_end_is_named_in_any_letter_case():
    assert settings(dynamo_backend="inductor").compile.backend is DynamoBackend.INDUCTOR
    plugin = TorchDynamoPlugin(backend="EAGER")
    assert settings(dynamo_plugin=plugin).compile is plugin


def test_a_back_end_and_a_plugin():
    text = refusal(SettingError, dynamo_backend="eager", dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    assert "dynamo_backend='eager' and dynamo_plugin=TorchDynamoPlugin(" in text
    assert "Accepted: one of the two." in text
    assert "Pass only TorchDynamoPlugin(backend=...)." in text


def test_an_unknown_back_end():
    text = refusal(SettingError, dynamo_backend="zz")
    assert "dynamo backend 'zz' is not known (from TorchDynamoPlugin)." in text
    assert "'inductor'" in text


# Handlers -------------------------------------------------------------------------------------------------------


def test_each_handler_finds_its_place():
    given = [
        AutocastKwargs(),
        DistributedDataParallelKwargs(),
        GradScalerKwargs(),
        InitProcessGroupKwargs(),
        ProfileKwargs(),
    ]
    found = settings(kwargs_handlers=list(reversed(given))).handlers
    assert [found.autocast, found.ddp, found.scaler, found.init, found.profile] == given
    assert all(
        a is b for a, b in zip([found.autocast, found.ddp, found.scaler, found.init, found.profile], given, strict=True)
    )


def test_a_handler_of_a_subclass_counts_as_its_class():
    class Own(AutocastKwargs):
        pass

    assert isinstance(settings(kwargs_handlers=[Own()]).handlers.autocast, Own)


def test_two_handlers_of_one_class():
    text = refusal(SettingError, kwargs_handlers=[GradScalerKwargs(init_scale=1.0), GradScalerKwargs(init_scale=2.0)])
    assert "kwargs_handlers contains two GradScalerKwargs: GradScalerKwargs(init_scale=1.0" in text
    assert "Accepted: at most one GradScalerKwargs." in text
    assert "Put all options into one GradScalerKwargs." in text


def test_a_handler_of_another_class():
    text = refusal(WrongTypeError, kwargs_handlers=[GradientAccumulationPlugin()])
    assert "of type GradientAccumulationPlugin" in text
    assert "'AutocastKwargs', 'DistributedDataParallelKwargs'" in text
    assert "Other options have arguments of their own." in text


# Random generators ----------------------------------------------------------------------------------------------


def test_generators_are_named_by_value_member_or_one_word():
    assert settings(rng_types=["torch", RNGType.GENERATOR]).rng_types == (RNGType.TORCH, RNGType.GENERATOR)
    assert settings(rng_types="torch").rng_types == (RNGType.TORCH,)
    assert settings(rng_types=[]).rng_types == ()


def test_an_unknown_generator():
    text = refusal(SettingError, rng_types=["torch", "zz"])
    assert "rng_types=['torch', 'zz'] contains 'zz'" in text
    assert "argument of Accelerator" in text
    assert "'generator'" in text


# Types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gradient_accumulation_plugin", "GradientAccumulationPlugin"),
        ("dataloader_config", "DataLoaderConfiguration"),
        ("project_config", "ProjectConfiguration"),
        ("dynamo_plugin", "TorchDynamoPlugin"),
    ],
)
def test_an_option_object_of_a_wrong_type(name, kind):
    text = refusal(WrongTypeError, **{name: {"some": "dict"}})
    assert f"{name}={{'some': 'dict'}} has type dict." in text
    assert f"Accepted: an instance of {kind}." in text
    assert f"Pass {name}={kind}(...)." in text


# Engines that are not here --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("deepspeed_plugin", "DeepSpeed"),
        ("deepspeed_plugins", "DeepSpeed"),
        ("fsdp_plugin", "FSDP"),
        ("torch_tp_plugin", "tensor-parallel"),
        ("megatron_lm_plugin", "Megatron-LM"),
        ("parallelism_config", "device meshes"),
        ("log_with", "experiment trackers"),
    ],
)
def test_an_argument_whose_engine_is_missing(name, engine):
    text = refusal(UnsupportedCombination, **{name: "thing"})
    assert f"{name}='thing' (an argument of Accelerator) needs" in text
    assert engine in text
    assert "Accepted: one process, or data parallelism" in text
    assert "Leave the setting out" in text


def test_no_trackers_is_fine():
    settings(log_with=[])


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_MEGATRON_LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ],
)
def test_a_variable_whose_engine_is_missing(name):
    text = refusal(UnsupportedCombination, {name: "true"})
    assert f"{name}=true (in the environment) needs" in text
    settings({name: "false"})
    settings({name: ""})
