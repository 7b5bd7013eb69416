"""Windows of accumulation in one process: lengths, items, samples, several models."""

from __future__ import annotations

import copy
import gc
import math
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accelerate import Accelerator
from accelerate.data.prepare import prepare_data_loader
from accelerate.stepping.samples import batch_of
from accelerate.stepping.tally import Window
from accelerate.stepping.window import Place
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, GradScalerKwargs


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def samples(count):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def of_one_batch(model, rows):
    """Return the gradients of the mean over all rows."""
    model = copy.deepcopy(model)
    model.zero_grad()
    model(rows).square().mean().backward()
    return gradients(model)


def close(found, expected):
    return all(torch.allclose(one, other, rtol=1e-6, atol=1e-7) for one, other in zip(found, expected, strict=True))


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def prepared(**options):
    accelerator = Accelerator(cpu=True, **options)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, loader, loss=lambda model, rows: model(rows).square().mean(), **regions):
    """Return the gradients at each optimizer step."""
    found = []
    for rows in loader:
        with accelerator.accumulate(model, **regions):
            accelerator.backward(loss(model, rows))
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


# The last window of a pass ----------------------------------------------------------------------------------------------


def by_hand(model, batches, lengths):
    found, model = [], copy.deepcopy(model)
    batches = iter(batches)
    for length in lengths:
        model.zero_grad()
        for _ in range(length):
            (model(next(batches)).square().mean() / length).backward()
        found.append(gradients(model))
    return found


def test_a_short_window_is_divided_by_the_batches_it_has_bit_for_bit():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    rows = samples(14)
    loader = accelerator.prepare(DataLoader(rows, batch_size=2))
    found = train(accelerator, model, optimizer, loader)
    for one, expected in zip(found, by_hand(model, rows.split(2), [4, 3]), strict=True):
        assert equal(one, expected)


def test_a_short_window_that_no_one_foresaw_is_put_right_at_its_end():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    rows = samples(14)
    loader = accelerator.prepare(DataLoader(Stream(rows), batch_size=2))
    found = train(accelerator, model, optimizer, loader)
    full, short = by_hand(model, rows.split(2), [4, 3])
    assert equal(found[0], full)
    assert close(found[1], short)


def test_a_short_window_leaves_gradients_alone_that_were_made_beside_it_by_hand():
    """Another model, trained outside of regions while the window is open: its gradients are no part of the window."""
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    other = accelerator.prepare(network())
    loader = accelerator.prepare(DataLoader(Stream(samples(6)), batch_size=2))
    for number, rows in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean())
        if number == 0:
            accelerator.sync_gradients = True
            accelerator.backward(4 * other(rows).square().mean())
            before = gradients(other)
    assert close(gradients(model), of_one_batch(model, samples(6)))
    assert equal(gradients(other), before)


def test_a_window_of_one_batch_that_no_one_foresaw():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(Stream(samples(2)), batch_size=2))
    found = train(accelerator, model, optimizer, loader)
    assert equal(found[0], of_one_batch(model, samples(2)))


def test_windows_that_run_on_over_the_end_of_a_loader_are_full():
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    accelerator, model, optimizer = prepared(gradient_accumulation_plugin=plugin)
    rows = samples(6)
    loader = accelerator.prepare(DataLoader(rows, batch_size=1))
    found = [*train(accelerator, model, optimizer, loader), *train(accelerator, model, optimizer, loader)]
    assert len(found) == 3
    for one, expected in zip(found, by_hand(model, torch.cat([rows, rows]).split(1), [4, 4, 4]), strict=True):
        assert equal(one, expected)


def test_a_loop_that_was_broken_off_has_promised_nothing():
    """The loader said that the window would have two batches; it gets four, from another one."""
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    first, second = samples(6).split([2, 4])
    loaders = [accelerator.prepare(DataLoader(rows, batch_size=1)) for rows in (first, second)]
    for rows in loaders[0]:
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        break
    found = train(accelerator, model, optimizer, loaders[1])
    assert [close(found[0], of_one_batch(model, torch.cat([first[:1], second[:3]]))), len(found)] == [True, 2]
    assert equal(found[1], of_one_batch(model, second[3:]))


@pytest.mark.parametrize("stop", [0, 1, None])
@pytest.mark.parametrize(("steps", "size"), [(2, None), (1, 2)])
def test_an_evaluation_that_is_broken_off_inside_a_loop_leaves_its_windows_alone(stop, steps, size):
    """At its first batch, its last, or not at all; the last window of the loop is a short one."""
    data = DataLoaderConfiguration(global_batch_size=size)
    accelerator, model, optimizer = prepared(dataloader_config=data, gradient_accumulation_steps=steps)
    training = accelerator.prepare(DataLoader(samples(5), batch_size=1))
    evaluation = accelerator.prepare(DataLoader(samples(2), batch_size=1))
    ends = []
    for _ in range(2):
        for number, rows in enumerate(training):
            with accelerator.accumulate(model):
                accelerator.backward(model(rows).square().mean())
                ends.append(accelerator.sync_gradients)
                optimizer.step()
                optimizer.zero_grad()
            if number == 1:
                for place, _ in enumerate(evaluation):
                    if place == stop:
                        break
    assert ends == [False, True, False, True, True] * 2


def test_a_loop_that_was_left_at_its_last_batch_ends_no_window_afterwards():
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    for _ in accelerator.prepare(DataLoader(samples(1), batch_size=1)):
        break
    ends = []
    for rows in samples(4).split(1):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean())
            ends.append(accelerator.sync_gradients)
    assert ends == [False, True, False, True]


def test_steps_that_change_in_the_middle_of_a_window():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    rows = samples(2)
    with accelerator.accumulate(model):
        accelerator.backward(model(rows[:1]).square().mean())
    accelerator.gradient_accumulation_steps = 2
    with accelerator.accumulate(model):
        accelerator.backward(model(rows[1:]).square().mean())
    assert accelerator.sync_gradients
    assert close(gradients(model), of_one_batch(model, rows))


def test_several_losses_in_a_region_are_added_up():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    rows = samples(3)
    loader = accelerator.prepare(DataLoader(Stream(rows), batch_size=1))
    for batch in loader:
        with accelerator.accumulate(model):
            for _ in range(3):
                accelerator.backward(model(batch).square().mean() / 3)
    assert close(gradients(model), of_one_batch(model, rows))


def test_parameters_of_the_optimizer_that_are_in_no_model_belong_to_the_window():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, weight = network(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), weight], lr=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Stream(samples(2)), batch_size=1))
    for rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward(weight * model(rows).square().mean())
    assert weight.grad.item() == pytest.approx(model(samples(2)).square().mean().item())


def test_code_that_sets_the_flag_by_hand_is_left_alone():
    """As transformers' Trainer does: it knows its windows, and divides by the number of steps."""
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(samples(3), batch_size=1))
    for number, rows in enumerate(loader, start=1):
        accelerator.gradient_state._set_sync_gradients(number == 3)
        accelerator.backward(model(rows).square().mean())
    expected = [gradient * 3 / 4 for gradient in of_one_batch(model, samples(3))]
    assert close(gradients(model), expected)


def test_backward_after_a_region_divides_as_before():
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    with accelerator.accumulate(model):
        loss = model(samples(1)).square().mean()
    accelerator.backward(loss)
    assert close(gradients(model), [gradient / 4 for gradient in of_one_batch(model, samples(1))])


def test_a_region_ends_when_it_raises():
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    with pytest.raises(KeyError), accelerator.accumulate(model):
        raise KeyError
    assert accelerator._session.windows.current is None


def test_windows_set_by_hand_are_saved_with_their_gradients(tmp_path):
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    accelerator.sync_gradients = False
    accelerator.backward(model(samples(1)).square().mean())
    held = gradients(model)
    accelerator.save_state(tmp_path / "inside")
    accelerator.sync_gradients = True
    accelerator.backward(model(samples(2)[1:]).square().mean())
    whole = gradients(model)
    accelerator.save_state(tmp_path / "between")
    assert not (tmp_path / "between" / "accumulation_rank0.json").exists()
    accelerator.free_memory()

    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    accelerator.load_state(tmp_path / "inside")
    assert equal(gradients(model), held)
    accelerator.backward(model(samples(2)[1:]).square().mean())
    assert equal(gradients(model), whole)


def test_a_run_that_only_evaluates_takes_no_gradients(tmp_path):
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    with accelerator.accumulate(model):
        accelerator.backward(model(samples(1)).square().mean())
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    model = accelerator.prepare(network())
    with pytest.warns(UserWarning, match="holds more than is loaded"):
        accelerator.load_state(tmp_path)
    assert all(parameter.grad is None for parameter in model.parameters())


# Items ----------------------------------------------------------------------------------------------------------------

SIZES = (3, 1, 7, 0, 5, 2, 4)


def test_gradients_are_those_of_one_batch_of_all_items():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=4)
    parts = samples(sum(SIZES)).split(SIZES)
    loader = accelerator.prepare(DataLoader(parts, batch_size=None))
    found = []
    for number, rows in enumerate(loader):
        with accelerator.accumulate(model):
            loss = masked(model, rows)
            count = len(rows) if number % 2 else torch.tensor(len(rows))
            accelerator.backward(loss, num_items=count)
            if accelerator.sync_gradients:
                found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    assert math.isnan(masked(model, parts[3]).item())
    assert len(found) == 2
    assert close(found[0], of_one_batch(model, torch.cat(parts[:4])))
    assert close(found[1], of_one_batch(model, torch.cat(parts[4:])))


def masked(model, rows):
    """Return a mean under a mask; without items all its gradients are nan."""
    mask = torch.tensor([1.0] * len(rows) + [0.0])
    return (model(torch.cat([rows, torch.ones(1, 3)])).square().squeeze(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("given", [np.int64(4), np.array([3, 1]).sum(), np.array(4), torch.tensor(4.0), 4.0])
def test_integers_of_other_libraries_are_numbers_of_items(given):
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    parts = samples(6).split([4, 2])
    for rows, count in zip(parts, (given, 2), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean(), num_items=count)
    assert close(gradients(model), of_one_batch(model, samples(6)))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_a_batch_without_items_adds_exact_zeros_wherever_it_comes(sizes):
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    parts = samples(sum(sizes)).split(sizes)
    for rows in parts:
        with accelerator.accumulate(model):
            accelerator.backward(masked(model, rows), num_items=len(rows))
    if sum(sizes):
        assert close(gradients(model), of_one_batch(model, samples(sum(sizes))))
    else:
        assert all(not gradient.any() for gradient in gradients(model))
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_a_window_without_items_leaves_fp16_something_to_step_with():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=2)
    model, optimizer = (lambda made: accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=1.0)))(network())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(masked(model, samples(0)), num_items=0)
            optimizer.step()
    assert not optimizer.step_was_skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_as_many_items_in_all_batches_change_no_bit():
    accelerator, model, _ = prepared(gradient_accumulation_steps=3)
    for rows in samples(15).split(5):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean(), num_items=5)
    assert equal(gradients(model), by_hand(model, samples(15).split(5), [3])[0])


def test_several_forwards_in_a_region_bring_their_own_items():
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    parts = samples(11).split([2, 4, 5, 0])
    for pair in (parts[:2], parts[2:]):
        with accelerator.accumulate(model):
            for rows in pair:
                accelerator.backward(model(rows).square().mean(), num_items=len(rows))
    assert close(gradients(model), of_one_batch(model, samples(11)))


def test_without_accumulation_a_batch_is_its_own_window():
    accelerator, model, _ = prepared()
    for rows in samples(7).split([3, 4]):
        model.zero_grad()
        accelerator.backward(model(rows).square().mean(), num_items=len(rows))
        assert equal(gradients(model), of_one_batch(model, rows))


def test_without_regions_the_flag_says_where_windows_end():
    accelerator, model, _ = prepared()
    for _ in range(2):
        model.zero_grad()
        for rows, sync in zip(samples(9).split([3, 4, 2]), (False, False, True), strict=True):
            accelerator.sync_gradients = sync
            accelerator.backward(model(rows).square().mean(), num_items=len(rows))
        assert close(gradients(model), of_one_batch(model, samples(9)))


@pytest.mark.parametrize("first", [None, 3])
def test_a_window_is_counted_in_one_way(first):
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    given = [{} if count is None else {"num_items": count} for count in (first, 3 if first is None else None)]
    with accelerator.accumulate(model):
        accelerator.backward(model(samples(3)).square().mean(), **given[0])
    with (
        accelerator.accumulate(model),
        pytest.raises(ValueError, match="in a window of accumulation that began") as caught,
    ):
        accelerator.backward(model(samples(3)).square().mean(), **given[1])
    assert "Pass num_items in all of them, or in none." in str(caught.value)
    # The next window may be counted in another.
    with accelerator.accumulate(model):
        accelerator.backward(model(samples(3)).square().mean(), **given[1])


def test_a_divisor_is_known_beforehand_only_where_all_is_as_was_thought():
    window = Window()
    window.place = Place(1, 1, 4, is_last=False)
    assert window.divisor() == 4
    window.reference = 2  # gradients that were restored may be a sum over another number
    assert window.divisor() is None
    window.reference, window.place = 4, Place(0, 3, 4, is_last=True)
    assert window.divisor() is None
    window.batch = 2, 2, 1
    assert window.divisor() is None


def test_items_that_come_to_as_many_as_batches_are_still_no_batches():
    """One item in each of two batches makes the number that two batches do."""
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    with accelerator.accumulate(model):
        accelerator.backward(model(samples(1)).square().mean(), num_items=1)
    with accelerator.accumulate(model), pytest.raises(ValueError, match="Pass num_items in all of them, or in none"):
        accelerator.backward(model(samples(1)).square().mean())


def test_a_window_without_regions_is_counted_in_one_way_too():
    accelerator, model, _ = prepared()
    accelerator.sync_gradients = False
    accelerator.backward(model(samples(3)).square().mean())
    with pytest.raises(ValueError, match="began with backward.loss. without num_items"):
        accelerator.backward(model(samples(3)).square().mean(), num_items=3)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (-1, ValueError),
        (2.5, ValueError),
        (torch.tensor(0.5), ValueError),
        (torch.tensor([1, 2]), TypeError),
        (True, TypeError),
        (np.bool_(True), TypeError),
        (np.float64(2.5), ValueError),
        ("3", TypeError),
    ],
)
def test_what_is_no_number_of_items(given, error):
    accelerator, model, _ = prepared()
    with pytest.raises(error, match="num_items"):
        accelerator.backward(model(samples(3)).square().mean(), num_items=given)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scaled_gradients_are_as_large_with_items_as_without():
    """So that a loss scale that is right for one is right for the other."""
    held = []
    for items in (None, 4096):
        accelerator = Accelerator(
            cpu=True,
            mixed_precision="fp16",
            gradient_accumulation_steps=2,
            kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)],
        )
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        for number in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(samples(4)).square().mean(), num_items=items and items // (number + 1))
                held.append(max(gradient.abs().max().item() for gradient in gradients(model)))
                optimizer.step()
        accelerator.free_memory()
    assert held[0] > 1
    assert held[2:] == pytest.approx(held[:2], rel=1e-2)


# Global batches -------------------------------------------------------------------------------------------------------


def with_plan(rows, batch_size=2, accumulation=4):
    return prepare_data_loader(DataLoader(rows, batch_size=batch_size), global_batch_size=batch_size * accumulation)


def test_a_loader_with_a_global_batch_size_says_how_many_batches_a_window_has():
    accelerator, model, optimizer = prepared()
    loader = with_plan(samples(8))
    assert accelerator.gradient_accumulation_steps == 1
    seen = []
    for rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean())
            seen.append((accelerator.gradient_accumulation_steps, accelerator.sync_gradients))
    assert seen == [(4, False), (4, False), (4, False), (4, True)]
    assert accelerator.gradient_accumulation_steps == 1
    assert equal(gradients(model), by_hand(model, samples(8).split(2), [4])[0])


def test_what_was_counted_before_does_not_shorten_the_window_of_a_global_batch():
    accelerator, model, _ = prepared()
    with accelerator.accumulate(model):  # a window of one batch, in no loop
        accelerator.backward(model(samples(2)).square().mean())
    assert accelerator.step == 1
    model.zero_grad()
    seen = []
    for rows in with_plan(samples(16)):
        with accelerator.accumulate(model):
            accelerator.backward(model(rows).square().mean())
            seen.append(accelerator.sync_gradients)
            if len(seen) == 4:
                assert equal(gradients(model), by_hand(model, samples(16).split(2), [4])[0])
    assert seen == [False, False, False, True] * 2


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9, 13, 15, 16])
def test_the_last_batches_count_by_their_samples(count):
    accelerator, model, optimizer = prepared()
    found = train(accelerator, model, optimizer, with_plan(samples(count)))
    expected = [of_one_batch(model, rows) for rows in samples(count).split(8)]
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 9])
def test_without_regions_a_global_batch_of_one_batch_counts_by_its_samples(count):
    accelerator, model, optimizer = prepared()
    loader = with_plan(samples(count), accumulation=1)
    found = []
    for rows in loader:
        for part in rows[: len(rows) // 2 + 1], rows[len(rows) // 2 + 1 :]:  # two losses, of one batch
            if len(part):
                accelerator.backward(model(part).square().sum() / len(rows))
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    expected = [of_one_batch(model, rows) for rows in samples(count).split(2)]
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [3, 8, 13, 16])
def test_without_regions_the_flag_may_keep_a_global_batch(count):
    accelerator, model, optimizer = prepared()
    found = []
    for number, rows in enumerate(with_plan(samples(count)), start=1):
        accelerator.sync_gradients = number % 4 == 0 or number == -(-count // 2)
        for part in rows[:1], rows[1:]:
            accelerator.backward(model(part).square().sum() / len(rows))
        if accelerator.sync_gradients:
            found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    expected = [of_one_batch(model, rows) for rows in samples(count).split(8)]
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("items", [None, 2])
def test_a_loop_without_regions_that_would_step_in_each_batch_of_a_global_one_is_refused(items):
    accelerator, model, _ = prepared()
    for rows in with_plan(samples(19)):
        with pytest.raises(ValueError, match="outside of accumulate") as caught:
            accelerator.backward(model(rows).square().mean(), num_items=items)
        break
    assert "global_batch_size=8, of which this run takes 4 batches of 2 on each of 1 process. " in str(caught.value)
    assert "with accelerator.accumulate(model)" in str(caught.value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parts_of_a_batch_do_not_count_in_a_global_one():
    accelerator, model, _ = prepared()
    for _ in with_plan(samples(8)):
        with accelerator.accumulate(model):
            pass
        with pytest.raises(ValueError, match="accumulate.. was called twice for the same models in one batch"):
            accelerator.accumulate(model)
        break


# Several models -------------------------------------------------------------------------------------------------------


def test_sets_of_models_have_windows_of_their_own():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    first, second = accelerator.prepare(network(), network())
    seen = []
    for _ in range(6):
        for regions, options in (((first,), {}), ((second,), {"num_steps": 3}), ((second, first), {})):
            with accelerator.accumulate(*regions, **options):
                seen.append(accelerator.sync_gradients)
    assert seen[0::3] == [False, True] * 3
    assert seen[1::3] == [False, False, True] * 2
    assert seen[2::3] == [False, True] * 3
    with accelerator.accumulate(first, second):
        assert not accelerator.sync_gradients, "the order of the models does not matter"
    assert accelerator.step == 7


def test_only_gradients_of_the_windows_models_are_put_right():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    first, second = network(), network()
    one, two = (torch.optim.SGD(model.parameters(), lr=0.0) for model in (first, second))
    first, second, one, two, loader = accelerator.prepare(
        first, second, one, two, DataLoader(Stream(samples(3)), batch_size=1)
    )
    for rows in samples(1).split(1):
        with accelerator.accumulate(second, num_steps=5):
            accelerator.backward(second(rows).square().mean())
    before = gradients(second)
    found = train(accelerator, first, one, loader)
    assert close(found[0], of_one_batch(first, samples(3)))
    assert equal(gradients(second), before)


def encoder_and_head():
    torch.manual_seed(0)
    return nn.Linear(3, 3), nn.Linear(3, 1)


def both_gradients(head, encoder, rows):
    """Return the gradients of both models for one batch of all rows."""
    head, encoder = copy.deepcopy((head, encoder))
    for model in (head, encoder):
        model.zero_grad()
    head(encoder(rows)).square().mean().backward()
    return [*gradients(encoder), *gradients(head)]


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("items", [False, True])
def test_a_model_trained_by_the_same_loss_belongs_to_the_window_though_nobody_said_so(optimizers, items, tmp_path):
    """As many scripts train a text encoder beside the model they pass to `accumulate`; saved in the short last window."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    encoder, head = accelerator.prepare(*encoder_and_head())
    groups = (
        [[*encoder.parameters(), *head.parameters()]]
        if optimizers == 1
        else map(list, map(nn.Module.parameters, (encoder, head)))
    )
    stepped = [accelerator.prepare(torch.optim.SGD(group, lr=0.0)) for group in groups]
    sizes = [1, 5, 2, 8, 3, 1]
    rows = samples(sum(sizes))
    loader = accelerator.prepare(DataLoader(Stream(rows.split(sizes)), batch_size=None))
    found = []
    # After the fifth batch the loop is begun again, for load_state is called there.
    for number, batch in enumerate(chain(islice(loader, 5), loader), start=1):
        with accelerator.accumulate(encoder):
            given = {"num_items": len(batch)} if items else {}
            accelerator.backward(head(encoder(batch)).square().mean(), **given)
            if accelerator.sync_gradients:
                found.append([*gradients(encoder), *gradients(head)])
            for optimizer in stepped:
                optimizer.step()
                optimizer.zero_grad()
        if number == 5:
            held = [*gradients(encoder), *gradients(head)]
            accelerator.save_state(tmp_path)
            for model in (encoder, head):
                model.zero_grad()
            accelerator.load_state(tmp_path)
            assert equal([*gradients(encoder), *gradients(head)], held)
    if items:
        expected = [both_gradients(head, encoder, part) for part in rows.split([16, 4])]
    else:
        each = [both_gradients(head, encoder, part) for part in rows.split(sizes)]
        expected = [[sum(parts) / len(parts) for parts in zip(*window, strict=True)] for window in (each[:4], each[4:])]
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_trained_outside_of_regions_does_not_belong_to_the_window_of_one_inside():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    first, second = accelerator.prepare(network(), network())
    accelerator.prepare(*(torch.optim.SGD(model.parameters(), lr=0.0) for model in (first, second)))
    for rows in accelerator.prepare(DataLoader(Stream(samples(2)), batch_size=1)):
        accelerator.backward(second(rows).square().mean())
        with accelerator.accumulate(first):
            accelerator.backward(first(rows).square().mean())
    assert close(gradients(first), of_one_batch(first, samples(2)))
    assert close(gradients(second), [gradient / 2 for gradient in of_one_batch(second, samples(2))])


def test_a_model_that_had_windows_of_its_own_belongs_to_the_later_one_that_trains_it():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    encoder, head = accelerator.prepare(*encoder_and_head())
    accelerator.prepare(*(torch.optim.SGD(model.parameters(), lr=0.0) for model in (encoder, head)))
    with accelerator.accumulate(head, num_steps=1):
        accelerator.backward(head(samples(1)).square().mean())
    head.zero_grad()
    for rows in accelerator.prepare(DataLoader(Stream(samples(3)), batch_size=1)):
        with accelerator.accumulate(encoder):
            accelerator.backward(head(encoder(rows)).square().mean())
    assert close([*gradients(encoder), *gradients(head)], both_gradients(head, encoder, samples(3)))


def test_a_model_that_steps_later_keeps_its_gradients():
    """Both regions come first, then both steps: the window of the second must not touch what the first has got."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    first, second = accelerator.prepare(network(), network())
    for rows in accelerator.prepare(DataLoader(Stream(samples(2)), batch_size=1)):
        for model in (first, second):
            with accelerator.accumulate(model):
                accelerator.backward(model(rows).square().mean())
    assert close(gradients(first), of_one_batch(first, samples(2)))
    assert close(gradients(second), of_one_batch(second, samples(2)))


def test_one_region_at_a_time():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    first, second = accelerator.prepare(network(), network())
    with accelerator.accumulate(first):
        with pytest.raises(ValueError, match="opened inside another one") as caught, accelerator.accumulate(second):
            pass
        assert "accelerator.accumulate(first, second)" in str(caught.value)
        assert accelerator._session.windows.current is not None
    accelerator.gradient_accumulation_steps = 1
    accelerator.free_memory()
    with accelerator.accumulate(first), accelerator.accumulate(second):  # each a window of its own
        accelerator.backward((first(samples(2)) + second(samples(2))).mean())


# Several regions in a batch of the loader -------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("parts", "steps", "expected"),
    [(4, 4, [1, 1, 1]), (5, 5, [1, 1, 1]), (2, 4, [0, 1, 1]), (4, 2, [2, 2, 2]), (3, 2, [1, 2, 2]), (4, 1, [4] * 3)],
)
def test_only_the_last_region_in_the_last_batch_ends_a_window_early(streamed, parts, steps, expected):
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=steps)
    rows = samples(3 * 60)
    loader = accelerator.prepare(DataLoader(Stream(rows) if streamed else rows, batch_size=60))
    for _ in range(2):
        seen, found = [], []
        for batch in loader:
            ended = 0
            for part in batch.split(60 // parts):
                with accelerator.accumulate(model):
                    accelerator.backward(model(part).square().mean())
                    ended += accelerator.sync_gradients
                    if accelerator.sync_gradients:
                        found.append(gradients(model))
                    optimizer.step()
                    optimizer.zero_grad()
            seen.append(ended)
        assert seen == expected
        windows = rows.split(60 // parts * steps)
        assert all(close(one, of_one_batch(model, part)) for one, part in zip(found, windows, strict=True))


def test_an_only_batch_in_parts_is_told():
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(samples(4), batch_size=4))

    def parts(count):
        for _ in loader:
            for _ in range(count):
                with accelerator.accumulate(model):
                    pass

    with pytest.raises(ValueError, match="the batch before had none") as caught:
        parts(4)
    assert "GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)" in str(caught.value)


def test_a_loader_that_is_gone_is_not_taken_for_another_one():
    class Loader:
        steps_given = 1

    known = []
    for _ in range(20):  # some of them get the identity of one before
        loader = Loader()
        assert batch_of(loader) == batch_of(loader)
        assert batch_of(loader) not in known
        known.append(batch_of(loader))
        del loader


def test_a_last_batch_of_fewer_parts_is_told_when_the_next_pass_begins():
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(samples(10), batch_size=8))
    seen = []
    with pytest.warns(UserWarning, match="fewer calls of accumulate.. than the 4 of the one before") as told:
        for _ in range(2):
            for batch in loader:
                for _ in batch.split(2):
                    with accelerator.accumulate(model):
                        seen.append(accelerator.sync_gradients)
    assert seen == [False, False, False, True, False] * 1 + [False, False, True, False, False]
    assert [item.filename for item in told] == [__file__]


def test_how_many_parts_a_batch_has_survives(tmp_path):
    """What the last of two batches is in is known from the first only."""

    def regions(loader):
        for batch in loader:
            for _ in batch.split(1):
                with accelerator.accumulate(model):
                    yield accelerator.sync_gradients

    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(samples(8), batch_size=4))
    whole = regions(loader)
    assert [next(whole) for _ in range(4)] == [False, False, False, True]
    whole.close()
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    loader = accelerator.prepare(DataLoader(samples(8), batch_size=4))
    accelerator.load_state(tmp_path)
    assert list(regions(loader)) == [False, False, False, True]


def test_models_that_are_gone_take_their_windows_with_them():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    with accelerator.accumulate(model):
        pass
    del model
    gc.collect()
    with accelerator.accumulate(network()):
        assert not accelerator.sync_gradients
    gc.collect()
    with accelerator.accumulate(network()):
        assert not accelerator.sync_gradients
    assert len(accelerator._session.windows._windows) == 1


def test_the_number_of_steps_of_a_region_is_checked():
    accelerator, model, _ = prepared()
    with pytest.raises(ValueError, match=r"num_steps \(in accumulate\)=0"):
        accelerator.accumulate(model, num_steps=0)


def test_the_counter_can_be_read_and_set():
    accelerator, model, _ = prepared(gradient_accumulation_steps=4)
    accelerator.step = 2
    assert accelerator.step == 2
    with accelerator.accumulate(model):
        assert (accelerator.step, accelerator.sync_gradients) == (3, False)
    accelerator.step = 7
    with accelerator.accumulate(model):
        assert (accelerator.step, accelerator.sync_gradients) == (8, True)
    accelerator.free_memory()
    assert accelerator.step == 0


def half(scale=8.0):
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16",
        kwargs_handlers=[GradScalerKwargs(init_scale=scale, growth_interval=1)],
    )
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        nn.init.ones_(model.weight)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    return accelerator, *accelerator.prepare(*models, *optimizers)


def test_gradients_in_a_window_follow_the_loss_scale():
    """One model steps in each batch, after which the scale doubles; the other one goes on accumulating."""
    accelerator, first, second, one, two = half()
    ones = torch.ones(1, 1)
    for _ in range(3):
        with accelerator.accumulate(first):
            accelerator.backward(first(ones).sum())
            one.step()
            one.zero_grad()
        with accelerator.accumulate(second, num_steps=3):
            accelerator.backward(second(ones * 0.25).sum())
            two.step()
            if not accelerator.sync_gradients:
                assert second.weight.grad is not None
    assert accelerator.scaler.get_scale() == 64.0, "the last step has not been followed by a backward"
    assert second.weight.item() == pytest.approx(0.75, abs=1e-3), "a mean of three gradients of a quarter"
    assert first.weight.item() == -2.0


def test_unscaling_all_leaves_open_windows_scaled():
    accelerator, first, second, one, two = half()
    ones = torch.ones(1, 1)
    with accelerator.accumulate(second, num_steps=2):
        accelerator.backward(second(ones).sum())
    with accelerator.accumulate(first):
        accelerator.backward(first(ones).sum())
        accelerator.unscale_gradients()
        assert (first.weight.grad.item(), second.weight.grad.item()) == (1.0, 4.0)
        one.step()
    with accelerator.accumulate(second, num_steps=2):
        accelerator.backward(second(ones).sum())
        two.step()
    assert second.weight.item() == 0.0
