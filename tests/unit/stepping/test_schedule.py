"""How long schedules are, and which of them do not fit the steps of the run."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from accelerate.scheduler import AcceleratedScheduler
from accelerate.stepping.schedule import Pass, end_of, fits_taken_steps, length_of, pass_over, steps_taken
from tests.support.ranks import run_on_ranks


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)


def decay(step, *, num_warmup_steps, num_training_steps):
    return 1.0


def in_turn(*stages, at):
    return lambda given: schedules.SequentialLR(given, [stage(given) for stage in stages], milestones=[at])


SCHEDULES = {
    "one cycle": (lambda given: schedules.OneCycleLR(given, 1.0, total_steps=40), 40, 40),
    "cosine": (lambda given: schedules.CosineAnnealingLR(given, T_max=40), 40, 40),
    "linear": (lambda given: schedules.LinearLR(given, total_iters=40), 40, None),
    "polynomial": (lambda given: schedules.PolynomialLR(given, total_iters=40), 40, None),
    "milestones": (lambda given: schedules.MultiStepLR(given, [10, 40, 30]), 40, None),
    "as in transformers": (
        lambda given: schedules.LambdaLR(given, partial(decay, num_warmup_steps=3, num_training_steps=40)),
        40,
        40,
    ),
    "function": (lambda given: schedules.LambdaLR(given, lambda step: 1.0), None, None),
    "other partial": (lambda given: schedules.LambdaLR(given, partial(pow, 0.5)), None, None),
    "steps": (lambda given: schedules.StepLR(given, 10), None, None),
    "in turn": (
        in_turn(
            lambda given: schedules.LinearLR(given, total_iters=10),
            lambda given: schedules.CosineAnnealingLR(given, T_max=30),
            at=10,
        ),
        40,
        40,
    ),
    "in turn without end": (
        in_turn(
            lambda given: schedules.LinearLR(given, total_iters=10), lambda given: schedules.StepLR(given, 5), at=10
        ),
        None,
        None,
    ),
    "at once": (
        lambda given: schedules.ChainedScheduler(
            [schedules.ConstantLR(given, total_iters=10), schedules.LinearLR(given, total_iters=40)]
        ),
        40,
        None,
    ),
    "at once with an end": (
        lambda given: schedules.ChainedScheduler(
            [schedules.ConstantLR(given, total_iters=10), schedules.OneCycleLR(given, 1.0, total_steps=40)]
        ),
        40,
        40,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_lengths(name):
    make, length, end = SCHEDULES[name]
    schedule = make(optimizer())
    assert (length_of(schedule), end_of(schedule)) == (length, end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_taken_and_the_end_after_which_torch_raises(name):
    schedule = SCHEDULES[name][0](optimizer())
    schedule.optimizer.step()
    end = end_of(schedule, raises=True)
    assert end == (40 if "one cycle" in name or name == "at once with an end" else None)
    for taken in range(40):
        assert steps_taken(schedule) == taken
        schedule.step()
    if end is not None:
        with pytest.raises(ValueError, match="Tried to step"):
            schedule.step()


# Comparing ------------------------------------------------------------------------------------------------------------


class Loader:
    def __init__(self, length, samples=None, total=None):
        self.length, self.samples, self.total = length, samples, total

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length

    @property
    def total_batch_size(self):
        if self.total is None:
            raise ValueError("unknown")
        return self.total

    @property
    def total_dataset_length(self):
        if self.samples is None:
            raise TypeError("unknown")
        return self.samples


def test_steps_of_a_pass():
    assert pass_over(Loader(5, samples=39, total=8), 2, 1) == Pass(5, 10, frozenset({10}))
    assert pass_over(Loader(5, samples=33, total=8), 2, 1) == Pass(5, 9, frozenset({9, 10}))
    assert pass_over(Loader(5, samples=33, total=8), 2, 2) == Pass(3, 5, frozenset({9, 4, 6, 5}))
    assert pass_over(Loader(5), 2, 1) == Pass(5, 10, frozenset({10}))
    assert pass_over(Loader(5), 2, 1, given_length=9) == Pass(5, 9, frozenset({9, 10}))
    assert pass_over(Loader(None), 2, 1) is None
    assert pass_over(Loader(0), 2, 1) is None


@pytest.mark.parametrize(
    ("length", "fits"),
    [(25, True), (5, True), (15, True), (10, False), (20, False), (50, False), (12, False), (3, False), (9, False)],
)
def test_which_lengths_are_made_for_the_steps_taken(length, fits):
    assert fits_taken_steps(length, Pass(5, 9, frozenset({9, 10}))) is fits


def test_a_pass_of_a_single_step_tells_nothing():
    assert not fits_taken_steps(7, Pass(1, 2))
    assert not fits_taken_steps(15, Pass(5, 5))


# Warnings -------------------------------------------------------------------------------------------------------------


def run(kind, total, *, units=None, epochs=2, count=16, k=1, late=False):
    """Return the warnings of preparing, and of training, with a loader of `count` samples."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, scheduler_units=units, gradient_accumulation_steps=k)
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.ones(count, 1), batch_size=1)
    made = {
        "one cycle": lambda: schedules.OneCycleLR(sgd, 1.0, total_steps=total),
        "cosine": lambda: schedules.CosineAnnealingLR(sgd, T_max=total),
        "linear": lambda: schedules.LinearLR(sgd, total_iters=total),
        "milestones": lambda: schedules.MultiStepLR(sgd, [2, total]),
        "transformers": lambda: schedules.LambdaLR(sgd, partial(decay, num_warmup_steps=1, num_training_steps=total)),
    }[kind]()
    with warnings.catch_warnings(record=True) as preparing:
        warnings.simplefilter("always")
        if late:  # the loader first, as scripts do that compute lengths from it
            loader = accelerator.prepare(loader)
            model, sgd, made = accelerator.prepare(model, sgd, made)
        else:
            model, sgd, made, loader = accelerator.prepare(model, sgd, made, loader)
    with warnings.catch_warnings(record=True) as training:
        warnings.simplefilter("always")
        for _ in range(epochs):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch).sum())
                    sgd.step()
                    made.step()
                    sgd.zero_grad()
    return [[str(item.message) for item in found] for found in (preparing, training)]


KINDS = ("one cycle", "cosine", "linear", "milestones", "transformers")


def all_runs():
    from accelerate.state import AcceleratorState, GradientState

    def fresh(*args, **kwargs):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        return run(*args, **kwargs)

    # On 2 ranks a pass over 18 samples has 9 optimizer steps, on one process 18. Three passes are 27 and 54.
    found = {}
    for kind in KINDS:
        found[kind, "made for steps"] = fresh(kind, 27, epochs=3, count=18)
        found[kind, "right"] = fresh(kind, 54, epochs=3, count=18)
    found["late"] = fresh("one cycle", 27, epochs=3, count=18, late=True)
    found["late, right"] = fresh("one cycle", 54, epochs=3, count=18, late=True)
    found["said"] = fresh("one cycle", 27, epochs=3, count=18, units="optimizer_steps")
    found["said otherwise"] = fresh("one cycle", 27, epochs=3, count=18, units="samples")
    # 18 steps are one pass of a single process too: only running past the end tells.
    found["two passes"] = fresh("cosine", 18, epochs=2, count=18)
    found["two passes, right"] = fresh("cosine", 36, epochs=2, count=18)
    # 17 samples on 2 ranks are 9 steps of 2, so the schedule is over one step early in each pass: rounding.
    found["rounding"] = fresh("one cycle", 17 * 6, epochs=6, count=17)
    # Accumulation: 18 samples are 5 windows of 4 on one process, 3 on two.
    found["accumulating"] = fresh("one cycle", 9, epochs=3, count=18, k=4)
    found["accumulating, right"] = fresh("one cycle", 15, epochs=3, count=18, k=4)
    return found


def test_a_schedule_made_for_optimizer_steps_is_told_once_with_both_numbers():
    first, second = run_on_ranks(all_runs, 2, timeout=120)
    assert all(one == [[], []] for one in second.values()), "the main process says it for all"
    for kind in KINDS:
        preparing, training = first.pop((kind, "made for steps"))
        assert training == []
        (text,) = preparing
        assert "has 27 steps: 3 passes of the 9 optimizer steps that this run takes" in text
        assert "of the 18 that a single process would take" in text
        assert "stepped 2 times at each optimizer step, so this one is over after 14 of them" in text
        assert "scheduler_units='optimizer_steps'" in text
    (late,), training = first.pop("late")
    assert "9 optimizer steps" in late
    assert training == []
    preparing, (text,) = first.pop("two passes")
    assert preparing == []
    assert "CosineAnnealingLR has 18 steps and was over after 9 optimizer steps, and training goes on" in text
    (text,), training = first.pop("accumulating")
    assert "has 9 steps: 3 passes of the 3 optimizer steps" in text
    assert training == []
    assert {name: one for name, one in first.items() if one != [[], []]} == {}, "a warning where all is right"


def test_one_process_has_one_unit():
    for name, one in run_on_ranks(all_runs, 1, timeout=120)[0].items():
        assert one == [[], []], name


EPOCHS = 4


class Own:
    """A schedule of the user's own, which has no more than the methods that are called."""

    T_max = total_steps = 5

    def __init__(self, optimizer):
        self.optimizer, self.taken = optimizer, 0

    def step(self):
        self.taken += 1

    def state_dict(self):
        return {}


def rates_of_epochs(make, units, *, metric=False, stop=None, peek=False):
    """Return the rate after each epoch, with a schedule that is stepped after the loop, and the warnings."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, scheduler_units=units)
    model = torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1)
    model, sgd, schedule, loader = accelerator.prepare(model, sgd, make(sgd), loader)
    if peek:
        next(iter(accelerator.prepare(torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1))))
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for epoch in range(EPOCHS):
            for number, batch in enumerate(loader):
                if number == stop:
                    break
                accelerator.backward(model(batch).sum())
                sgd.step()
                sgd.zero_grad()
            schedule.step(10.0 - epoch) if metric else schedule.step()
            found.append(sgd.param_groups[0]["lr"])
    return found, [str(item.message) for item in told]


def improving(given):
    return schedules.ReduceLROnPlateau(given, patience=0, factor=0.5)


def by_epochs(given):
    return schedules.StepLR(given, 2, gamma=0.5)


def all_epochs():
    return {
        (name, units): rates_of_epochs(make, units, metric=name == "metric")
        for name, make in (("metric", improving), ("epochs", by_epochs))
        for units in (None, "samples", "optimizer_steps")
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_schedules_of_epochs(processes):
    first, *others = run_on_ranks(all_epochs, processes)
    for units in (None, "samples", "optimizer_steps"):
        assert first["metric", units] == ([1.0] * EPOCHS, []), "a metric that improves is one metric"
        if units or processes == 1:
            assert first["epochs", units] == ([1.0, 0.5, 0.5, 0.25], [])
    if processes == 2:  # as in Accelerate 1.x, but not without a word
        rates, (text,) = first["epochs", None]
        assert rates == [0.5, 0.25, 0.125, 0.0625]
        assert "StepLR is stepped after the loop over a loader: by 2 steps at each call, where a single process" in text
        assert "scheduler_units='samples'" in text
        assert all(told == [] for other in others for _, told in other.values())


def epochs_around_loops_that_were_left():
    return [
        rates_of_epochs(by_epochs, units, **left)
        for left in ({"stop": 2}, {"peek": True})
        for units in ("samples", None)
    ]


def test_schedules_of_epochs_after_loops_that_were_broken_off():
    first, _ = run_on_ranks(epochs_around_loops_that_were_left, 2)
    for rates, told in first:
        counted_twice = rates == [0.5, 0.25, 0.125, 0.0625]
        assert counted_twice or rates == [1.0, 0.5, 0.5, 0.25]
        assert counted_twice == bool(told) == any("stepped after the loop" in text for text in told)
    assert [rates[0] for rates, _ in first] == [1.0, 0.5, 1.0, 0.5]


def ends(make, total):
    """Step until long after the end of a schedule that raises there, or does not say where it is."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, scheduler_units="samples")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    made = make(sgd, total)
    sgd = accelerator.prepare(sgd)
    schedule = accelerator.prepare_scheduler(made)
    for _ in range(total):
        sgd.step()
        schedule.step()
    return steps_taken(made), getattr(made, "taken", None)


def one_cycle_after_warmup(given, total):
    stages = [schedules.LinearLR(given, total_iters=2), schedules.OneCycleLR(given, 1.0, total_steps=total - 2)]
    return schedules.SequentialLR(given, stages, milestones=[2])


def one_cycle_at_once(given, total):
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(given), schedules.OneCycleLR(given, 1.0, total_steps=total)]
    )


def all_ends():
    return [ends(one_cycle_after_warmup, 7), ends(one_cycle_at_once, 7), ends(lambda given, total: Own(given), 7)]


def test_several_processes_stop_where_torch_would_raise():
    assert run_on_ranks(all_ends, 1) == [[(7, None), (7, None), (None, 7)]]
    assert run_on_ranks(all_ends, 2) == [[(7, None), (7, None), (None, 14)]] * 2


def length_seen(late):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if late else 4)
    if late:
        accelerator.gradient_accumulation_steps = 4
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.ones(18, 1), batch_size=1))
    assert len(loader) == 9
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        accelerator.prepare(sgd, schedules.OneCycleLR(sgd, 1.0, total_steps=9))
    return [str(item.message) for item in told]


@pytest.mark.parametrize("late", [False, True])
def test_the_length_of_windows_may_be_set_after_the_start(late):
    (text,), rest = run_on_ranks(length_seen, 2, late)
    assert "has 9 steps: 3 passes of the 3 optimizer steps" in text
    assert rest == []


def units_of(units, shards):
    inner = schedules.StepLR(optimizer(), 1000)
    inner.optimizer.step()
    outer = AcceleratedScheduler(inner, [inner.optimizer], units=units, shards=shards)
    outer.step()
    return inner.last_epoch


def test_units():
    assert units_of(None, 4) == 4
    assert units_of("samples", 4) == 4
    assert units_of("optimizer_steps", 4) == 1
    assert units_of(None, None) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler_units": "batches"}, ("scheduler_units='batches' is not a unit", "'samples', 'optimizer_steps'")),
        (
            {"scheduler_units": "samples", "step_scheduler_with_optimizer": False},
            ("scheduler_units='samples'", "step_scheduler_with_optimizer=False", "one of the two"),
        ),
    ],
)
def test_units_that_mean_nothing_are_refused(options, words):
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="scheduler_units") as caught:
        Accelerator(cpu=True, **options)
    assert all(word in str(caught.value) for word in words)
