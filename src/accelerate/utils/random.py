"""Face of `accelerate.utils.random`. The code lives in `accelerate.runtime.rng`."""

from ..runtime.rng import set_seed, synchronize_rng_state, synchronize_rng_states

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]
