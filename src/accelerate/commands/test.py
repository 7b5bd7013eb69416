"""`accelerate test`: try out whether the processes of a launch can work together, and train as plain torch does.

Owns the command. The processes run `test_utils/scripts/preflight.py`, started as `accelerate launch` starts a script.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import LaunchError, SettingError, explain
from ..launch.preflight import PAIR_SECONDS, SCRIPT
from ..launch.report import WorkersFailed
from .launch import launch_command, launch_command_parser
from .options import add_launch_flags
from .utils import CustomArgumentParser, run

DESCRIPTION = (
    "Check that every pair of processes can talk, how fast, and that training with all of them gives what plain torch "
    "gives. Takes the flags of `accelerate launch` too, and starts processes as it would."
)
PASSED = "Test is a success! This machine is ready for training."
FAILED = "Test FAILED."
LONGEST_SECONDS = 24 * 60 * 60


def test_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:  # noqa: PT028  (not a test)
    """Make the parser of `accelerate test`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("test", description=DESCRIPTION)
    else:
        usage = "accelerate test [--json] [--time-limit SECONDS] [flags of accelerate launch]"
        parser = CustomArgumentParser("accelerate test", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="Print what was found as JSON, and nothing else.")
    parser.add_argument(
        "--time_limit",
        type=float,
        default=PAIR_SECONDS,
        metavar="SECONDS",
        help=f"How long two processes may take to answer each other; {PAIR_SECONDS} by default.",
    )
    add_launch_flags(parser, without=("json", "preflight", "module", "no_python", "run_path"))
    parser.add_argument("training_script", nargs="?", help=argparse.SUPPRESS)  # refused with a remedy
    parser.rest = "training_script_args"
    if subparsers is not None:
        parser.set_defaults(func=test_command)
    return parser


def test_command(args: argparse.Namespace) -> None:
    """Launch the check as `accelerate launch` would launch a script.

    Args:
        args: What the parser returned.

    Raises:
        WorkersFailed: (a `RuntimeError`) if the check fails.
        SettingError: (a `ValueError`) if the flags are wrong.
    """
    unwanted = getattr(args, "training_script", None)
    if unwanted:
        raise SettingError(
            explain(
                f"accelerate test was given {unwanted!r}, and takes no script.",
                accepted="its own flags and those of `accelerate launch`",
                remedy=f"Run `accelerate launch --preflight {unwanted}` to check first, and run it then.",
            )
        )
    limit = getattr(args, "time_limit", PAIR_SECONDS)
    if not 0 < limit <= LONGEST_SECONDS:  # not a number is in no range
        raise SettingError(
            explain(
                f"--time_limit {limit:g} cannot be kept.",
                accepted=f"seconds, more than 0 and at most {LONGEST_SECONDS}, a day",
                remedy=f"Leave the flag out for {PAIR_SECONDS}.",
            )
        )
    as_json, quiet = getattr(args, "json", False), getattr(args, "quiet", False)
    with tempfile.TemporaryDirectory(prefix="accelerate-test-") as folder:
        file = Path(folder) / "report.json"
        script = [str(SCRIPT), "--time-limit", str(limit), "--report", str(file)]
        script += [word for word, wanted in (("--json", as_json), ("--quiet", quiet)) if wanted]
        flags = launch_command_parser().parse_args(script)
        vars(flags).update(
            {name: value for name, value in vars(args).items() if not name.startswith("training_script")}
        )
        flags.json = as_json and flags.dry_run  # the plan is then all there is to print
        try:
            launch_command(flags)
        except LaunchError as error:
            found = {**_found(file), "ok": False}
            found["problems"] = found["problems"] or [str(error)]  # not about links: what the launcher saw
            if as_json:
                print(json.dumps(found, indent=2))
            said = [] if quiet else found["problems"]
            raise WorkersFailed("\n\n".join([*said, FAILED]), getattr(error, "status", 1)) from None
        if getattr(flags, "dry_run", False):
            return
        print(json.dumps(_found(file), indent=2) if as_json else PASSED)


def _found(file: Path) -> dict[str, Any]:
    """Return what the first process wrote; on other machines than its own there is nothing."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"ok": True, "problems": []}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate test` from a terminal."""
    run(test_command, test_command_parser().parse_args(argv), "accelerate test")


if __name__ == "__main__":
    main()
