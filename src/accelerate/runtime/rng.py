"""Random generators: seeding them, and making them equal on all ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from .. import hardware
from ..core.enums import RNGType
from ..core.errors import SettingError, explain
from ..hardware import Hardware
from . import state


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python, numpy, torch and the device.

    Args:
        seed: The seed; numpy takes 0 to 2**32 - 1.
        device_specific: Add this process's rank, so that ranks draw different numbers.
        deterministic: Also make torch choose deterministic algorithms, which is slower.
    """
    if device_specific:
        seed += state.detected_process().rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    family = state.current().hardware if state.is_started() else hardware.detect()
    family.manual_seed_all(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_states(rng_types: Sequence[str | RNGType], generator: torch.Generator | None = None) -> None:
    """Give all ranks the random states of rank 0. Called on all ranks; collective.

    Args:
        rng_types: Which generators, as values of `RNGType`.
        generator: The generator meant by `"generator"`.
    """
    for rng_type in rng_types:
        synchronize_rng_state(check_rng_type(rng_type), generator)


def synchronize_rng_state(rng_type: RNGType | None = None, generator: torch.Generator | None = None) -> None:
    """Give all ranks one random state of rank 0. Called on all ranks; collective.

    Raises:
        SettingError: (a `ValueError`) if `"generator"` is asked for without a generator.
    """
    runtime = state.current_or_single()
    if runtime.process.world_size == 1 or rng_type is None:
        return
    collectives = runtime.collectives
    if rng_type is RNGType.TORCH:
        torch.set_rng_state(collectives.broadcast_object(torch.get_rng_state()))
    elif rng_type is RNGType.GENERATOR:
        if generator is None:
            raise SettingError(
                explain(
                    "rng_types contains 'generator' and there is no generator to synchronise.",
                    remedy="Pass generator=..., or leave 'generator' out of rng_types.",
                )
            )
        generator.set_state(collectives.broadcast_object(generator.get_state()))
    else:
        family = hardware.named(rng_type.value)
        family.set_generator_state(collectives.broadcast_object(family.get_generator_state()))


def check_fit(rng_types: Sequence[RNGType], family: Hardware) -> None:
    """Refuse generators of devices that this run does not use.

    Raises:
        SettingError: (a `ValueError`) if there is one.
    """
    fitting = [RNGType.TORCH.value, RNGType.GENERATOR.value, family.name]
    for kind in rng_types:
        if kind.value not in fitting:
            raise SettingError(
                explain(
                    f"rng_types contains {kind.value!r}, and this run computes on {family.name}.",
                    accepted=list(dict.fromkeys(fitting)),
                    remedy="'torch' synchronises the generator of the CPU, 'generator' the sampler's own.",
                )
            )


def check_rng_type(value: str | RNGType) -> RNGType:
    """Return the member of `RNGType` with this value.

    Raises:
        SettingError: (a `ValueError`) for any other value.
    """
    try:
        return RNGType(value)
    except ValueError:
        raise SettingError(
            explain(
                f"rng_types contains {value!r}, which names no random generator.",
                accepted=RNGType.list(),
                remedy="'generator' is the sampler's own and the default.",
            )
        ) from None
