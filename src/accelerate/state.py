"""Face of `accelerate.state`. The code lives in `accelerate.runtime`, `accelerate.session` and `accelerate.core`."""

from .core.enums import DistributedType
from .runtime.accumulation import GradientState
from .runtime.partial_state import PartialState
from .runtime.state import is_started as is_initialized
from .session.state import AcceleratorState

__all__ = [
    "AcceleratorState",
    "DistributedType",
    "GradientState",
    "PartialState",
    "is_initialized",
]
