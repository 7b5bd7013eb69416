"""Read the numbers launchers leave in the environment."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import SettingError, explain


def number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return the variable as a number >= 0.

    Raises:
        SettingError: (a `ValueError`) if it is missing without a default, or not a number.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        raise SettingError(
            explain(
                f"{name}={text!r} in the environment is not a rank or size."
                if text
                else f"{name} is not set, although other variables say that a launcher started this process.",
                accepted="an integer >= 0",
                remedy="Start the script with `accelerate launch` or torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK.",
            )
        )
    return int(text)


def port(environ: Mapping[str, str], default: int = 29500, *, is_alone: bool = False) -> int:
    """Return the port at which the ranks meet, from `MASTER_PORT`; `default` where nobody says.

    A rank that is alone may leave the choice to the system, with 0.

    Raises:
        SettingError: (a `ValueError`) if it is no port.
    """
    text = (environ.get("MASTER_PORT") or str(default)).strip()
    least = 0 if is_alone else 1
    if not text.isdecimal() or not least <= int(text) <= 65535:
        raise SettingError(
            explain(
                f"MASTER_PORT={text!r:.80} in the environment is no port.",
                accepted="a number from 1 to 65535, the same for all ranks",
                remedy="Correct the variable, or unset it.",
            )
        )
    return int(text)


def check_rank(rank: int, world_size: int, origin: str) -> None:
    """Refuse a rank outside its world."""
    if rank >= world_size:
        raise SettingError(
            explain(
                f"rank {rank} is not below the world size {world_size} ({origin}).",
                accepted=f"0 to {world_size - 1}" if world_size else "a world size >= 1",
                remedy="Look for variables left over from another job.",
            )
        )
