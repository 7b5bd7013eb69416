"""Option classes: defaults, what is passed on, and values taken from the environment."""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta

import pytest
import torch

from accelerate.core.enums import DDPCommunicationHookType, DynamoBackend
from accelerate.core.errors import SettingError, UnsupportedCombination
from accelerate.settings import env
from accelerate.settings.bag import KwargsHandler
from accelerate.settings.options import absent
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


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            GradientAccumulationPlugin,
            "GradientAccumulationPlugin(num_steps=None, adjust_scheduler=True, sync_with_dataloader=True, "
            "sync_each_batch=False)",
        ),
        (
            lambda: InitProcessGroupKwargs(backend="gloo"),
            "InitProcessGroupKwargs(backend='gloo', init_method=None, timeout=datetime.timedelta(seconds=1800))",
        ),
        (
            DistributedDataParallelKwargs,
            "DistributedDataParallelKwargs(dim=0, broadcast_buffers=True, bucket_cap_mb=25, "
            "find_unused_parameters=False, check_reduction=False, gradient_as_bucket_view=False, static_graph=False, "
            "comm_hook=<DDPCommunicationHookType.NO: 'no'>, comm_wrapper=<DDPCommunicationHookType.NO: 'no'>, "
            "comm_state_option={})",
        ),
        (
            TorchDynamoPlugin,
            "TorchDynamoPlugin(backend=<DynamoBackend.NO: 'NO'>, mode='default', fullgraph=False, dynamic=None, "
            "options=None, disable=False, use_regional_compilation=False)",
        ),
        (
            ProfileKwargs,
            "ProfileKwargs(activities=None, schedule_option=None, on_trace_ready=None, record_shapes=False, "
            "profile_memory=False, with_stack=False, with_flops=False, with_modules=False, output_trace_dir=None)",
        ),
        (
            GradScalerKwargs,
            "GradScalerKwargs(init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, "
            "enabled=True)",
        ),
    ],
)
def test_objects_print_as_in_the_peer(made, text):
    assert repr(made()) == text


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (InitProcessGroupKwargs(), {}),
        (DistributedDataParallelKwargs(find_unused_parameters=True), {"find_unused_parameters": True}),
        (AutocastKwargs(), {}),
        (AutocastKwargs(enabled=False, outputs_to_fp32=False), {"enabled": False, "outputs_to_fp32": False}),
        (GradScalerKwargs(init_scale=8.0, growth_interval=2000), {"init_scale": 8.0}),
        (GradientAccumulationPlugin(num_steps=2), {"num_steps": 2}),
        (GradientAccumulationPlugin(num_steps=2, sync_each_batch=True), {"num_steps": 2, "sync_each_batch": True}),
        (TorchDynamoPlugin(backend="inductor"), {"backend": "inductor"}),
        (TorchDynamoPlugin(backend="eager", mode="default", fullgraph=False), {"backend": "eager"}),
        (
            TorchDynamoPlugin(backend="eager", mode="max-autotune", fullgraph=True, dynamic=False, disable=True),
            {"backend": "eager", "mode": "max-autotune", "fullgraph": True, "dynamic": False, "disable": True},
        ),
        (InitProcessGroupKwargs(backend="gloo"), {"backend": "gloo"}),
        (InitProcessGroupKwargs(timeout=timedelta(seconds=5)), {"timeout": timedelta(seconds=5)}),
    ],
)
def test_only_what_differs_from_the_defaults_is_passed_on(options, kwargs):
    assert options.to_kwargs() == kwargs


def test_what_is_passed_on_is_a_copy():
    options = DistributedDataParallelKwargs(comm_state_option={"rank": 1})
    options.to_kwargs()["comm_state_option"]["rank"] = 2
    options.to_dict(ignore_keys=())["comm_state_option"]["rank"] = 2
    assert options.comm_state_option == {"rank": 1}


def test_regional_compilation_is_ours_and_not_torchs():
    assert TorchDynamoPlugin(backend="eager", use_regional_compilation=True).to_kwargs() == {"backend": "eager"}
    assert TorchDynamoPlugin(backend="eager").to_dict()["backend"] == "eager"


def test_wrong_keywords_are_refused():
    with pytest.raises(TypeError):
        DataLoaderConfiguration(bad=1)


@pytest.mark.parametrize(("backend", "seconds"), [("nccl", 600), ("gloo", 1800)])
def test_the_default_timeout_is_torchs(backend, seconds):
    assert InitProcessGroupKwargs(backend=backend).timeout == timedelta(seconds=seconds)


def test_every_option_is_documented_where_it_is_written():
    """The text under a field is its documentation; none may be without."""
    import ast
    import inspect

    for kind in (
        AutocastKwargs,
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
        DataLoaderConfiguration,
        ProjectConfiguration,
        GradientAccumulationPlugin,
        TorchDynamoPlugin,
    ):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        documented = {
            node.target.id
            for node, after in zip(body, body[1:], strict=False)
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
        }
        assert documented == {item.name for item in fields(kind)}, kind


# The compiler's variables ------------------------------------------------------------------------------------------


def test_compile_options_come_from_the_launchers_variables():
    with env.applied(
        {
            "ACCELERATE_DYNAMO_BACKEND": "EAGER",
            "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
            "ACCELERATE_DYNAMO_USE_DYNAMIC": "0",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "1",
        }
    ):
        found = TorchDynamoPlugin()
        assert found.backend is DynamoBackend.EAGER
        assert (found.mode, found.fullgraph, found.dynamic) == ("reduce-overhead", True, False)
        assert found.use_regional_compilation is True
        told = TorchDynamoPlugin(backend="inductor", mode="default", fullgraph=False, dynamic=True)
        assert (told.backend, told.mode, told.fullgraph, told.dynamic) == (
            DynamoBackend.INDUCTOR,
            "default",
            False,
            True,
        )


def test_a_wrong_back_end_in_the_environment_is_blamed_on_it():
    with env.applied({"ACCELERATE_DYNAMO_BACKEND": "zz"}), pytest.raises(SettingError) as caught:
        TorchDynamoPlugin()
    assert "dynamo backend 'zz' is not known (from ACCELERATE_DYNAMO_BACKEND)." in str(caught.value)
    assert "Pass backend='inductor'" in str(caught.value)


# Hooks of DDP --------------------------------------------------------------------------------------------------------


class Registering:
    def __init__(self):
        self.calls = []

    def register_comm_hook(self, state, hook):
        self.calls.append((state, hook))


def test_no_hook_is_registered_by_default():
    model = Registering()
    DistributedDataParallelKwargs().register_comm_hook(model)
    assert model.calls == []


@pytest.mark.parametrize(
    ("kind", "name"), [("FP16", "fp16_compress_hook"), ("BF16", "bf16_compress_hook"), ("POWER_SGD", "powerSGD_hook")]
)
def test_the_named_hook_is_registered(kind, name):
    model = Registering()
    hook_type = DDPCommunicationHookType[kind]
    DistributedDataParallelKwargs(
        comm_hook=hook_type, comm_state_option={"matrix_approximation_rank": 2} if kind == "POWER_SGD" else {}
    ).register_comm_hook(model)
    ((state, hook),) = model.calls
    assert hook.__name__ == name
    assert (state.matrix_approximation_rank == 2) if kind == "POWER_SGD" else (state is None)


def test_a_wrapper_alone_wraps_the_plain_reduction():
    model = Registering()
    DistributedDataParallelKwargs(comm_wrapper=DDPCommunicationHookType.BF16).register_comm_hook(model)
    ((_, hook),) = model.calls
    assert "bf16_compress_wrapper" in hook.__qualname__


# The profiler --------------------------------------------------------------------------------------------------------


def test_a_profiler_is_built_with_the_options():
    profiler = ProfileKwargs(
        activities=["cpu"], record_shapes=True, schedule_option={"wait": 1, "warmup": 1, "active": 2}
    ).build()
    assert isinstance(profiler, torch.profiler.profile)
    assert profiler.record_shapes is True
    assert profiler.activities == {torch.profiler.ProfilerActivity.CPU}
    assert profiler.schedule(0) is torch.profiler.ProfilerAction.NONE
    assert profiler.schedule(2) is torch.profiler.ProfilerAction.RECORD


def test_an_unknown_activity_is_refused():
    with pytest.raises(SettingError, match=r"activities=\['gpu'\]\) is not known") as caught:
        ProfileKwargs(activities=["cpu", "gpu"]).build()
    assert "'cuda'" in str(caught.value)


# Folders ---------------------------------------------------------------------------------------------------------------


def test_logs_lie_in_the_project_unless_told_otherwise():
    assert ProjectConfiguration("a").logging_dir == "a"
    assert ProjectConfiguration("a", logging_dir="b").logging_dir == "b"
    config = ProjectConfiguration()
    config.set_directories("c")
    assert (config.project_dir, config.logging_dir) == ("c", "c")
    config.set_directories("d")
    assert (config.project_dir, config.logging_dir) == ("d", "c")


# Engines that are not here -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", absent._Absent.__subclasses__())
def test_an_option_class_without_engine_says_so(kind):
    with pytest.raises(UnsupportedCombination) as caught:
        kind(some="option")
    assert str(caught.value).startswith(f"{kind.__name__} needs {kind.engine}, which accelerate 2.0 does not have yet.")


def test_a_handler_of_ones_own_works_the_same_way():
    from dataclasses import dataclass, field

    @dataclass
    class Own(KwargsHandler):
        a: int = 0
        b: bool = False
        c: list = field(default_factory=list)
        d: float = 3.0

    assert Own(a=2, c=[1]).to_kwargs() == {"a": 2, "c": [1]}
    assert Own().to_dict() == {"a": 0, "b": False, "c": [], "d": 3.0}


def test_an_option_without_effect_says_so():
    with pytest.warns(
        UserWarning, match="changes nothing: prepared schedulers count optimizer steps with either"
    ) as seen:
        GradientAccumulationPlugin(num_steps=2, adjust_scheduler=False)
    assert "step_scheduler_with_optimizer=False" in str(seen[0].message)
    assert seen[0].filename == __file__
