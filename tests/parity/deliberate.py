"""Where this library differs from Accelerate 1.15 on purpose: the one table.

Each is tested where `test` says. `rows` say what this library does in rows of `observed.json`; `test_observed.py`
compares. The text for users is `docs/decisions/0004-deliberate-differences.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was."""

    name: str
    there: str
    here: str
    why: str
    test: str
    rows: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Section, row and perhaps entry -> what this library gives; by `P1` and `P2` where they differ."""


DIFFERENCES = [
    Difference(
        "backward_before_the_prepared_model_ran",
        "a loss of the model as it was before prepare() trains each process for itself",
        "the first backward() raises with several processes",
        "the ranks' models drift apart and nothing says so",
        "tests/ranks/test_training.py::test_lost_model",
    ),
    Difference(
        "model_as_it_was_in_no_sync_and_accumulate",
        "no_sync(model) and accumulate(model) with the model as it was before prepare() do nothing",
        "both raise with several processes; accumulate() in the batches that only accumulate",
        "gradients were averaged in every batch",
        "tests/ranks/test_training.py::test_model_as_it_was_before_prepare",
    ),
    Difference(
        "optimizer_as_it_was_under_fp16_and_accumulation",
        "stepping the optimizer as it was before prepare() steps with scaled gradients, or in every batch",
        "its first step raises",
        "the weights are wrong and nothing says so",
        "tests/unit/test_accelerator.py::test_lost_optimizer",
    ),
    Difference(
        "optimizer_of_another_model",
        "prepare(model, optimizer) takes an optimizer over parameters of neither this nor any prepared model",
        "raises, if no optimizer holds the model's parameters",
        "training would change nothing",
        "tests/unit/test_accelerator.py::test_optimizer_of_another_model",
    ),
    Difference(
        "prepared_once",
        "preparing a prepared model registers it a second time, with several processes",
        "registers it once",
        "checkpoints wrote it twice",
        "tests/ranks/test_training.py::test_what_prepare_keeps_and_unwraps",
        {("accelerator_misc", "prepare twice"): {"P1": [True, 2, 2], "P2": [True, 2, 2]}},
    ),
    Difference(
        "fp16_on_cpu",
        "mixed_precision='fp16' on a CPU is ignored",
        "computes in float16, with a loss scaler",
        "a setting has an effect or raises",
        "tests/unit/test_accelerator.py::test_fp16_on_a_cpu_computes_in_float16_and_skips_steps_that_overflow",
        {
            ("accelerator_misc", "mixed_precision=fp16", "scaler"): "GradScaler",
            ("accelerator_misc", "mixed_precision=fp16", "native_amp"): True,
        },
    ),
    Difference(
        "precision_in_any_case",
        "mixed_precision='BF16' raises",
        "is 'bf16'; so in ACCELERATE_MIXED_PRECISION",
        "there is no second meaning",
        "tests/unit/test_accelerator.py::test_precision_names_in_any_case",
    ),
    Difference(
        "group_on_a_cpu_host",
        "torchrun on a machine without an accelerator gives that many single processes, unless cpu=True is passed",
        "the processes join a gloo group",
        "each of them trained alone on all data",
        "tests/ranks/test_accelerator.py::test_processes_on_a_cpu_host_join_a_group_unasked",
    ),
    Difference(
        "one_process_is_not_wrapped",
        "torchrun with one process on a CPU wraps the model in DistributedDataParallel",
        "leaves it as it is",
        "there is nobody to average with; the same numbers, faster",
        "tests/ranks/test_accelerator.py::test_one_process_of_torchrun_is_one_process",
    ),
    Difference(
        "split_batches_argument",
        "Accelerator(split_batches=True) is ignored",
        "counts as in DataLoaderConfiguration",
        "a setting has an effect or raises",
        "tests/ranks/test_training.py::test_split_batches_argument_splits_batches",
        {("accelerator_misc", "ctor split_batches arg"): [True]},
    ),
    Difference(
        "steps_in_argument_and_environment",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS beats the argument silently",
        "it still does, with a warning that names both",
        "the argument had no effect and nothing said so",
        "tests/unit/test_accelerator.py::test_variable_of_the_launcher_beats_the_number_of_steps_and_says_so",
    ),
    Difference(
        "wrong_handler_type",
        "a handler of an unknown type is an AssertionError",
        "a TypeError",
        "python -O removes assertions",
        "tests/unit/test_accelerator.py::test_arguments_that_cannot_be_meant",
        {("accelerator_misc", "ctor kwargs_handlers wrong"): "TypeError"},
    ),
    Difference(
        "unknown_rng_type",
        "rng_types=['zz'] is accepted, and fails in the first epoch",
        "is a ValueError at once",
        "errors belong to the line that made them",
        "tests/unit/test_accelerator.py::test_arguments_that_cannot_be_meant",
        {("accelerator_misc", "ctor bad rng"): "ValueError"},
    ),
    Difference(
        "contradicting_folders",
        "project_dir= is ignored if project_config has another one",
        "is a ValueError",
        "a setting has an effect or raises",
        "tests/unit/test_accelerator.py::test_arguments_that_cannot_be_meant",
    ),
    Difference(
        "number_of_steps_below_one",
        "gradient_accumulation_steps=0 is accepted, and fails in the first batch",
        "is a ValueError at once",
        "errors belong to the line that made them",
        "tests/unit/test_accelerator.py::test_arguments_that_cannot_be_meant",
    ),
    Difference(
        "damaged_do_not_count",
        "total_limit counts folders, also those that cannot be loaded",
        "counts those that can",
        "a damaged newer one cost a good older one",
        "tests/unit/checkpoint/test_commit.py::test_a_checkpoint_that_could_not_be_loaded_takes_no_place",
    ),
    Difference(
        "weights_into_a_checkpoint",
        "save_model writes into the folder of a checkpoint",
        "raises, unless they are the same weights",
        "weights of one moment with an optimizer of another",
        "tests/unit/checkpoint/test_neighbours.py::test_weights_are_not_saved_into_a_checkpoint_of_another_moment",
    ),
    Difference(
        "numbers_of_saves",
        "after loading an older checkpoint the next save is refused, since its folder exists",
        "gets the number behind all that are there",
        "a run that went back could not save",
        "tests/unit/checkpoint/test_neighbours.py::test_a_run_that_went_back_to_an_older_checkpoint_saves_behind_all_that_are_there",
    ),
    Difference(
        "limit_below_one",
        "ProjectConfiguration(total_limit=0) is accepted",
        "is a ValueError at once; so is what is no whole number",
        "it asks for no checkpoint to be kept",
        "tests/unit/settings/test_arguments.py::test_a_limit_that_keeps_no_checkpoint_is_refused",
    ),
    Difference(
        "process_index_is_needed",
        "on_process(function) without process_index= runs the function nowhere, and with one process all the same",
        "is a ValueError",
        "what runs must not depend on the number of processes",
        "tests/unit/test_accelerator.py::test_missing_engines_of_methods",
    ),
    Difference(
        "engines_of_later_versions",
        "FSDP, DeepSpeed, Megatron-LM, tensor parallelism, meshes, fp8 and trackers",
        "their arguments, option classes and variables raise UnsupportedCombination, a ValueError",
        "a setting has an effect or raises",
        "tests/unit/test_accelerator.py::test_variables_of_missing_engines",
        {("options", "FP8RecipeKwargs"): "ValueError"},
    ),
    Difference(
        "inputs_are_left_alone",
        "split_between_processes() changes the caller's dictionary with several processes",
        "returns a new one",
        "using the input afterwards gave other results than with one process",
        "tests/ranks/test_accelerator.py::test_inputs_are_left_alone",
    ),
    Difference(
        "first_process_fails",
        "if the first process fails inside main_process_first(), the others wait until the connection breaks",
        "they go on; the error of the first one is what is seen",
        "a hang explains nothing",
        "tests/ranks/test_accelerator.py::test_others_are_let_go_when_the_first_one_fails",
    ),
    Difference(
        "reduce_scale",
        "reduce(scale=) has no effect on a CPU or GPU",
        "the result is multiplied by it",
        "a setting has an effect or raises",
        "tests/ranks/test_collectives.py::test_on_ranks",
        {("accelerator_misc", "ops", "reduce scale"): {"P1": [0.5], "P2": [1.5]}},
    ),
    Difference(
        "reduce_unknown",
        "any unknown word for reduction= sums",
        "is a ValueError",
        "'avg' gave a sum",
        "tests/ranks/test_collectives.py::test_on_ranks",
        {("accelerator_misc", "ops", "reduce unknown"): "ValueError"},
    ),
    Difference(
        "mean_of_whole_numbers",
        "the mean of integer tensors raises",
        "is a float tensor",
        "there is no second meaning",
        "tests/ranks/test_collectives.py::test_on_ranks",
    ),
    Difference(
        "objects_are_gathered_whole",
        "gather_object() takes anything apart that can be iterated: a text into letters, a dictionary into its keys; "
        "a number is a TypeError",
        "takes lists, tuples and rows of tensors and arrays apart; everything else is one item",
        "letters and keys were never meant",
        "tests/ranks/test_collectives.py::test_on_ranks",
    ),
    Difference(
        "mapping_of_objects_in_metrics",
        "gather_for_metrics() of a dictionary that holds other things than tensors returns its keys",
        "is a TypeError with several processes",
        "which parts belong to one sample cannot be told, so padding could not be cut",
        "tests/ranks/test_collectives.py::test_gather_for_metrics_gives_each_sample_once",
    ),
    Difference(
        "structures_of_objects_in_metrics",
        "gather_for_metrics((predictions, names)) returns one flat list of the parts of all processes, cut as if it had a "
        "part for each sample",
        "is a TypeError with several processes; a list is one object for each sample",
        "which parts belong to one sample cannot be told, so padding could not be cut",
        "tests/ranks/test_metrics_ranks.py::test_what_may_be_a_structure_or_one_for_each_sample_is_refused_on_all_ranks",
    ),
    Difference(
        "unlike_results_in_metrics",
        "gather_for_metrics() of other dtypes, keys or numbers of dimensions on some processes aborts or gives wrong "
        "numbers; of other lengths too",
        "all raise DistributedOperationException; lengths may differ",
        "numbers that nobody computed",
        "tests/ranks/test_metrics_ranks.py::test_ranks_that_bring_what_cannot_be_joined_all_hear_of_it",
    ),
    Difference(
        "join_on_cpu",
        "join_uneven_inputs() warns and does nothing on CPUs",
        "works, and so does its even_batches=",
        "the same loop works everywhere",
        "tests/ranks/test_training.py::test_ranks_may_run_out_of_batches_at_different_times",
        {
            ("accumulation_scheduler_sync", "join even_batches=False, 3 samples"): {
                "P1": [[[1, 1]] * 3],
                "P2": [[[1, 1]] * 2, [[1, 1]]],
            }
        },
    ),
    Difference(
        "short_last_window",
        "a last window that is shorter than the others is divided by their length",
        "is the mean over its batches",
        "its gradient was too small, by whatever the length of the dataset left",
        "tests/ranks/test_accumulation_ranks.py::test_a_short_last_window_is_a_mean_over_its_batches",
    ),
    Difference(
        "windows_per_model",
        "one counter of batches serves all models passed to accumulate()",
        "each call's models have a window of their own",
        "two models with calls of their own stepped every other time",
        "tests/ranks/test_accumulation_ranks.py::test_two_models_step_in_windows_of_their_own",
    ),
    Difference(
        "gradients_in_a_checkpoint",
        "a save inside a window loses the gradients that were accumulated",
        "keeps them",
        "the first step after a resume missed batches",
        "tests/ranks/test_accumulation_ranks.py::test_a_run_stopped_inside_a_window_goes_on_as_if_it_had_not",
    ),
    Difference(
        "batch_size_finder_agrees",
        "with find_executable_batch_size() each process tries sizes by itself",
        "all try the same size, and a retry is told in a warning",
        "one process alone that ran out of memory left the others waiting",
        "tests/unit/runtime/test_memory.py::test_each_retry_is_told",
    ),
    Difference(
        "metric_is_one_step",
        "scheduler.step(metric) is repeated for each process",
        "is one step",
        "a metric that improves looked like one that stands still, and the rate fell",
        "tests/unit/stepping/test_schedule.py::test_schedules_of_epochs",
    ),
    Difference(
        "region_in_a_region",
        "with accumulate(a), accumulate(b): counts each batch twice, so windows are half as long",
        "raises, unless each window is one batch",
        "gradients were those of other batches than meant",
        "tests/unit/stepping/test_accumulate.py::test_one_region_at_a_time",
    ),
    Difference(
        "parts_of_the_last_batch",
        "called several times in the last batch of a loader, accumulate() ends a window each time",
        "ends one the last time, which is as many as in the batch before; raises or warns where that was wrong",
        "the optimizer stepped with parts of a window",
        "tests/unit/stepping/test_accumulate.py::test_only_the_last_region_in_the_last_batch_ends_a_window_early",
    ),
]
