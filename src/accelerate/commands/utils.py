"""What the parsers of all commands share.

Owns the two spellings of a flag, the record of which flags were given, and how an error reaches the terminal.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ..core.errors import AccelerateError, explain, nearest

USAGE_STATUS = 2
"""Exit status when a command line or a file is wrong, as argparse has it."""

BROKEN_PIPE_STATUS = 141
"""Exit status when nobody reads the output any more, as a shell shows it for other programs."""


class _Store(argparse._StoreAction):
    """Stores a value and notes that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _note(namespace, self)
        super().__call__(parser, namespace, values, option_string)


class _StoreTrue(argparse._StoreTrueAction):
    """Stores `True` and notes that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _note(namespace, self)
        super().__call__(parser, namespace, values, option_string)


class _StoreConst(argparse._StoreConstAction):
    """Stores a constant and notes that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _note(namespace, self)
        super().__call__(parser, namespace, values, option_string)


class _Append(argparse._AppendAction):
    """Appends a value and notes that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _note(namespace, self)
        super().__call__(parser, namespace, values, option_string)


def _note(namespace: Any, action: argparse.Action) -> None:
    if action.option_strings:
        namespace.nondefault = {*getattr(namespace, "nondefault", ()), action.dest}


def _spellings(names: Sequence[str]) -> list[str]:
    """Add to every long flag the spelling with dashes, or with underscores."""
    found = list(names)
    for name in names:
        if name.startswith("--"):
            found += [f"--{name[2:].replace('_', '-')}", f"--{name[2:].replace('-', '_')}"]
    return list(dict.fromkeys(found))


def _not_accepted(action: argparse.Action, value: object, accepted: Iterable[object] | str) -> argparse.ArgumentError:
    flag = next((name for name in action.option_strings if name.startswith("--")), action.dest)
    problem = f"{action.dest}={value!r} is not accepted (from {flag})."
    return argparse.ArgumentError(None, explain(problem, accepted=accepted, remedy="Correct the command line."))


class _OneSpelling(argparse.HelpFormatter):
    """Shows one spelling of every flag: the others are the same word."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=34, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = [name for name in action.option_strings if not name.startswith("--")]
        shown += [name for name in action.option_strings if name.startswith("--")][:1]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{', '.join(shown)} {self._format_args(action, 'VALUE')}"


class CustomArgumentParser(argparse.ArgumentParser):
    """A parser whose flags may be written with dashes or underscores, and which notes the flags that were given.

    Its namespaces carry `nondefault`, the set of the names that stood on the command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _OneSpelling)
        super().__init__(*args, **kwargs)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "store_true", _StoreTrue)
        self.register("action", "store_const", _StoreConst)
        self.register("action", "append", _Append)
        self.rest: str | None = None
        """Name of the last argument, if that takes all words behind the one before it as they are, `--` included."""
        self.hint = ""
        """What else to say about a flag that is not known."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*_spellings(args), **kwargs)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> CustomArgumentGroup:
        group = CustomArgumentGroup(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            accepted = {int: "an integer", float: "a number"}.get(action.type)  # pyright: ignore[reportArgumentType, reportCallIssue]
            raise _not_accepted(action, arg_string, accepted or f"a {getattr(action.type, '__name__', '')}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices and action.option_strings:
            raise _not_accepted(action, value, list(action.choices))
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        """End the program with a message; argparse names all spellings of a flag, where one is enough."""
        match = re.match("argument ([^ ]*): ", message)
        if match:
            names = match.group(1).split("/")
            flag = next((name for name in names if name.startswith("--")), names[0])
            message = f"{flag}: {message[match.end() :]}"
        super().error(message)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.describe_unknown(unknown))
        return found

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        end = self._end_of_flags(words) if self.rest is not None else len(words)
        found, unknown = super().parse_known_args(words[:end], namespace)
        if self.rest is not None:
            setattr(found, self.rest, words[end:])
        return found, unknown

    def _end_of_flags(self, words: Sequence[str]) -> int:
        """Return how many words stand up to the first one that is neither a flag nor the value of one."""
        place = 0
        while place < len(words):
            word = words[place]
            place += 1
            if word == "--":
                return place + 1
            if not word.startswith("-") or word == "-":
                return place
            if self._takes_next(word):
                place += 1
        return place

    def _takes_next(self, word: str) -> bool:
        """Tell whether a flag takes the next word as its value."""
        known = self._option_string_actions
        if word in known:
            return known[word].nargs != 0
        if word.startswith("--"):
            return False  # it has its value behind `=`, or nobody knows it
        for place in range(1, len(word)):  # short flags written as one word, such as -qn 2
            action = known.get(f"-{word[place]}")
            if action is None or action.nargs != 0:
                return action is not None and place == len(word) - 1
        return False

    def describe_unknown(self, unknown: Sequence[str]) -> str:
        """Say what is wrong with words that no flag takes, naming the nearest flag."""
        flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        known = [name for name in self._flags() if name.startswith("--")]
        return (
            f"unrecognized arguments: {' '.join(unknown)}\n{flag} is not a flag of {self.prog}.{nearest(flag, known)}"
            f"{self.hint}"
        )

    def _flags(self) -> Iterator[str]:
        """Yield the flags of this parser and of its sub-parsers, which leave to it what they do not know."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._option_string_actions


class CustomArgumentGroup(argparse._ArgumentGroup):
    """A group whose flags may be written with dashes or underscores."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*_spellings(args), **kwargs)


def run(command: Callable[[Any], object], args: Any, name: str) -> None:
    """Run a command from a terminal: an error of ours becomes a paragraph and an exit status."""
    _replace_closed_streams()
    with suppress(AttributeError):  # something stands in for it, as in tests
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` does. What is still unwritten must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE_STATUS)
    except (AccelerateError, FileNotFoundError) as error:
        status = getattr(error, "status", None)  # of `WorkersFailed`, which `--help` does not load
        if isinstance(status, int):
            sys.stdout.flush()
            print(error, file=sys.stderr)
            sys.exit(status)
        fail(name, str(error), USAGE_STATUS)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(name, f"standard output cannot be written: {error.strerror}.", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _replace_closed_streams() -> None:
    """Have what is printed go nowhere where the caller has closed a standard stream, as services do."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open)


def leave(status: int) -> NoReturn:
    """End the program when its work is done, without taking torch apart: that takes half a second."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def fail(name: str, message: str, status: int) -> NoReturn:
    """End the program with a message on standard error."""
    sys.stdout.flush()
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(status)
