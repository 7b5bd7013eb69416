"""What one does with prepared objects: metrics, regions, triggers, profiles, hooks, and what is not here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from accelerate import Accelerator
from accelerate.core.errors import SettingError, UnsupportedCombination
from accelerate.runtime import ops
from accelerate.runtime.accumulation import GradientState
from accelerate.session import metrics
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    ProfileKwargs,
    get_grad_scaler,
    get_mixed_precision_context_manager,
)
from tests.support.ranks import run_on_ranks

# Metrics ------------------------------------------------------------------------------------------------------------------


def test_alone_everything_is_real():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(5), batch_size=2))
    assert [accelerator.gather_for_metrics({"x": batch})["x"].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    objects = ["a", 0]
    assert accelerator.gather_for_metrics(objects) is objects


def gathered() -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator()
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(5.0), batch_size=2))
    found = {"dict": [], "objects": [], "rows": []}
    for batch in loader:
        data = accelerator.gather_for_metrics({"x": batch, "y": 2 * batch})
        found["dict"].append([data["x"].tolist(), data["y"].tolist()])
        found["objects"].append(accelerator.gather_for_metrics([str(int(item)) for item in batch]))
    found["outside"] = accelerator.gather_for_metrics(torch.tensor([float(accelerator.process_index)])).tolist()
    return found


def test_samples_added_to_even_the_last_batch_are_cut():
    for found in run_on_ranks(gathered, 2):
        assert found["dict"] == [[[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0]], [[4.0], [8.0]]]
        assert found["objects"] == [["0", "1", "2", "3"], ["4"]]
        assert found["outside"] == [0.0, 1.0]


@pytest.mark.parametrize("remainder", [-1, 0])
def test_without_a_remainder_nothing_is_cut(remainder):
    state = GradientState()
    loader = SimpleNamespaceLoader(end_of_dataloader=True, remainder=remainder)
    state._add_dataloader(loader)
    tensor = torch.arange(3)
    assert metrics.gather_for_metrics(state, tensor, False).tolist() == [0, 1, 2]


class SimpleNamespaceLoader(SimpleNamespace):
    """A loader that can be referred to weakly."""

    __hash__ = object.__hash__


# Steps ----------------------------------------------------------------------------------------------------------------------


def test_the_number_of_steps_can_be_changed():
    accelerator = Accelerator(cpu=True)
    assert accelerator.gradient_state.plugin_kwargs == {"num_steps": 1}
    accelerator.gradient_accumulation_steps = 3
    assert accelerator.gradient_accumulation_steps == accelerator.gradient_state.num_steps == 3
    assert accelerator.gradient_state.plugin_kwargs == {"num_steps": 3}
    weight = torch.nn.Parameter(torch.zeros(1))
    accelerator.backward((weight * 3).sum())
    assert weight.grad.item() == 1.0


def test_synchronisation_can_be_set_by_hand():
    accelerator = Accelerator(cpu=True)
    accelerator.sync_gradients = False
    assert not accelerator.gradient_state.sync_gradients
    assert not accelerator.sync_gradients


def test_backward_takes_torchs_keywords():
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(2))
    accelerator.backward(weight * 2, gradient=torch.tensor([1.0, 10.0]), retain_graph=True)
    assert weight.grad.tolist() == [2.0, 20.0]


def triggered() -> list:
    from accelerate import Accelerator

    accelerator = Accelerator()
    found = [accelerator.check_trigger()]
    if accelerator.is_last_process:
        accelerator.set_trigger()
    return [*found, accelerator.check_trigger(), accelerator.check_trigger()]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_flag_of_one_rank_is_seen_by_all_once(processes):
    assert run_on_ranks(triggered, processes) == [[False, True, False]] * processes


def test_a_trigger_that_a_signal_sets_while_ranks_talk_is_not_lost(monkeypatch):
    accelerator = Accelerator(cpu=True)
    reduce = ops.reduce

    def interrupted(*args, **options):
        found = reduce(*args, **options)
        accelerator.set_trigger()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ops, "reduce", interrupted)
        assert not accelerator.check_trigger()
    assert accelerator.check_trigger()
    assert not accelerator.check_trigger()


def test_uneven_inputs_alone_change_nothing():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(3), batch_size=1))
    with accelerator.join_uneven_inputs([torch.nn.Linear(1, 1)], even_batches=False):
        assert len(list(loader)) == 3


# Regions and scalers without an Accelerator ------------------------------------------------------------------------------


def test_the_historical_region():
    with pytest.raises(SettingError, match="an Accelerator creates it"):
        get_mixed_precision_context_manager(native_amp=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    x = torch.ones(1, 1)
    with get_mixed_precision_context_manager(native_amp=True):
        assert torch.mm(x, x).dtype == torch.bfloat16
    with get_mixed_precision_context_manager(native_amp=True, autocast_kwargs=AutocastKwargs(enabled=False)):
        assert torch.mm(x, x).dtype == torch.float32
    with get_mixed_precision_context_manager():
        assert torch.mm(x, x).dtype == torch.float32


def test_the_historical_scaler():
    assert get_grad_scaler(init_scale=4.0).get_scale() == 4.0
    assert get_grad_scaler("MULTI_GPU", growth_interval=3).get_growth_interval() == 3


# Profiles -------------------------------------------------------------------------------------------------------------------


def test_a_profile_is_written_where_asked(tmp_path):
    accelerator = Accelerator(cpu=True)
    with accelerator.profile(ProfileKwargs(activities=["cpu"], output_trace_dir=str(tmp_path / "traces"))) as profiler:
        torch.ones(2) + 1
    assert isinstance(profiler, torch.profiler.profile)
    assert json.loads((tmp_path / "traces" / "profile_0.json").read_text())["traceEvents"]


def test_the_handler_given_at_construction_counts(tmp_path):
    accelerator = Accelerator(cpu=True, kwargs_handlers=[ProfileKwargs(activities=["cpu"], record_shapes=True)])
    with accelerator.profile() as profiler:
        pass
    assert profiler.record_shapes


# Objects and hooks ------------------------------------------------------------------------------------------------------------


def test_objects_for_checkpoints_need_two_methods():
    accelerator = Accelerator(cpu=True)
    good = torch.nn.Linear(1, 1)
    with pytest.raises(SettingError, match="register_for_checkpointing got 5, of type int") as caught:
        accelerator.register_for_checkpointing(good, 5)
    assert "state_dict() and load_state_dict(state)" in str(caught.value)
    assert accelerator._custom_objects == []
    accelerator.register_for_checkpointing(good)
    assert accelerator._custom_objects == [good]


def test_hooks_can_be_taken_off():
    accelerator = Accelerator(cpu=True)
    save = accelerator.register_save_state_pre_hook(lambda models, weights, folder: None)
    load = accelerator.register_load_state_pre_hook(lambda models, folder: None)
    session = accelerator._session
    assert (len(session.save_hooks), len(session.load_hooks)) == (1, 1)
    save.remove()
    load.remove()
    assert (len(session.save_hooks), len(session.load_hooks)) == (0, 0)


def test_unknown_keywords_of_a_save_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"save_state\(\) got max_shard_size='1GB'"):
        Accelerator(cpu=True).save_state(tmp_path, max_shard_size="1GB")


# The façade ---------------------------------------------------------------------------------------------------------------------


def test_what_the_user_set_can_be_read_back(tmp_path):
    config = DataLoaderConfiguration(
        split_batches=True, dispatch_batches=False, use_seedable_sampler=True, non_blocking=True
    )
    accelerator = Accelerator(cpu=True, dataloader_config=config, project_dir=tmp_path, rng_types=["torch"])
    assert (accelerator.split_batches, accelerator.dispatch_batches, accelerator.even_batches) == (True, False, True)
    assert (accelerator.use_seedable_sampler, accelerator.non_blocking) == (True, True)
    assert not accelerator.use_stateful_dataloader
    assert (accelerator.project_dir, accelerator.logging_dir) == (str(tmp_path), str(tmp_path))
    assert (accelerator.save_iteration, accelerator.should_save_model) == (0, True)
    assert accelerator.rng_types == ["torch"]
    accelerator.even_batches = False
    assert config.even_batches is False


def test_the_place_of_a_single_process():
    accelerator = Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (1, 0, 0)
    assert (accelerator.is_main_process, accelerator.is_local_main_process, accelerator.is_last_process) == (
        True,
        True,
        True,
    )
    assert (accelerator.use_distributed, accelerator.multi_device) == (False, False)
    assert str(accelerator.distributed_type) == "DistributedType.NO"
    assert accelerator.on_main_process(lambda: 1)() == 1
    assert accelerator.on_last_process(lambda: 2)() == 2
    assert accelerator.on_local_main_process(lambda: 3)() == 3
    assert accelerator.on_process(lambda: 4, process_index=1)() is None
    assert accelerator.on_local_process(lambda: 5, local_process_index=0)() == 5


def test_engines_that_are_missing_say_so():
    accelerator = Accelerator(cpu=True)
    for call in (
        lambda: accelerator.pipeline_parallel_rank,
        lambda: accelerator.context_parallel_rank,
        lambda: accelerator.lomo_backward(torch.ones(1), 0.1),
        lambda: accelerator.deepspeed_ulysses_dl_adapter(None, None),
    ):
        with pytest.raises(UnsupportedCombination, match="which accelerate 2.0 does not have yet"):
            call()
    for name in ("tensor_parallel_rank", "data_parallel_rank", "data_parallel_shard_rank"):
        with pytest.raises(RuntimeError, match="no parallelism_config was given"):
            getattr(accelerator, name)
    assert (accelerator.deepspeed_plugin, accelerator.parallelism_config, accelerator.torch_device_mesh) == (
        None,
        None,
        None,
    )
    assert (accelerator.is_fsdp2, accelerator.is_composable_parallelism_enabled) == (False, False)
    with accelerator.maybe_context_parallel(buffers=[]):
        pass


def test_without_trackers_logging_does_nothing():
    accelerator = Accelerator(cpu=True)
    accelerator.init_trackers("run", config={"a": 1})
    accelerator.log({"loss": 1.0}, step=1)
    with pytest.raises(SettingError, match="There is no tracker 'wandb'"):
        accelerator.get_tracker("wandb")
    accelerator.end_training()
