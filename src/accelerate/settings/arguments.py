"""`Accelerator(...)` keywords and the environment -> `Settings`. Pure: takes mappings, returns a value."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..core import engines
from ..core.enums import PrecisionType, RNGType
from ..core.errors import SettingError, WrongTypeError, explain
from . import origins, preemption, variables
from .bag import KwargsHandler
from .options import absent
from .options.accumulation import GradientAccumulationPlugin
from .options.compile import TorchDynamoPlugin
from .options.data import DataLoaderConfiguration
from .options.handlers import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from .options.project import ProjectConfiguration
from .settings import Handlers, Settings

UNSET: Any = object()
"""The default of `split_batches`, which tells "not given" from `False`."""

PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"

T = TypeVar("T")

# Argument -> the engine it needs.
_ABSENT_ARGUMENTS = {
    "deepspeed_plugin": engines.DEEPSPEED,
    "deepspeed_plugins": engines.DEEPSPEED,
    "fsdp_plugin": engines.FSDP,
    "torch_tp_plugin": engines.TENSOR_PARALLEL,
    "megatron_lm_plugin": engines.MEGATRON,
    "parallelism_config": engines.MESH,
    "log_with": engines.TRACKERS,
}


def resolve(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Return the settings that the arguments and the environment describe.

    An argument wins over its variable, except for the number of accumulation steps, where the launcher's variable
    wins over a plain integer (with a warning that names both), as it always has under this interface.

    Args:
        arguments: The keywords of `Accelerator.__init__`, all of them.
        environ: The environment.

    Raises:
        SettingError: (a `ValueError`) for a value that is not accepted, or two that contradict each other.
        WrongTypeError: (a `TypeError`) for an object of a wrong type.
        UnsupportedCombination: (a `ValueError`) for a setting whose engine this version does not have.
    """
    for name in ("cpu", "device_placement", "step_scheduler_with_optimizer"):
        if isinstance(arguments[name], str):
            raise WrongTypeError(
                explain(
                    f"{name}={arguments[name]!r} is a text, and every text counts as true.",
                    accepted="True or False",
                    remedy=f"Pass {name}=True or leave it out.",
                )
            )
    _refuse_absent(arguments, environ)
    _warn_of_ignored(environ)
    project = _project(arguments)
    origin = _origins(arguments, environ)
    return Settings(
        cpu=bool(arguments["cpu"]),
        device_placement=arguments["device_placement"],
        mixed_precision=precision_from(arguments["mixed_precision"], environ),
        accumulation=_accumulation(arguments, environ),
        data=_data(arguments),
        project=project,
        compile=_compile(arguments),
        handlers=_handlers(arguments["kwargs_handlers"]),
        rng_types=rng_types_from(arguments["rng_types"]),
        step_scheduler_with_optimizer=arguments["step_scheduler_with_optimizer"],
        scheduler_units=_scheduler_units(arguments),
        save_on_signals=preemption.signals_from(project, environ),
        resume=preemption.resume_from(environ),
        origin=origin,
    )


def precision_from(
    given: str | PrecisionType | None,
    environ: Mapping[str, str],
) -> PrecisionType | None:
    """Return the precision an argument or ACCELERATE_MIXED_PRECISION names; `None` if neither does."""
    value, source = given, "from the argument mixed_precision"
    if value is None:
        value, source = (
            environ.get(PRECISION_VARIABLE),
            origins.origin(environ, PRECISION_VARIABLE),
        )
    if value is None:
        return None
    try:
        return PrecisionType(str(value).lower())
    except ValueError:
        remedy = "For plain float32 pass mixed_precision='no'" + (
            "." if given is not None else ", or unset the variable."
        )
        raise SettingError(
            explain(
                f"mixed_precision={str(value)!r} is not a precision ({source}).",
                accepted=PrecisionType.list(),
                remedy=remedy,
            )
        ) from None


_VARIABLES = {
    "cpu": "ACCELERATE_USE_CPU",
    "mixed_precision": PRECISION_VARIABLE,
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
    "save_on_signals": preemption.SIGNALS_VARIABLE,
    "resume": preemption.RESUME_VARIABLE,
}
"""Setting -> the variable that may give it."""


def _origins(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return for every setting that has several sources the one that gave it; a default has no entry."""
    found: dict[str, str] = {}

    def note(setting: str, argument: str, given: bool) -> None:
        if given:
            found.setdefault(setting, f"from the argument {argument}")

    note("cpu", "cpu", bool(arguments["cpu"]))
    for setting, names in (
        ("mixed_precision", ("mixed_precision",)),
        ("gradient_accumulation_steps", ("gradient_accumulation_plugin",)),
        ("dynamo_backend", ("dynamo_plugin", "dynamo_backend")),
    ):
        for argument in names:
            note(setting, argument, arguments[argument] is not None)
    project = arguments["project_config"]
    note("save_on_signals", "project_config", getattr(project, "save_on_signals", None) is not None)
    for setting, variable in _VARIABLES.items():
        if environ.get(variable):
            found.setdefault(setting, origins.origin(environ, variable))
    # A plain number gives way to the variable.
    note("gradient_accumulation_steps", "gradient_accumulation_steps", arguments["gradient_accumulation_steps"] != 1)
    return found


def _warn_of_ignored(environ: Mapping[str, str]) -> None:
    for text in variables.about_ignored(environ):
        if not origins.was_told(environ, text):
            warnings.warn(text, stacklevel=4)


def _refuse_absent(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    for name, engine in _ABSENT_ARGUMENTS.items():
        if arguments[name] is not None and arguments[name] != []:
            absent.refuse(f"{name}={arguments[name]!r:.60} (an argument of Accelerator)", engine)
    variables.refuse_absent(environ)


def _accumulation(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> GradientAccumulationPlugin:
    steps, plugin = (
        arguments["gradient_accumulation_steps"],
        arguments["gradient_accumulation_plugin"],
    )
    if plugin is not None:
        _check_type("gradient_accumulation_plugin", plugin, GradientAccumulationPlugin)
        if steps != 1:
            raise SettingError(
                explain(
                    f"gradient_accumulation_steps={steps!r} and gradient_accumulation_plugin={plugin!r} are both given.",
                    accepted="one of the two",
                    remedy=f"Pass only GradientAccumulationPlugin(num_steps={steps!r}, ...).",
                )
            )
        return plugin
    text = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if text is not None:
        source = origins.origin(environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        asked = whole_number(text, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment")
        if steps not in (1, asked):
            warnings.warn(
                f"gradient_accumulation_steps={steps} (argument of Accelerator) gives way to {asked} "
                f"({source}). Unset the variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or pass a "
                "GradientAccumulationPlugin, which always counts.",
                stacklevel=4,
            )
        steps = asked
    return GradientAccumulationPlugin(num_steps=whole_number(steps, "gradient_accumulation_steps"))


def whole_number(value: Any, name: str) -> int:
    """Return a number of batches, which is an integer >= 1."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(
            explain(
                f"{name}={value!r} is not a number of batches.",
                accepted="an integer >= 1",
                remedy="Pass 1 for none.",
            )
        )
    return value


def _data(arguments: Mapping[str, Any]) -> DataLoaderConfiguration:
    config, split = arguments["dataloader_config"], arguments["split_batches"]
    if config is None:
        return DataLoaderConfiguration() if split is UNSET else DataLoaderConfiguration(split_batches=bool(split))
    _check_type("dataloader_config", config, DataLoaderConfiguration)
    if split is not UNSET and bool(split) != config.split_batches:
        raise SettingError(
            explain(
                f"split_batches={split!r} (argument of Accelerator) contradicts split_batches={config.split_batches!r} "
                "(in dataloader_config).",
                remedy="Set it in DataLoaderConfiguration only.",
            )
        )
    return config


def _project(arguments: Mapping[str, Any]) -> ProjectConfiguration:
    config, folder = arguments["project_config"], arguments["project_dir"]
    folder = None if folder is None else str(folder)
    if config is None:
        return ProjectConfiguration(project_dir=folder)
    _check_type("project_config", config, ProjectConfiguration)
    if folder is None or folder == config.project_dir:
        return config
    if config.project_dir is not None:
        raise SettingError(
            explain(
                f"project_dir={folder!r} (argument of Accelerator) contradicts project_dir={config.project_dir!r} "
                "(in project_config).",
                remedy="Set it in ProjectConfiguration only.",
            )
        )
    config.set_directories(folder)
    return config


def _compile(arguments: Mapping[str, Any]) -> TorchDynamoPlugin:
    backend, plugin = arguments["dynamo_backend"], arguments["dynamo_plugin"]
    if plugin is None:
        return TorchDynamoPlugin() if backend is None else TorchDynamoPlugin(backend=backend)
    _check_type("dynamo_plugin", plugin, TorchDynamoPlugin)
    if backend is not None:
        raise SettingError(
            explain(
                f"dynamo_backend={backend!r} and dynamo_plugin={plugin!r} are both given.",
                accepted="one of the two",
                remedy="Pass only TorchDynamoPlugin(backend=...).",
            )
        )
    return plugin


_HANDLER_FIELDS: dict[type, str] = {
    AutocastKwargs: "autocast",
    DistributedDataParallelKwargs: "ddp",
    GradScalerKwargs: "scaler",
    InitProcessGroupKwargs: "init",
    ProfileKwargs: "profile",
}


def _handlers(given: Sequence[KwargsHandler] | None) -> Handlers:
    found: dict[str, Any] = {}
    for handler in given or ():
        name = next(
            (name for kind, name in _HANDLER_FIELDS.items() if isinstance(handler, kind)),
            None,
        )
        if name is None:
            raise WrongTypeError(
                explain(
                    f"kwargs_handlers contains {handler!r:.80}, of type {type(handler).__name__}.",
                    accepted=[kind.__name__ for kind in _HANDLER_FIELDS],
                    remedy="Other options have arguments of their own.",
                )
            )
        if name in found:
            kind = type(handler).__name__
            raise SettingError(
                explain(
                    f"kwargs_handlers contains two {kind}: {found[name]!r} and {handler!r}.",
                    accepted=f"at most one {kind}",
                    remedy=f"Put all options into one {kind}.",
                )
            )
        found[name] = handler
    return Handlers(**found)


def _scheduler_units(arguments: Mapping[str, Any]) -> Any:
    units = arguments["scheduler_units"]
    if units not in (None, "samples", "optimizer_steps"):
        raise SettingError(
            explain(
                f"scheduler_units={units!r} is not a unit (argument of Accelerator).",
                accepted=("samples", "optimizer_steps", None),
                remedy="Pass 'optimizer_steps' if the schedule was made for the steps that the optimizer takes in this run.",
            )
        )
    if units is not None and not arguments["step_scheduler_with_optimizer"]:
        raise SettingError(
            explain(
                f"scheduler_units={units!r} says how far a step of the optimizer moves a schedule, and with "
                "step_scheduler_with_optimizer=False schedules do not follow the optimizer.",
                accepted="one of the two",
                remedy="Leave one of them out.",
            )
        )
    return units


def rng_types_from(given: Sequence[str | RNGType] | None) -> tuple[RNGType, ...]:
    """Return the members of `RNGType` that `rng_types` names; `None` is the sampler's own generator."""
    if given is None:
        return (RNGType.GENERATOR,)
    if isinstance(given, str):
        given = [given]
    unknown = [str(name) for name in given if name not in RNGType]
    if unknown:
        raise SettingError(
            explain(
                f"rng_types={list(given)!r} contains {unknown[0]!r}, which names no random generator (argument of "
                "Accelerator).",
                accepted=RNGType.list(),
                remedy="'generator' is the sampler's own and the default.",
            )
        )
    return tuple(RNGType(name) for name in given)


def _check_type(name: str, value: object, kind: type[T]) -> None:
    if not isinstance(value, kind):
        raise WrongTypeError(
            explain(
                f"{name}={value!r:.80} has type {type(value).__name__}.",
                accepted=f"an instance of {kind.__name__}",
                remedy=f"Pass {name}={kind.__name__}(...).",
            )
        )
