"""How models are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.enums import DynamoBackend
from ...core.errors import SettingError, explain
from ...core.text import str_to_bool
from .. import env, origins
from ..bag import KwargsHandler


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """Options of `torch.compile`, applied to models at `prepare`.

    A field left at `None` is taken from its variable `ACCELERATE_DYNAMO_*`, as the launcher sets them.
    """

    backend: DynamoBackend | str | None = None
    """A value of `DynamoBackend` in any letter case, or `None` for the variable's; `"no"` does not compile."""

    mode: str | None = None
    """`default`, `reduce-overhead`, `max-autotune` or another mode of `torch.compile`."""

    fullgraph: bool | None = None
    """Refuse graph breaks."""

    dynamic: bool | None = None
    """Compile for changing shapes; `None` lets torch find out."""

    options: Any = None
    """Options of the back-end, a dictionary."""

    disable: bool = False
    """Make `torch.compile` do nothing."""

    use_regional_compilation: bool | None = None
    """Compile the repeated blocks of a model once, in place of the whole model."""

    def __post_init__(self) -> None:
        backend = self.backend if self.backend is not None else env.get("ACCELERATE_DYNAMO_BACKEND", "no")
        try:
            self.backend = DynamoBackend(str(backend).upper())
        except ValueError:
            variable = origins.origin(env.read(), "ACCELERATE_DYNAMO_BACKEND")
            origin = "from TorchDynamoPlugin" if self.backend is not None else variable
            raise SettingError(
                explain(
                    f"dynamo backend {backend!r} is not known ({origin}).",
                    accepted=[item.lower() for item in DynamoBackend.list()],
                    remedy="Pass backend='inductor', or 'no' for no compilation.",
                )
            ) from None
        if self.mode is None:
            self.mode = env.get("ACCELERATE_DYNAMO_MODE", "default")
        if self.fullgraph is None:
            self.fullgraph = env.parse_flag_from_env("ACCELERATE_DYNAMO_USE_FULLGRAPH")
        if self.use_regional_compilation is None:
            self.use_regional_compilation = env.parse_flag_from_env("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
        if self.dynamic is None and (text := env.get("ACCELERATE_DYNAMO_USE_DYNAMIC")) is not None:
            self.dynamic = bool(str_to_bool(text))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, the back-end as lower-case text."""
        return {**super().to_dict(), "backend": self._backend_name()}

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keywords for `torch.compile`: what differs from its own defaults."""
        kwargs = super().to_kwargs()
        kwargs.pop("use_regional_compilation", None)
        kwargs["backend"] = self._backend_name()
        if kwargs.get("mode") == "default":
            kwargs.pop("mode")
        if not kwargs.get("fullgraph", True):
            kwargs.pop("fullgraph")
        return kwargs

    def _backend_name(self) -> str:
        return str(self.backend).lower()
