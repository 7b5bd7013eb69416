"""One flag of `accelerate launch`, as a row of a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One flag. The parser, the help and what may be given to it come from its row."""

    name: str
    """Its name in the namespace and, with two dashes, on the command line."""
    help: str
    kind: Callable[[str], Any] = str
    """`bool` for a switch."""
    default: Any = None
    choices: tuple[str, ...] | None = None
    short: str | None = None
    flag: str | None = None
    """The flag, where it is not the name."""
    shown: str | None = None
    """What stands for the value in the help."""
    common: bool = False
    """Whether `--help` shows it; `--help-all` shows all."""
    const: bool = True
    """What a switch stores."""
    append: bool = False
    """Whether it may be given several times."""
    engine: str | None = None
    """What would be needed to carry it out, where that is missing."""
    field: bool = True
    """Whether the flag is a field of a `LaunchRequest`."""

    @property
    def spelling(self) -> str:
        """The flag, with underscores where it may have them."""
        return self.flag or f"--{self.name}"

    def add_to(self, group: Any) -> None:
        """Add the flag to a parser or a group. `--help` shows it if it is common."""
        flags = [self.spelling, *([self.short] if self.short else [])]
        keywords: dict[str, Any] = {
            "dest": self.name,
            "default": self.default,
            "help": self.help if self.common else argparse.SUPPRESS,
        }
        if self.kind is bool:
            action = "store_true" if self.const else "store_const"
            more = {} if self.const else {"const": False}
            group.add_argument(*flags, action=action, **keywords, **more).text = self.help
            return
        numeric = "N" if self.kind in (int, float) else None
        if self.append:
            keywords["action"] = "append"
        shown = self.shown or numeric
        added = group.add_argument(*flags, type=self.kind, choices=self.choices, metavar=shown, **keywords)
        added.text = self.help
