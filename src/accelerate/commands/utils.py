"""What the parsers of all commands share.

Owns the two spellings of a flag, the record of which flags were given, and how an error reaches the terminal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..core.errors import AccelerateError, nearest
from ..launch.report import WorkersFailed

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
        self.explain_unknown: Callable[[str], str] | None = None
        """Says more about a flag that this parser does not have."""
        self.rest: str | None = None
        """Name of the last argument, if that takes all words behind the one before it as they are, `--` included."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*_spellings(args), **kwargs)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> CustomArgumentGroup:
        group = CustomArgumentGroup(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

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
        more = self.explain_unknown(flag) if self.explain_unknown else ""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return f"unrecognized arguments: {' '.join(unknown)}\n{more or f'{flag} is not a flag of {self.prog}.'}" + (
            "" if more else nearest(flag, known)
        )


class CustomArgumentGroup(argparse._ArgumentGroup):
    """A group whose flags may be written with dashes or underscores."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*_spellings(args), **kwargs)


def run(command: Callable[[Any], object], args: Any, name: str) -> None:
    """Run a command from a terminal: an error of ours becomes a paragraph and an exit status."""
    try:
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` does. What is still unwritten must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE_STATUS)
    except WorkersFailed as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        sys.exit(error.status)
    except (AccelerateError, FileNotFoundError) as error:
        fail(name, str(error), USAGE_STATUS)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(name: str, message: str, status: int) -> NoReturn:
    """End the program with a message on standard error."""
    sys.stdout.flush()
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(status)
