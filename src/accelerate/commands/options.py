"""The flags of `accelerate launch`, one row each.

Owns names, types, defaults and texts; the parser and the help are made from the rows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..core.enums import DynamoBackend, PrecisionType
from .utils import CustomArgumentParser


@dataclass(frozen=True)
class Option:
    """One flag."""

    name: str
    """Its name in the namespace and, with two dashes, on the command line."""
    help: str
    kind: type = str
    """`bool` for a switch."""
    default: Any = None
    choices: tuple[str, ...] | None = None
    short: str | None = None
    flag: str | None = None
    """The flag, where it is not the name."""
    shown: str | None = None
    """What stands for the value in the help."""

    def add_to(self, group: Any) -> None:
        """Add the flag to a parser or a group."""
        flags = [self.flag or f"--{self.name}", *([self.short] if self.short else [])]
        if self.kind is bool:
            group.add_argument(*flags, dest=self.name, action="store_true", default=self.default, help=self.help)
        else:
            numeric = "N" if self.kind in (int, float) else None
            group.add_argument(
                *flags,
                dest=self.name,
                type=self.kind,
                default=self.default,
                choices=self.choices,
                metavar=self.shown or numeric,
                help=self.help,
            )


GENERAL = (
    Option(
        "config_file",
        "The configuration file; by default the one `accelerate config default` writes, if it exists.",
        shown="FILE",
    ),
    Option("quiet", "Print no notes and no report of failed processes.", bool, short="-q"),
    Option(
        "dry_run",
        "Print what would be run, and where each value came from; run nothing.",
        bool,
        False,
        flag="--dry-run",
    ),
    Option("debug", "Check before every collective that the tensors of all processes fit together.", bool),
    Option("module", "The script is a module, as for `python -m`.", bool, short="-m"),
    Option("no_python", "The script is a program, and is not run by Python.", bool),
)

DEVICES = (
    Option("cpu", "Run on the CPU; with --num_processes, several processes talking through gloo.", bool, False),
    Option("multi_gpu", "Insist on several devices.", bool, False),
    Option("gpu_ids", "The devices to use on this machine, such as 0,1; `all` for all that are visible.", shown="IDS"),
)

RESOURCES = (
    Option(
        "num_processes", "Processes on all machines together; by default one for each visible device.", int, short="-n"
    ),
    Option(
        "mixed_precision",
        "In which numbers models compute: no, fp16, bf16 or fp8.",
        choices=tuple(PrecisionType.list()),
        shown="NAME",
    ),
    Option("gradient_accumulation_steps", "Batches whose gradients are summed before the optimizer steps.", int),
    Option("num_cpu_threads_per_process", "OMP_NUM_THREADS of every process.", int),
    Option("enable_cpu_affinity", "Bind every process to the cores near its device.", bool, False),
)

MACHINES = (
    Option("num_machines", "Machines that take part.", int),
    Option("machine_rank", "Which of them this one is, from 0.", int),
    Option("main_process_ip", "Address of machine 0, as the others reach it.", shown="HOST"),
    Option("main_process_port", "Port of machine 0; by default 29500, and any free one on a single machine.", int),
    Option(
        "same_network",
        "The machines share a network. Needs no special treatment; the address and port are used either way.",
        bool,
        False,
    ),
    Option(
        "rdzv_backend",
        "How machines find each other: `static`, `c10d` or another name torch knows.",
        default="static",
        shown="NAME",
    ),
    Option("rdzv_conf", "Options for it: key=value,key=value.", default="", shown="OPTIONS"),
)

WORKERS = (
    Option(
        "resume",
        "Continue a run whose script calls accelerator.resume(): `auto` from its newest complete checkpoint, or from the "
        "beginning if there is none; or from the checkpoint FOLDER. `off` by default.",
        shown="auto|off|FOLDER",
    ),
    Option(
        "save_on_signals",
        "Signals on which the run saves itself and ends with status 75, such as SIGTERM,SIGUSR1.",
        shown="NAMES",
    ),
    Option(
        "grace_seconds",
        "How long processes may take to save themselves when the launcher is asked to end, before they are killed; 30 by "
        "default.",
        int,
    ),
    Option("max_restarts", "How often failed workers are started again.", int, 0),
    Option("monitor_interval", "Seconds between two looks at the workers.", float, 0.1),
    Option(
        "tee",
        "Copy the workers' output into files as well: 1 for stdout, 2 for stderr, 3 for both.",
        default="0",
        short="-t",
        shown="N",
    ),
    Option(
        "log_dir",
        "Folder for the workers' output, one file for each stream and worker; without --tee, both streams are copied.",
        shown="FOLDER",
    ),
    Option("role", "Name of the workers, for logs.", default="default", shown="NAME"),
)

COMPILATION = (
    Option(
        "dynamo_backend",
        "Compile models with this back-end of torch.compile, such as inductor.",
        shown="NAME",
        choices=tuple(name.lower() for name in DynamoBackend.list()),
    ),
    Option(
        "dynamo_mode",
        "Mode of torch.compile: default, reduce-overhead or max-autotune.",
        default="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        shown="NAME",
    ),
    Option("dynamo_use_fullgraph", "Refuse graph breaks.", bool, False),
    Option("dynamo_use_dynamic", "Compile for changing shapes.", bool, False),
    Option("dynamo_use_regional_compilation", "Compile repeated blocks once.", bool, False),
)

GROUPS = {
    "devices": DEVICES,
    "resources": RESOURCES,
    "several machines": MACHINES,
    "workers": WORKERS,
    "compilation": COMPILATION,
}

REQUEST_FIELDS = tuple(
    option.name
    for group in (GENERAL, *GROUPS.values())
    for option in group
    if option.name not in ("config_file", "dry_run")
)
"""The flags that are fields of a `LaunchRequest`."""

_ENGINES = {
    ("use_fsdp", "fsdp_"): "the FSDP engine",
    ("use_deepspeed", "deepspeed_", "zero_", "zero3_", "offload_", "gradient_clipping"): "the DeepSpeed engine",
    ("use_megatron_lm", "megatron_lm_"): "the Megatron-LM engine",
    ("use_parallelism_config", "parallelism_config_"): "device meshes with several axes",
    ("fp8_",): "an fp8 engine",
    ("tpu", "tpu_", "no_tpu_cluster", "vm", "env", "main_training_function", "downcast_bf16"): "the TPU launcher",
    ("mpirun_hostfile",): "the MPI launcher",
    ("aws_",): "SageMaker support",
}
"""Beginnings of the flags that other versions have -> what is missing here."""


def engine_of(flag: str) -> str | None:
    """Return what a flag known from other versions would need, if it is one."""
    name = flag.lstrip("-").replace("-", "_")
    for beginnings, engine in _ENGINES.items():
        for beginning in beginnings:
            if name == beginning or (beginning.endswith("_") and name.startswith(beginning)):
                return engine
    return None


def explain_absent(flag: str) -> str:
    """Say why a flag of other versions is not accepted; empty for a flag nobody knows."""
    engine = engine_of(flag)
    if engine is None:
        return ""
    return (
        f"{flag} needs {engine}, which accelerate 2.0 does not have yet.\n"
        "Available: one process, or data parallelism over several (DistributedDataParallel), in fp32, bf16 or fp16.\n"
        "Leave the flag out, or stay on accelerate 1.x for this run."
    )


def add_launch_options(parser: CustomArgumentParser) -> None:
    """Add all flags of `accelerate launch`, and the script with its arguments."""
    for option in GENERAL:
        option.add_to(parser)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group)
    parser.add_argument("training_script", type=str, metavar="SCRIPT", help="What to run.")
    rest = parser.add_argument(
        "training_script_args", nargs=argparse.REMAINDER, metavar="ARGS", help="Everything after it is passed on to it."
    )
    rest.required = False  # argparse would ask for it along with a missing script
    parser.rest = rest.dest
    parser.explain_unknown = explain_absent
