"""The exceptions of this library.

Every error a user can cause says four things: the value, where it came from, what is accepted and one
thing to do. `explain` puts the four together; each class is also the built-in that callers would expect.

    AccelerateError
    ├── SettingError(ValueError)                 a setting has a wrong value, or two contradict each other
    ├── WrongTypeError(TypeError)                an argument has a wrong type
    ├── UnsupportedCombination(ValueError, NotImplementedError)
    ├── MissingPackage(ImportError)              an optional package is needed and absent
    ├── NotStarted(AttributeError)               the process-wide state is used before it exists
    ├── DistributedOperationException            ranks disagree about a collective
    ├── CheckpointError(RuntimeError)            a checkpoint cannot be written or read
    └── LaunchError(RuntimeError)                processes cannot be started, or one of them failed
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters but for line breaks and tabs, and those that turn the direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class AccelerateError(Exception):
    """Base of all errors that this library raises on purpose."""

    arose_on: tuple[int, ...] = ()
    """Of an error that all ranks raise because some failed: those ranks. The launcher names one of them."""


class SettingError(AccelerateError, ValueError):
    """A setting has a value that is not accepted, or contradicts another one."""


class WrongTypeError(AccelerateError, TypeError):
    """An argument has a type that is not accepted."""


class UnsupportedCombination(AccelerateError, ValueError, NotImplementedError):
    """Settings that are fine alone cannot work together, or their engine is not here."""


class MissingPackage(AccelerateError, ImportError):
    """A setting needs an optional package that is not installed."""


class NotStarted(AccelerateError, AttributeError):
    """Process-wide state is used before it was created, or after it was reset."""


class DistributedOperationException(AccelerateError):
    """Ranks called the same collective with tensors that do not fit together."""


class CheckpointError(AccelerateError, RuntimeError):
    """A checkpoint could not be written completely, or what is there cannot be loaded."""


class LaunchError(AccelerateError, RuntimeError):
    """Processes could not be started, or one of them failed."""


def explain(problem: str, *, accepted: Iterable[object] | str | None = None, remedy: str = "") -> str:
    """Join the parts of an error message into one paragraph.

    What a terminal would obey, such as a name from a file that moves the cursor, is spelled out.

    Args:
        problem: The value, what is wrong with it, and where it came from.
        accepted: What would have been accepted: a phrase, or the values to list.
        remedy: One thing to do.
    """
    lines = [problem]
    if accepted is not None:
        text = accepted if isinstance(accepted, str) else ", ".join(repr(item) for item in accepted)
        lines.append(f"Accepted: {text}.")
    if remedy:
        lines.append(remedy)
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), "\n".join(lines))


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the candidate that was most likely meant, or an empty string.

    One that begins with the word or has it as a part comes before one that only looks alike; of several, the first.
    """
    import difflib

    plain = {candidate: _plain(candidate) for candidate in candidates}
    wanted = _plain(word)
    rules = (
        lambda name: name.replace("_", "").startswith(wanted.replace("_", "")),
        lambda name: f"_{wanted}_" in f"_{name}_",
    )
    for rule in rules if len(wanted) > 1 else ():
        found = next((candidate for candidate, name in plain.items() if rule(name)), None)
        if found:
            return f" Did you mean {found!r}?"
    alike = difflib.get_close_matches(wanted, plain.values(), n=1, cutoff=0.75)
    return f" Did you mean {next(found for found, name in plain.items() if name == alike[0])!r}?" if alike else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
