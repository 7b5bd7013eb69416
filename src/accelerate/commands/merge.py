"""`accelerate merge-weights`: make one file of a sharded checkpoint of FSDP."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .utils import CustomArgumentParser, run

DESCRIPTION = (
    "Write the weights of a sharded checkpoint (a folder such as pytorch_model_fsdp_0, with .metadata and .distcp "
    "files) as one model.safetensors. Runs no code from the folder, and holds one tensor in memory at a time."
)


def merge_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate merge-weights`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("merge-weights", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate merge-weights", description=DESCRIPTION)
    parser.add_argument("checkpoint_directory", help="The folder with .metadata and the .distcp files.")
    parser.add_argument("output_path", help="The folder for the merged weights. Created if needed.")
    parser.add_argument(
        *("--unsafe_serialization", "--unsafe-serialization"),
        action="store_true",
        help="Write pytorch_model.bin, a pickle, for which all weights have to be in memory.",
    )
    parser.add_argument(
        *("--remove_checkpoint_dir", "--remove-checkpoint-dir"),
        action="store_true",
        help="Remove the checkpoint folder when the merged weights are on the disk.",
    )
    if subparsers is not None:
        parser.set_defaults(func=merge_command)
    return parser


def merge_command(args: argparse.Namespace) -> None:
    """Merge, and say where the weights are."""
    from ..checkpoint.convert import merge_fsdp_weights

    safe = not args.unsafe_serialization
    merge_fsdp_weights(args.checkpoint_directory, args.output_path, safe, args.remove_checkpoint_dir)
    print(f"The merged weights are in {args.output_path}.")
    if args.remove_checkpoint_dir:
        print(f"{args.checkpoint_directory} was removed.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate merge-weights` from a terminal."""
    run(merge_command, merge_command_parser().parse_args(argv), "accelerate merge-weights")


if __name__ == "__main__":
    main()
