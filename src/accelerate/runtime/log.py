"""A logger that knows ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import MutableMapping
from typing import Any

from ..core.errors import SettingError, explain
from ..settings import env
from . import state


class MultiProcessAdapter(logging.LoggerAdapter):  # pyright: ignore[reportMissingTypeArgument]
    """Logs on rank 0 unless told otherwise.

    Each call takes two further keywords: `main_process_only` (default `True`), and `in_order`, which lets the ranks
    log one after the other (collective, so all ranks must come).
    """

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log, if this rank is meant.

        Raises:
            RuntimeError: If no `Accelerator` or `PartialState` exists yet: ranks are not known before.
        """
        if not state.is_started():
            raise RuntimeError(
                explain(
                    "get_logger's loggers work once ranks are known.",
                    remedy="Create an Accelerator() or a PartialState() before the first message.",
                )
            )
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        kwargs.setdefault("stacklevel", 2)
        if not self.isEnabledFor(level) and not in_order:
            return
        runtime = state.current()
        if not main_process_only and in_order:
            for rank in range(runtime.process.world_size):
                if rank == runtime.process.rank:
                    self._write(level, msg, args, kwargs)
                runtime.collectives.barrier()
        elif not main_process_only or runtime.process.rank == 0:
            self._write(level, msg, args, kwargs)

    def _write(self, level: int, msg: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.isEnabledFor(level):
            kwargs["stacklevel"] += 1
            msg, kwargs = self.process(msg, kwargs)  # pyright: ignore[reportAssignmentType]
            self.logger.log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the rank in front of the message."""
        return f"[RANK {state.current().process.rank}] {msg}", kwargs

    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """Log a warning the first time it comes with these arguments."""
        _warn_once(self, args, tuple(sorted(kwargs.items())))


@functools.cache
def _warn_once(
    adapter: MultiProcessAdapter,
    args: tuple[Any, ...],
    kwargs: tuple[tuple[str, Any], ...],
) -> None:
    adapter.warning(*args, **dict(kwargs))


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """Return a logger whose messages carry the rank and come from rank 0 unless told otherwise.

    Args:
        name: As for `logging.getLogger`.
        log_level: A name such as `"INFO"`; `None` takes the variable ACCELERATE_LOG_LEVEL, if set.

    Raises:
        SettingError: (a `ValueError`) for a name that logging does not know.

    Example:
        ```python
        logger = get_logger(__name__)
        logger.info("once", main_process_only=True)
        logger.info("on each rank, in order", main_process_only=False, in_order=True)
        ```
    """
    level = log_level if log_level is not None else env.get("ACCELERATE_LOG_LEVEL")
    logger = logging.getLogger(name)
    if level is not None:
        try:
            logger.setLevel(level.upper())
        except ValueError:
            name, origin = ("ACCELERATE_LOG_LEVEL", "from the environment")
            if log_level is not None:
                name, origin = ("log_level", "the argument")
            raise SettingError(
                explain(
                    f"{name}={level!r} is not known ({origin}).",
                    accepted=list(logging.getLevelNamesMapping()),
                    remedy="Take one of these names, in any case, or leave it out.",
                )
            ) from None
        logger.root.setLevel(level.upper())
    return MultiProcessAdapter(logger, {})
