"""A person at a terminal: a program in a pseudo-terminal, keys, and waiting for what appears."""

from __future__ import annotations

import os
import re
import sys
import termios
from typing import Any

import pytest

DOWN, ENTER, CONTROL_C, CONTROL_D = "\x1b[B", "\r", "\x03", "\x04"
_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
_TIMEOUT_SECONDS = 120


class Person:
    """Runs a command in a terminal of 120 columns, sees what it prints, and presses keys."""

    def __init__(self, *command: str, **variables: str) -> None:
        pexpect: Any = pytest.importorskip("pexpect", reason="needs the package pexpect")
        environment = {**os.environ, "TERM": "xterm-256color", **variables}
        # The terminal answers no question about the place of its cursor, which would take two seconds to find out.
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            env=environment,
            encoding="utf-8",
            dimensions=(40, 120),
            timeout=_TIMEOUT_SECONDS,
        )
        self.modes = termios.tcgetattr(self.child.child_fd)
        self.leaves_modes: list[Any] | None = None
        self.seen = ""

    @classmethod
    def runs_accelerate(cls, *words: str, **variables: str) -> Person:
        """Start `accelerate` with these words."""
        return cls(sys.executable, "-m", "accelerate", *words, **variables)

    def waits_for(self, text: str) -> None:
        """Wait until `text` appears behind what was seen before."""
        # Colours may begin and end within it.
        words = r"(?:\x1b\[[0-9;?]*[A-Za-z])*".join(re.escape(sign) for sign in text)
        self.child.expect(words)
        self.seen += self.child.before + self.child.after

    def presses(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.child.send(key)

    def answers(self, question: str, *keys: str) -> None:
        """Wait for a question, and press keys."""
        self.waits_for(question)
        self.presses(*keys)

    def status(self) -> int:
        """Wait for the end, and return the exit status."""
        pexpect: Any = pytest.importorskip("pexpect")
        self.child.expect(pexpect.EOF)
        self.seen += self.child.before
        self.leaves_modes = termios.tcgetattr(self.child.child_fd)
        self.child.close()
        assert self.child.signalstatus is None
        return self.child.exitstatus

    @property
    def finds_the_terminal_as_it_was(self) -> bool:
        """Whether the modes of the terminal are those from before: whoever comes next wants to see what they type."""
        return self.leaves_modes == self.modes

    @property
    def text(self) -> str:
        """What was seen, without colours."""
        return _STYLE.sub("", self.seen).replace("\r", "")
