"""`accelerate estimate-memory`: how much memory a model needs, before it is loaded.

Owns the figures and the table. Where there are safetensors, here or on the Hub, only their headers are read, and no code
of a model is run. Otherwise the model is built from its configuration, without weights, by `skeleton`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.available import require
from ..core.errors import AccelerateError, explain
from ..core.text import convert_bytes
from ..settings import config_file
from .utils import CustomArgumentParser, run

DESCRIPTION = (
    "Say how much memory a model needs to be loaded, and to be trained with Adam. Activations and batches come on top: "
    "they depend on the script."
)
DIVISORS = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}
"""Numbers to load in -> how many of them fit into the four bytes of a float32."""
LIBRARIES = ("timm", "transformers")
HEADERS = ("dtype", "Largest Layer", "Total Size", "Training using Adam")
_FLOAT32_BYTES = 4
_TABLE = "┌─┬┐│├┼┤└┴┘"


class ModelUnknown(AccelerateError, ValueError):
    """The sizes of a model cannot be found out."""


@dataclass(frozen=True)
class Row:
    """What one kind of numbers costs."""

    dtype: str
    largest_layer_bytes: int
    total_bytes: int
    training_bytes: int | None
    """`None` where models are not trained in such numbers."""


def estimate_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate estimate-memory`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("estimate-memory", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate estimate-memory", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "model_name",
        metavar="MODEL",
        help="A folder with weights or a config.json, a .safetensors file, or the name of a model on the Hugging Face Hub.",
    )
    parser.add_argument(
        *("--library_name", "--library-name"),
        choices=LIBRARIES,
        help="Build the model with this library, in place of reading headers of weights.",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=tuple(DIVISORS),
        default=list(DIVISORS),
        help="In which numbers; by default in all.",
    )
    parser.add_argument(
        *("--trust_remote_code", "--trust-remote-code"),
        action="store_true",
        default=False,
        help="Run code that the model brings with it, where it is built. Only for models whose authors you trust.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes.")
    if subparsers is not None:
        parser.set_defaults(func=estimate_command)
    return parser


def estimate_command(args: argparse.Namespace) -> None:
    """Print the figures of one model.

    Raises:
        ModelUnknown: (a `ValueError`) if there is no such model, or its sizes cannot be found out.
        MissingPackage: (an `ImportError`) if it has to be built and the library is not installed.
    """
    rows = gather_data(args)
    if getattr(args, "json", False):
        print(json.dumps({"model": args.model_name, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    lines = [[row.dtype, *(_printed(size) for size in list(asdict(row).values())[1:])] for row in rows]
    print(_drawable(create_ascii_table(HEADERS, lines, f"Memory usage for loading `{args.model_name}`")))


def _drawable(table: str) -> str:
    """Return a table in characters that standard output has."""
    try:
        table.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return table.translate(str.maketrans("─│┌┬┐├┼┤└┴┘", "-|+++++++++"))
    return table


def gather_data(args: argparse.Namespace) -> list[Row]:
    """Return one row for each of `args.dtypes`."""
    tensors = sizes_of(args.model_name, args.library_name, trust_remote_code=args.trust_remote_code)
    return rows_of(tensors, args.dtypes)


# --- figures --------------------------------------------------------------------------------------------------------


def rows_of(tensors: Mapping[str, int], dtypes: Sequence[str]) -> list[Row]:
    """Return what tensors cost, given the number of elements of each."""
    layers = layers_of(tensors)
    total, largest = sum(tensors.values()) * _FLOAT32_BYTES, max(layers.values(), default=0) * _FLOAT32_BYTES
    return [Row(name, largest // DIVISORS[name], total // DIVISORS[name], _training(total, name)) for name in dtypes]


def layers_of(tensors: Mapping[str, int]) -> dict[str, int]:
    """Group tensors by the layers that stay in one piece when a model is spread, and count their elements.

    A layer is a block that repeats, which is known by the first number in the names (`model.layers.0`), or a module
    outside of them.
    """
    found: dict[str, int] = {}
    for name, count in tensors.items():
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        layer = ".".join(parts[: max(1, number + 1)])
        found[layer] = found.get(layer, 0) + count
    return found


def _training(total: int, dtype: str) -> int | None:
    """Return the largest sum at any time of a step: Adam keeps two numbers for each weight, in float32.

    In float32, weights, gradients and the two numbers make four. In float16, half as much is alive at once.
    """
    return {"float32": 4 * total, "float16": 2 * total}.get(dtype)


# --- where sizes come from ------------------------------------------------------------------------------------------


def sizes_of(name: str, library: str | None, *, trust_remote_code: bool) -> dict[str, int]:
    """Return the number of elements of each tensor of a model.

    Args:
        name: A folder, a file, or a model on the Hub.
        library: What to build it with; `None` to read headers where there are any.
        trust_remote_code: Whether code of the model may be run.
    """
    path = config_file.expanded(name)
    if library is None and path.exists():
        found = _in_headers(path)
        if found is not None:
            return found
        library = "transformers"
    elif library is None:
        found, library = _on_hub(name)
        if found is not None:
            return found
    return _built(str(path) if path.exists() else name, library, trust_remote_code=trust_remote_code)


def _in_headers(path: Path) -> dict[str, int] | None:
    """Return what the headers of files tell; `None` if there is only a configuration."""
    from ..checkpoint import layout

    names = [item.name for item in path.iterdir()] if path.is_dir() else []
    is_weights = [layout.is_weights(name) or name.startswith(layout.FSDP_MODEL_NAME) for name in names]
    loose = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not any(is_weights) and not loose and "config.json" in names:
        return None
    if any(is_weights) or not loose:
        from ..checkpoint.source import open_weights

        return {name: info.numel for name, info in open_weights(path).tensors.items()}
    from ..checkpoint.tensor_file import read_header

    return {name: info.numel for file in loose for name, info in read_header(file).tensors.items()}


def _on_hub(name: str) -> tuple[dict[str, int] | None, str]:
    """Return what headers on the Hub tell, `None` if there are none, and the library that builds the model."""
    from huggingface_hub import utils

    refused: tuple[tuple[type[Exception], str, str], ...] = (
        (utils.GatedRepoError, "needs a permission", "Ask for access on its page, then run `hf auth login`."),
        (
            utils.RepositoryNotFoundError,
            "is neither a file or folder here, nor a model on the Hub that you may see",
            "Check the name; for a private model run `hf auth login`.",
        ),
        (utils.HFValidationError, "is neither a file or folder here, nor a name on the Hub", "Check the path."),
    )
    try:
        return _asked_hub(name)
    except ModelUnknown:
        raise
    except Exception as error:  # the network's errors are those of whatever library the Hub's client uses
        for kind, problem, remedy in refused:
            if isinstance(error, kind):
                raise ModelUnknown(explain(f"{name!r} {problem}.", remedy=remedy)) from error
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ModelUnknown(
            explain(
                f"{name!r} is no file or folder here, and the Hugging Face Hub cannot be asked: "
                f"{type(error).__name__}: {reason}.",
                remedy="Check the network (and HF_HUB_OFFLINE), or name a folder with weights or a config.json.",
            )
        ) from error


def _asked_hub(name: str) -> tuple[dict[str, int] | None, str]:
    import huggingface_hub
    from huggingface_hub.utils import NotASafetensorsRepoError

    try:
        found = huggingface_hub.get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        library = huggingface_hub.model_info(name).library_name
    else:
        files = found.files_metadata.values()
        return {key: info.parameter_count for file in files for key, info in file.tensors.items()}, ""
    if library not in LIBRARIES:
        raise ModelUnknown(
            explain(
                f"The model {name!r} on the Hub has no safetensors, and its library is {library!r}.",
                accepted="models with safetensors, or of transformers or timm",
                remedy="Pass --library_name, if one of them can build it.",
            )
        )
    return None, library


def _built(name: str, library: str, *, trust_remote_code: bool) -> dict[str, int]:
    """Build the model without weights, in an interpreter of its own."""
    require(library, setting=f"estimating {name!r} from its configuration", install=library)
    request = {"model": name, "library": library, "trust_remote_code": trust_remote_code}
    program = Path(__file__).with_name("skeleton.py")
    # -P: modules of this folder must not stand in for others of the same name.
    done = subprocess.run(  # noqa: S603 - our own program; what it is given is data
        [sys.executable, "-P", str(program), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    raise ModelUnknown(
        explain(
            f"{library} cannot build {name!r}: {reason}",
            remedy="If the model brings code of its own that you trust, pass --trust_remote_code."
            if "trust_remote_code" in done.stderr
            else "Check its config.json, or name a folder with its weights.",
        )
    )


# --- the table ------------------------------------------------------------------------------------------------------


def _printed(size: int | None) -> str:
    return "N/A" if size is None else convert_bytes(size)


def create_ascii_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """Return a table with a title, drawn with lines."""
    widths = [max(len(row[place]) for row in (headers, *rows)) for place in range(len(headers))]
    # A title that is longer than the table makes its last column wider.
    widths[-1] += max(0, len(title) - (sum(widths) + len(widths) - 1))
    corner, line, down, corner_right, side, tee, cross, tee_right, low, up, low_right = _TABLE
    ruler = [line * width for width in widths]

    def row_of(cells: Sequence[str]) -> str:
        return side + side.join(cell.center(width) for cell, width in zip(cells, widths, strict=True)) + side

    return "\n".join(
        (
            corner + line.join(ruler) + corner_right,
            side + title.center(sum(widths) + len(widths) - 1) + side,
            tee + down.join(ruler) + tee_right,
            row_of(headers),
            tee + cross.join(ruler) + tee_right,
            *(row_of(row) for row in rows),
            low + up.join(ruler) + low_right,
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate estimate-memory` from a terminal."""
    run(estimate_command, estimate_command_parser().parse_args(argv), "accelerate estimate-memory")


if __name__ == "__main__":
    main()
