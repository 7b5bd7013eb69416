"""The arguments of `prepare`, sorted and checked before anything is touched."""

from __future__ import annotations

import pytest
import torch

from accelerate.core.errors import SettingError
from accelerate.parallel import steps
from accelerate.parallel.base import Strategy
from accelerate.parallel.choose import choose
from accelerate.parallel.ddp import DataParallel, verify_device_map
from accelerate.parallel.job import check_belonging, sort
from accelerate.parallel.plan import ParallelPlan
from accelerate.precision import FullPrecision
from accelerate.runtime import state
from accelerate.settings.settings import Settings
from accelerate.stepping.optimizer import AcceleratedOptimizer
from accelerate.stepping.scheduler import AcceleratedScheduler
from accelerate.topology import Process


def linear():
    return torch.nn.Linear(1, 1)


def sgd(*models):
    return torch.optim.SGD([parameter for model in models for parameter in model.parameters()], lr=0.1)


# Sorting ----------------------------------------------------------------------------------------------------------------


def test_objects_are_sorted_by_kind_and_come_back_in_order():
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    loader = torch.utils.data.DataLoader([1])
    other = {"anything": "else"}
    given = [scheduler, other, loader, model, plateau, optimizer]
    job = sort(given, None, True)
    assert [slot.given for slot in job.models] == [model]
    assert [slot.given for slot in job.optimizers] == [optimizer]
    assert [slot.given for slot in job.loaders] == [loader]
    assert [slot.given for slot in job.schedulers] == [scheduler, plateau]
    assert all(a is b for a, b in zip(job.in_order(), given, strict=True))
    assert sort([other], None, True).in_order() is other


def test_wrappers_of_ours_are_known_too():
    optimizer = AcceleratedOptimizer(sgd(linear()))
    scheduler = AcceleratedScheduler(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1), optimizer)
    job = sort([optimizer, scheduler], None, True)
    assert (len(job.optimizers), len(job.schedulers)) == (1, 1)


def test_nothing_to_prepare():
    with pytest.raises(IndexError, match="without anything to prepare"):
        sort([], None, True)


def test_each_object_has_its_placement():
    job = sort([linear(), linear(), linear()], [True, None, False], False)
    assert [slot.place for slot in job.slots] == [True, False, False]


@pytest.mark.parametrize("placement", [[], [True], [True, True, True]])
def test_as_many_placements_as_objects(placement):
    with pytest.raises(SettingError, match=rf"device_placement has {len(placement)} entries for 2 objects") as caught:
        sort([linear(), linear()], placement, True)
    assert "one entry for each object" in str(caught.value)


def test_what_was_prepared_before_is_not_fresh():
    model, other = linear(), linear()
    model._is_accelerate_prepared = True
    job = sort([model, other], None, True)
    assert [slot.given for slot in job.fresh(job.models)] == [other]


# Belonging --------------------------------------------------------------------------------------------------------------


def check(*objects, **earlier):
    check_belonging(sort(objects, None, True, **earlier))


def test_an_optimizer_of_another_model_is_refused():
    model, copy = linear(), linear()
    with pytest.raises(SettingError) as caught:
        check(model, sgd(copy))
    text = str(caught.value)
    assert "the optimizer SGD, which holds no parameter of any prepared model" in text
    assert "the model Linear with parameters of the same shapes, which no optimizer holds" in text
    assert "Make the optimizer after the last line that makes, copies or replaces the model" in text


def test_what_belongs_together_passes():
    model, second = linear(), linear()
    check(model, sgd(model))
    check(model, second, sgd(model), sgd(second))
    check(model, second, sgd(model, second))


def test_what_may_be_meant_passes():
    model, other = linear(), linear()
    check(sgd(other))  # an optimizer alone
    check(model)  # a model alone
    frozen = linear().requires_grad_(False)
    check(frozen, sgd(other))  # a frozen model beside the optimizer of something else
    check(model, sgd(model), sgd(other))  # each model has its optimizer; one more optimizer
    check(model, sgd(other), earlier_optimizers=[AcceleratedOptimizer(sgd(model))])
    check(linear(), sgd(model), earlier_models=[model])


def test_a_model_for_evaluation_needs_no_optimizer():
    job = sort([linear(), sgd(linear())], None, True)
    job.models[0].evaluation_only = True
    check_belonging(job)


# Strategies -------------------------------------------------------------------------------------------------------------


def plan(world_size):
    from dataclasses import replace

    runtime = replace(state.current_or_single(), process=Process(world_size=world_size))
    return ParallelPlan(settings=Settings(), runtime=runtime, precision=FullPrecision())


def test_one_process_trains_plainly_and_several_in_data_parallel():
    assert type(choose(plan(1))) is Strategy
    assert type(choose(plan(2))) is DataParallel


def test_the_order_of_the_recipes():
    assert Strategy(plan(1)).steps() == (
        steps.place_models,
        steps.wrap_precision,
        steps.compile_models,
        steps.wrap_optimizers,
        steps.shard_loaders,
        steps.wrap_schedulers,
    )
    strategy = DataParallel(plan(2))
    assert [step.__name__ for step in strategy.steps()] == [
        "place_models",
        "wrap_precision",
        "wrap_models",
        "compile_models",
        "wrap_optimizers",
        "shard_loaders",
        "wrap_schedulers",
    ]


def test_regions_of_a_single_process_do_nothing():
    strategy = Strategy(plan(1))
    model = linear()
    with strategy.no_sync([model]), strategy.join([model]):
        strategy.check_first_backward([model])


def test_a_scheduler_finds_the_optimizer_it_was_made_for():
    first, second = AcceleratedOptimizer(sgd(linear())), AcceleratedOptimizer(sgd(linear()))
    scheduler = torch.optim.lr_scheduler.StepLR(second.optimizer, 1)
    job = sort([scheduler], None, True, earlier_optimizers=[first, second])
    steps.wrap_schedulers(plan(1), job)
    assert job.schedulers[0].result.optimizers == [second]
    foreign = torch.optim.lr_scheduler.StepLR(sgd(linear()), 1)
    job = sort([foreign], None, True, earlier_optimizers=[first, second])
    steps.wrap_schedulers(plan(1), job)
    assert job.schedulers[0].result.optimizers == [first, second]


def test_a_model_with_a_device_map_stays_where_it_is(monkeypatch):
    model = linear()
    model.hf_device_map = {"": "cpu"}
    monkeypatch.setattr(model, "to", lambda device: pytest.fail("moved"))
    job = sort([model], None, True)
    steps.place_models(plan(1), job)
    assert job.models[0].result is model


def test_a_model_spread_over_devices():
    model = torch.nn.Sequential(linear())
    assert not verify_device_map(model)
    model[0].hf_device_map = {"": 0}
    assert not verify_device_map(model)
    model[0].hf_device_map = {"a": 0, "b": 1}
    assert verify_device_map(model)
    from accelerate.settings import env

    job = sort([model], None, True)
    with pytest.raises(SettingError, match="Sequential was loaded with a device_map over several devices") as caught:
        DataParallel(plan(2)).check(job)
    assert "--num_processes 1" in str(caught.value)
    with env.applied({"ACCELERATE_BYPASS_DEVICE_MAP": "true"}):
        DataParallel(plan(2)).check(job)
    Strategy(plan(1)).check(job)
