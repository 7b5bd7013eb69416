"""`accelerate tpu-config`: run commands on all machines of a TPU pod, through Google's `gcloud`.

Owns the command line that `gcloud` is given. No shell is involved here; the commands themselves are text for the
shells of the pod.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import LaunchError, SettingError, explain
from ..settings import config_file
from .utils import CustomArgumentParser, run

DESCRIPTION = "Run commands on all machines of a TPU pod, such as installing what a script needs."
FOLDER = "/usr/share"
"""Where the commands begin on the machines."""
NEWEST, DEVELOPMENT = "latest", "dev"
REPOSITORY = "git+https://github.com/huggingface/accelerate.git"


@dataclass(frozen=True)
class Pod:
    """What is to be run, and where."""

    name: str
    zone: str
    commands: tuple[str, ...]
    alpha: bool = False


def tpu_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Make the parser of `accelerate tpu-config`; as a sub-parser, if `subparsers` is given."""
    if subparsers is not None:
        parser = subparsers.add_parser("tpu-config", description=DESCRIPTION)
    else:
        parser = CustomArgumentParser("accelerate tpu-config", description=DESCRIPTION, allow_abbrev=False)
    where = parser.add_argument_group("which pod", "Looked for in the configuration file, where they are not given.")
    where.add_argument(
        *("--config_file", "--config-file"), metavar="FILE", help="The file; by default that of `accelerate launch`."
    )
    where.add_argument("--tpu_name", "--tpu-name", metavar="NAME", help="Name of the TPU.")
    where.add_argument("--tpu_zone", "--tpu-zone", metavar="ZONE", help="Its zone, such as us-central1-a.")
    what = parser.add_argument_group("what to run")
    what.add_argument("--use_alpha", "--use-alpha", action="store_true", help="Use `gcloud alpha`.")
    what.add_argument(
        *("--command_file", "--command-file"), metavar="FILE", help="A file with one command in each line."
    )
    what.add_argument(
        "--command",
        action="append",
        nargs="+",
        metavar="COMMAND",
        help="A command, in quotes; may be given several times.",
    )
    what.add_argument(
        *("--install_accelerate", "--install-accelerate"), action="store_true", help="Install accelerate first."
    )
    what.add_argument(
        *("--accelerate_version", "--accelerate-version"),
        default=NEWEST,
        metavar="VERSION",
        help="Which version of it: `latest`, `dev`, or a number such as 1.15.0.",
    )
    parser.hint = "\nA command with flags of its own is written in quotes: --command 'ls -l'"
    what.add_argument("--debug", action="store_true", help="Print what would be run, and run nothing.")
    if subparsers is not None:
        parser.set_defaults(func=tpu_command_launcher)
    return parser


def tpu_command_launcher(args: argparse.Namespace) -> None:
    """Run what parsed flags ask for, or print it with `--debug`.

    Raises:
        SettingError: (a `ValueError`) if the pod or the commands are missing, or contradict each other.
        LaunchError: (a `RuntimeError`) if there is no `gcloud`.
        SystemExit: With the status of `gcloud`, if that is not 0.
    """
    words = gcloud_words(_pod(args))
    if args.debug:
        print(f"Running {' '.join(words)}")
        return
    program = shutil.which(words[0])
    if program is None:
        raise LaunchError(
            explain(
                "The program `gcloud` is not on the PATH.",
                remedy="Install the Google Cloud CLI, or pass --debug to see what would be run.",
            )
        )
    sys.stdout.flush()
    status = subprocess.run([program, *words[1:]], check=False).returncode  # noqa: S603 - running it is the purpose
    if status:
        sys.exit(status if status > 0 else 128 - status)
    print("The commands ran on all machines of the pod.")


def gcloud_words(pod: Pod) -> list[str]:
    """Return the command line that runs the commands of a pod, one after the other."""
    text = "; ".join((f"cd {FOLDER}", *pod.commands))
    head = ["gcloud", *(["alpha"] if pod.alpha else []), "compute", "tpus", "tpu-vm", "ssh"]
    return [*head, pod.name, "--zone", pod.zone, "--command", text, "--worker", "all"]


def _pod(args: argparse.Namespace) -> Pod:
    is_said = args.tpu_name and args.tpu_zone and (args.command or args.command_file)
    file = None if is_said and args.config_file is None else _file(args.config_file)
    name = _identifier("tpu_name", args.tpu_name or (file.tpu_name if file else None))
    zone = _identifier("tpu_zone", args.tpu_zone or (file.tpu_zone if file else None))
    commands = _commands(args.command_file, _flat(args.command), "--command_file and --command")
    if commands is None and file is not None:
        commands = _commands(file.command_file, file.commands, "command_file and commands in the configuration file")
    if not commands:
        raise SettingError(
            explain(
                "There is no command to run on the pod.",
                remedy="Pass --command or --command_file, or write commands into the configuration file.",
            )
        )
    if args.accelerate_version != NEWEST and not args.install_accelerate:
        raise SettingError(
            explain(
                f"accelerate_version={args.accelerate_version!r} has no effect: nothing is installed (from "
                "--accelerate_version).",
                remedy="Add --install_accelerate, or leave the version out.",
            )
        )
    for key in ("tpu_use_sudo", "tpu_env"):
        if getattr(file, key, None):
            told = f"{key} in the configuration file has no effect: write it into the commands."
            print(f"accelerate tpu-config: {told}", file=sys.stderr)
    install = [f"pip install {_requirement(args.accelerate_version)}"] if args.install_accelerate else []
    return Pod(name, zone, (*install, *commands), args.use_alpha)


def _file(named: str | None) -> config_file.ClusterConfig | None:
    found = config_file.find(named)
    # One for SageMaker names no pod.
    return found.config if found and isinstance(found.config, config_file.ClusterConfig) else None


def _identifier(key: str, value: str | None) -> str:
    if not value:
        raise SettingError(
            explain(f"{key} is not known.", remedy=f"Pass --{key}, or write the key into the configuration file.")
        )
    if value.startswith("-") or not value.isprintable() or " " in value:
        raise SettingError(explain(f"{key}={value!r} is not a name.", accepted="letters, digits and dashes"))
    return value


def _flat(given: list[Any] | None) -> list[str] | None:
    """Return the words of a flag that takes several, and can be given several times."""
    if given is None:
        return None
    return [word for item in given for word in ([item] if isinstance(item, str) else item)]


def _commands(file: str | None, listed: Sequence[str] | None, both: str) -> list[str] | None:
    if file and listed:
        raise SettingError(explain(f"{both} both say what to run.", remedy="Leave one of the two out."))
    if not file:
        return list(listed) if listed else None
    try:
        lines = config_file.expanded(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingError(
            explain(f"The file with commands {file} cannot be read: {error}.", remedy="Check --command_file.")
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _requirement(version: str) -> str:
    """Return what pip is told to install."""
    from packaging.version import InvalidVersion, Version

    if version == NEWEST:
        return "accelerate -U"
    if version == DEVELOPMENT:
        return REPOSITORY
    try:
        return f"accelerate=={Version(version)}"
    except InvalidVersion:
        raise SettingError(
            explain(
                f"accelerate_version={version!r} is not a version (from --accelerate_version).",
                accepted=f"{NEWEST}, {DEVELOPMENT}, or a number such as 1.15.0",
            )
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run `accelerate tpu-config` from a terminal."""
    run(tpu_command_launcher, tpu_command_parser().parse_args(argv), "accelerate tpu-config")


if __name__ == "__main__":
    main()
