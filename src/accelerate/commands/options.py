"""The flags of `accelerate launch`, one row each.

Owns names, types, defaults and texts; the parser and the help are made from the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection

from ..settings.config_keys import CHOICES
from .engine_options import ENGINE_GROUPS
from .option import Option
from .utils import CustomArgumentParser


def machines(text: str) -> int | str:
    """Read a number of machines; `MIN:MAX` is left to the request."""
    return text if ":" in text else int(text)


machines.__name__ = "number of machines"  # argparse names it when a value does not fit


GENERAL = (
    Option(
        "config_file",
        "The configuration file; by default the one `accelerate config default` writes, if it exists.",
        shown="FILE",
        common=True,
        field=False,
    ),
    Option("quiet", "Print no notes, and of a failure its traceback only.", bool, short="-q", common=True),
    Option(
        "dry_run",
        "Print what would be run, and where each value came from; run nothing.",
        bool,
        False,
        flag="--dry-run",
        common=True,
        field=False,
    ),
    Option("json", "With --dry-run: print it as JSON.", bool, False, field=False),
    Option(
        "preflight",
        "Before the script, check that every pair of processes can talk, and that training works; see `accelerate test`.",
        bool,
        False,
        common=True,
        field=False,
    ),
    Option("debug", "Check before every collective that the tensors of all processes fit together.", bool, common=True),
    Option("module", "The script is a module, as for `python -m`.", bool, short="-m", common=True),
    Option("no_python", "The script is a program, and is not run by Python.", bool, common=True),
)

DEVICES = (
    Option(
        "cpu", "Run on the CPU; with --num_processes, several processes talking through gloo.", bool, False, common=True
    ),
    Option("multi_gpu", "Insist on several devices.", bool, False, common=True),
    Option(
        "gpu_ids",
        "The devices to use on this machine, such as 0,1; `all` for all that are visible.",
        shown="IDS",
        common=True,
    ),
)

RESOURCES = (
    Option(
        "num_processes",
        "Processes on all machines together; by default one for each visible device.",
        int,
        short="-n",
        common=True,
    ),
    Option(
        "mixed_precision",
        "In which numbers models compute: no, fp16, bf16 or fp8.",
        choices=CHOICES["mixed_precision"],
        shown="NAME",
        common=True,
    ),
    Option(
        "gradient_accumulation_steps",
        "Batches whose gradients are summed before the optimizer steps.",
        int,
        common=True,
    ),
    Option("num_cpu_threads_per_process", "OMP_NUM_THREADS of every process.", int, common=True),
    Option("enable_cpu_affinity", "Bind every process to the cores near its device.", bool, False),
)

MACHINES = (
    Option(
        "num_machines",
        "Machines that take part; MIN:MAX for a number that may change.",
        machines,
        shown="N",
        common=True,
    ),
    Option("machine_rank", "Which of them this one is, from 0.", int, common=True),
    Option("main_process_ip", "Address of machine 0, as the others reach it.", shown="HOST", common=True),
    Option(
        "main_process_port",
        "Port of machine 0; by default 29500, and any free one on a single machine.",
        int,
        common=True,
    ),
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
    Option(
        "mpirun_hostfile",
        "Let mpirun start the processes, on the hosts that this file names.",
        shown="FILE",
    ),
    Option(
        "deepspeed_hostfile",
        "Let DeepSpeed's launcher start the processes, on the hosts that this file names. Training stays ours.",
        shown="FILE",
    ),
    Option("deepspeed_inclusion_filter", "The hosts and slots it uses, such as node1@node2:0,2.", shown="FILTER"),
    Option("deepspeed_exclusion_filter", "Those that it does not use.", shown="FILTER"),
    Option(
        "deepspeed_multinode_launcher",
        "How it reaches the hosts: pdsh (the default), nossh, openmpi, mpich, impi, mvapich or slurm; `standard` is "
        "torch's launcher.",
        shown="NAME",
    ),
    Option("rdzv_conf", "Options for --rdzv_backend: key=value,key=value.", default="", shown="OPTIONS"),
)

WORKERS = (
    Option(
        "resume",
        "Continue a run whose script calls accelerator.resume(): `auto` from its newest complete checkpoint, or from the "
        "beginning if there is none; or from the checkpoint FOLDER. `off` by default.",
        shown="auto|off|FOLDER",
        common=True,
    ),
    Option(
        "save_on_signals",
        "Signals on which the run saves itself and ends with status 75, such as SIGTERM,SIGUSR1.",
        shown="NAMES",
        common=True,
    ),
    Option(
        "grace_seconds",
        "How long processes may take to save themselves when the launcher is asked to end, before they are killed; 30 by "
        "default.",
        int,
    ),
    Option("max_restarts", "How often failed workers are started again.", int, 0, common=True),
    Option("monitor_interval", "Seconds between two looks at the workers.", float, 0.1),
    Option(
        "tee",
        "Copy the workers' output into files as well: 1 for stdout, 2 for stderr, 3 for both.",
        default="0",
        short="-t",
        shown="N",
        common=True,
    ),
    Option(
        "log_dir",
        "Folder for the workers' output, one file for each stream and worker; without --tee, both streams are copied.",
        shown="FOLDER",
        common=True,
    ),
    Option("role", "Name of the workers, for logs.", default="default", shown="NAME"),
)

COMPILATION = (
    Option(
        "dynamo_backend",
        "Compile models with this back-end of torch.compile, such as inductor.",
        shown="NAME",
        choices=CHOICES["dynamo_backend"],
        common=True,
    ),
    Option(
        "dynamo_mode",
        "Mode of torch.compile: default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs.",
        default="default",
        choices=CHOICES["dynamo_mode"],
        shown="NAME",
    ),
    Option("dynamo_use_fullgraph", "Refuse graph breaks.", bool, False),
    Option("dynamo_use_dynamic", "Compile for changing shapes.", bool, False),
    Option("dynamo_use_regional_compilation", "Compile repeated blocks once.", bool, False),
)

TORCHRUN = (
    Option(
        "nnodes",
        "Machines that take part, as torchrun has it: N, or MIN:MAX for a run that goes on while machines come and go.",
        shown="N|MIN:MAX",
    ),
    Option("nproc_per_node", "Processes on each machine: a number, or auto, gpu or cpu.", shown="N|auto|gpu|cpu"),
    Option("node_rank", "The same as --machine_rank.", int),
    Option("master_addr", "The same as --main_process_ip.", shown="HOST"),
    Option("master_port", "The same as --main_process_port.", int),
    Option("rdzv_endpoint", "Where the machines meet; the same as --main_process_ip and --main_process_port.",
           shown="HOST[:PORT]"),
    Option("rdzv_id", "Name of the run, which all its machines share.", shown="NAME"),
    Option("standalone", "Run on this machine only, and meet on a free port.", bool, False),
    Option("local_addr", "Address under which the others know this machine.", shown="HOST"),
    Option("run_path", "Run the script by runpy.run_path, which takes folders and archives too.", bool, False),
    Option("redirects", "Write the workers' output into files, not to the terminal: 1, 2, 3, or WORKER:N,WORKER:N.",
           short="-r", shown="N"),
    Option("local_ranks_filter", "Show only the output of these workers of this machine.", shown="RANKS"),
    Option("duplicate_stdout_filters", "Keep lines of standard output with these words in a file of their own.",
           shown="WORDS"),
    Option("duplicate_stderr_filters", "The same for standard error.", shown="WORDS"),
    Option("logs_specs", "A registered class that decides where logs go.", shown="NAME"),
    Option("start_method", "Changes nothing: a script always runs in a new interpreter.", choices=("spawn", "fork", "forkserver"),
           shown="NAME"),
    Option("event_log_handler", "A registered handler for torch's events.", shown="NAME"),
    Option("numa_binding", "Bind workers to the memory near their device: node, socket, exclusive or core-complex.",
           choices=("node", "socket", "exclusive", "core-complex"), shown="NAME"),
    Option("signals_to_handle", "Signals that the launcher passes on, such as SIGTERM,SIGINT.", shown="NAMES"),
    Option("shutdown_timeout", "The same as --grace_seconds.", int),
    Option("virtual_local_rank", "Every worker sees one device, as number 0.", bool, False),
)  # fmt: skip

GROUPS = {
    "devices": DEVICES,
    "resources": RESOURCES,
    "several machines": MACHINES,
    "workers": WORKERS,
    "compilation": COMPILATION,
    "torchrun": TORCHRUN,
    **ENGINE_GROUPS,
}

OPTIONS = (*GENERAL, *(option for group in GROUPS.values() for option in group))

REQUEST_FIELDS = tuple(option.name for option in OPTIONS if option.field and option.engine is None)
"""The flags that are fields of a `LaunchRequest`."""

ENGINE_FLAGS = tuple(option for option in OPTIONS if option.engine is not None)
"""The flags that are refused."""


class _HelpAll(argparse.Action):
    """Prints the help of all flags, and ends. What would be refused is only listed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for action in parser._actions:
            action.help = getattr(action, "text", action.help)
        for group in parser._action_groups:
            if group.title in ENGINE_GROUPS:
                actions = group._group_actions
                group.description = ", ".join(action.option_strings[0] for action in actions)
                for action in actions:
                    action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def add_launch_options(parser: CustomArgumentParser) -> None:
    """Add all flags of `accelerate launch`, and the script with its arguments."""
    add_launch_flags(parser)
    parser.add_argument("training_script", type=str, metavar="SCRIPT", help="What to run.")
    rest = parser.add_argument(
        "training_script_args", nargs=argparse.REMAINDER, metavar="ARGS", help="Everything after it is passed on to it."
    )
    rest.required = False  # argparse would ask for it along with a missing script
    parser.rest = rest.dest


def add_launch_flags(parser: CustomArgumentParser, without: Collection[str] = ()) -> None:
    """Add the flags of `accelerate launch`.

    Args:
        parser: Where to add them.
        without: Names of those to leave out.
    """
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="Show all flags, those of torchrun included.")
    for option in GENERAL:
        if option.name not in without:
            option.add_to(parser)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            if option.name not in without:
                option.add_to(group)
