"""Questions on a terminal: arrows, defaults, and errors below the line.

Owns the prompt library (questionary). What is asked, and what may be answered, is `questions`' business.
"""

from __future__ import annotations

import sys

from ...settings import env
from .questions import NO, YES, Question

_EMPTY = ("", "dumb")


def obstacle() -> str | None:
    """Say why questions cannot be asked here; `None` if they can."""
    for stream, name in ((sys.stdin, "input"), (sys.stdout, "output")):
        if not stream.isatty():
            return f"standard {name} is not a terminal"
    if (env.get("TERM") or "") in _EMPTY:
        return f"this terminal cannot move its cursor (TERM={env.get('TERM', '')})"
    return None


def ask(question: Question) -> str:
    """Put one question and wait for an answer that it accepts.

    Raises:
        KeyboardInterrupt: On control-C: the person had enough.
        EOFError: On control-D, at a question that is answered by text; elsewhere that key does nothing.
    """
    import questionary

    if question.is_switch:
        agreed = questionary.confirm(question.text, default=question.default == YES).unsafe_ask()
        return YES if agreed else NO
    if not question.choices:
        return _ask_text(question)
    width = max(len(choice.answer) for choice in question.choices)
    choices = [
        questionary.Choice(f"{choice.answer:<{width}}  {choice.why}".rstrip(), value=choice.answer)
        for choice in question.choices
    ]
    return questionary.select(question.text, choices, default=question.default).unsafe_ask()


def _ask_text(question: Question) -> str:
    import questionary

    def validate(text: str) -> bool | str:
        return question.refusal(text or question.default) or True

    hint = f"(Enter: {question.default})" if question.default else None
    return questionary.text(question.text, validate=validate, instruction=hint).unsafe_ask() or question.default
