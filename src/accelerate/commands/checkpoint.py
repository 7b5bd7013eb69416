"""`accelerate checkpoint`: look into checkpoints, check them, and write them in another form.

Owns how descriptions become text. What there is to say is `checkpoint.describe`'s business.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..core.text import convert_bytes, convert_file_size_to_int
from .utils import CustomArgumentParser, run

if TYPE_CHECKING:
    from ..checkpoint.describe import Description, File, Project, Verdict

DESCRIPTION = "Look into checkpoints, check them, and write them in another form. Runs no code from them."
DAMAGED_STATUS = 1
"""Exit status of `verify` when a checkpoint is not what was written."""


def checkpoint_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate checkpoint`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("checkpoint", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate checkpoint", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(title="subcommands", metavar="inspect|verify|convert", required=True)
    text = "Show what a checkpoint holds and whether it is whole. Reads headers only."
    inspect = commands.add_parser("inspect", description=text, help=text)
    inspect.add_argument("folder", help="A checkpoint, a folder with weights, or a project with numbered checkpoints.")
    inspect.set_defaults(func=inspect_command)
    text = "Read all files of a checkpoint and compare them with its manifest. Ends with status 1 if any differs."
    verify = commands.add_parser("verify", description=text, help=text)
    verify.add_argument("folder", help="A checkpoint, or a project with numbered ones, which are all read.")
    verify.set_defaults(func=verify_command)
    text = (
        "Write a checkpoint or weights anew: as one file or in shards, from pickles or shards of torch.distributed to "
        "safetensors, from Accelerate 1.x to this version."
    )
    convert = commands.add_parser("convert", description=text, help=text)
    convert.add_argument("folder", help="A checkpoint, a folder with weights, or one such as pytorch_model_fsdp_0.")
    convert.add_argument("output", help="A new folder. It appears when all of it is written.")
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", help="Bytes for each file of weights at most, such as 5GB."
    )
    convert.set_defaults(func=convert_command)
    for command in (inspect, verify, convert):
        command.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


# inspect ------------------------------------------------------------------------------------------------------------


def inspect_command(args: argparse.Namespace) -> None:
    """Print what a folder holds."""
    from ..checkpoint.describe import Description, describe, describe_project

    folder = Path(args.folder).expanduser()
    found = describe_project(folder) or describe(folder)
    if args.json:
        _print_json(found)
    else:
        print("\n".join(_lines(found) if isinstance(found, Description) else _project_lines(found)))


def _print_json(value: Any) -> None:
    import msgspec

    print(json.dumps(msgspec.to_builtins(value), indent=1))


def _lines(found: Description) -> list[str]:
    lines = [f"{_printable(found.folder)}: {found.form}", f"health: {_health(found)}"]
    lines += [f"  {_printable(problem)}" for problem in found.problems]
    if found.saved is not None:
        saved = found.saved
        lines.append(f"saved by: accelerate {_printable(saved.accelerate)}, torch {_printable(saved.torch)}")
        lines.append(f"written: {_when(found.written)}   save: {_printable(saved.save_id)}")
        lines.append(
            f"number of processes: {saved.world_size}   step: {saved.step}   iteration: {saved.iteration}   "
            f"format: {saved.format}"
        )
    lines += [f"note: {_printable(note)}" for note in found.notes]
    rows = [("file", "holds", "size", "tensors", "parameters", "types"), *map(_row, found.files)]
    lines += ["", *_table(rows), "", f"{len(found.files)} files, {convert_bytes(found.num_bytes)}"]
    return lines


def _health(found: Description) -> str:
    words = {
        "complete": "complete" if found.saved is None else "complete (sizes agree; `verify` compares the content too)",
        "pending": "complete, not all files in place yet",
        "unknown": "not known",
        "incomplete": "INCOMPLETE",
    }
    return words[found.health]


def _row(file: File) -> tuple[str, ...]:
    counts = ("", "") if file.num_tensors is None else (f"{file.num_tensors:,}", f"{file.num_parameters or 0:,}")
    return (_printable(file.name), file.kind, convert_bytes(file.num_bytes), *counts, " ".join(file.dtypes))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = {"size", "tensors", "parameters"}
    right = [title in numbers for title in rows[0]]
    return [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _project_lines(project: Project) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "checkpoint", "step", "processes", "written", "size", "health")]
    for found in project.checkpoints:
        name = Path(found.folder).name
        saved = found.saved
        facts = (str(saved.step), str(saved.world_size), _when(found.written)) if saved else ("?", "?", "?")
        problem = f": {_printable(found.problems[0])}" if found.problems else ""
        mark = "->" if name == project.newest else ""
        rows.append((mark, name, *facts, convert_bytes(found.num_bytes), f"{_short_health(found)}{problem}"))
    lines = [f"{_printable(project.folder)}: {len(project.checkpoints)} checkpoints", "", *_table(rows), ""]
    lines += [f"note: {_printable(note)}" for note in project.notes]
    newest = "None of them is complete."
    if project.newest:
        newest = f"load_state() takes {project.newest}, if its content is what was written (`verify` reads it)."
    return [*lines, newest]


def _short_health(found: Description) -> str:
    form = "1.x" if found.form.endswith("1.x") else "complete"
    return {"complete": "complete", "pending": "complete", "unknown": form, "incomplete": "INCOMPLETE"}[found.health]


def _when(seconds: float | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _printable(text: str) -> str:
    """Return a text from a file without anything that would steer the terminal."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


# verify -------------------------------------------------------------------------------------------------------------


def verify_command(args: argparse.Namespace) -> None:
    """Read all files, and say which differ."""
    from ..checkpoint.describe import describe_project, verify

    folder = Path(args.folder).expanduser()
    project = describe_project(folder)
    folders = [Path(found.folder) for found in project.checkpoints] if project else [folder]
    with _Progress("read") as progress:
        verdicts = [verify(place, progress.add) for place in folders]
    if args.json:
        _print_json(verdicts)
    else:
        print("\n".join(line for verdict in verdicts for line in _verdict_lines(verdict)))
    if any(verdict.problems for verdict in verdicts):
        sys.stdout.flush()
        sys.exit(DAMAGED_STATUS)


def _verdict_lines(verdict: Verdict) -> list[str]:
    folder = _printable(verdict.folder)
    if not verdict.problems:
        return [f"{folder}: {verdict.num_files} files, {convert_bytes(verdict.num_bytes)}, all as they were written"]
    return [f"{folder}: DAMAGED", *(f"  {_printable(problem)}" for problem in verdict.problems)]


class _Progress:
    """Says on a terminal how far it is, now and then."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.num_bytes = 0
        self._shows = sys.stderr.isatty()
        self._next = time.monotonic() + 1

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self._shows and time.monotonic() > self._next:
            self._next = time.monotonic() + 0.2
            print(f"\r{self.verb} {convert_bytes(self.num_bytes)} ", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shows:
            print("\r" + " " * 30 + "\r", end="", file=sys.stderr, flush=True)


# convert ------------------------------------------------------------------------------------------------------------


def convert_command(args: argparse.Namespace) -> None:
    """Write a folder anew, and say what became of it."""
    limit = None if args.max_shard_size is None else convert_file_size_to_int(args.max_shard_size)

    from ..checkpoint.convert import convert, plan

    output = Path(args.output).expanduser()
    planned = plan(Path(args.folder).expanduser())
    with _Progress("copied") as progress:
        convert(planned, output, limit, progress.add)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    if args.json:
        names = [path.relative_to(output).as_posix() for path in files]
        kind = {"converted": str(planned.folder), "kind": planned.kind}
        _print_json({**kind, "output": str(output), "files": names, "num_bytes": total, "left": planned.left})
        return
    print(f"{_printable(str(planned.folder))} is {planned.kind}.")
    print(f"{_printable(str(output))} is new: {len(files)} files, {convert_bytes(total)}.")
    for name in planned.left:
        print(f"left behind: {_printable(name)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate checkpoint` from a terminal."""
    args = checkpoint_command_parser().parse_args(argv)
    run(_call, args, "accelerate checkpoint")


def _call(args: argparse.Namespace) -> None:
    command: Callable[[argparse.Namespace], None] = args.func
    command(args)


if __name__ == "__main__":
    main()
