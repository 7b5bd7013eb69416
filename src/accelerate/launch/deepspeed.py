"""DeepSpeed's launcher as the program that starts the processes of a run.

Owns the names of its ways to reach hosts and what each of them can do, its file of hosts, the filters over it, its
command line and its file of variables. DeepSpeed is run as `python -m deepspeed.launcher.runner` and never imported;
`launch.runner` does that. Training with DeepSpeed itself is another matter, and no business of this file.

[Note: what the runner does] One host is this machine, whatever the file calls it, unless --force_multi is given. pdsh
takes variables to other hosts as `export` in a shell, MPI as options, SLURM by itself; what another machine starts for
itself (nossh) has them anyway. Only pdsh needs a file of variables: for MPI the runner would put quotes around values.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.available import require
from ..core.errors import LaunchError, SettingError, explain

RUNNER = "deepspeed.launcher.runner"
SETTINGS = (
    "deepspeed_hostfile",
    "deepspeed_inclusion_filter",
    "deepspeed_exclusion_filter",
    "deepspeed_multinode_launcher",
)
"""The settings that ask for this launcher."""
STANDARD = "standard"
"""Not DeepSpeed's launcher but torch's."""
DEFAULT_PORT = 29500
_DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's own
_NOSSH_SINCE = "0.14.5"


@dataclass(frozen=True)
class Way:
    """How the runner gets at its hosts."""

    program: str | None
    """What the runner looks for on this machine."""
    filters: bool = True
    """Whether it can leave out hosts and slots."""
    limits: bool = False
    """Whether it can use fewer slots of each host than there are."""
    even: bool = False
    """Whether all hosts must have the same number of slots."""
    only_scripts: bool = False
    """Whether modules and other programs are lost on the way."""


WAYS = {
    "pdsh": Way("pdsh", limits=True),
    "nossh": Way(None, limits=True),
    "openmpi": Way("ompi_info", filters=False),
    "mpich": Way("mpirun", filters=False, even=True, only_scripts=True),
    "impi": Way("mpirun", filters=False, even=True),
    "mvapich": Way("mpiname", filters=False, even=True),
    "slurm": Way("sinfo", even=True, only_scripts=True),
}
"""Its names -> what each can do. The first is DeepSpeed's default."""
_DEFAULT_WAY = "pdsh"


def asked_by(values: Mapping[str, Any]) -> str | None:
    """Return the setting that asks for DeepSpeed's launcher; `None` if none does."""
    names = [name for name in SETTINGS if values.get(name) not in (None, "")]
    if values.get("deepspeed_multinode_launcher") == STANDARD:
        names.remove("deepspeed_multinode_launcher")
    return names[0] if names else None


_REFUSED = {
    "mpirun_hostfile": "one program starts the processes",
    "gpu_ids": "the slots of the hosts say which devices are used; name them: --deepspeed_inclusion_filter HOST:0,2",
    "processes_per_machine": "the slots of the hosts say how many processes there are",
    "min_machines": "DeepSpeed's hosts do not come and go",
    "run_path": "DeepSpeed's launcher starts scripts, modules and programs",
}
"""Settings that it cannot carry out, beside those of torch's agent -> why."""


def check(asked: str, changed: Mapping[str, Any], describe: Callable[[str], str]) -> None:
    """Refuse what contradicts this launcher, as far as the settings alone tell.

    Args:
        asked: The setting that asks for it.
        changed: Settings that are not what they would be by default.
        describe: Says a setting's value and origin.

    Raises:
        SettingError: (a `ValueError`) that names both settings.
    """
    name = str(changed.get("deepspeed_multinode_launcher", _DEFAULT_WAY))
    if name == STANDARD:
        _refuse(describe, "deepspeed_multinode_launcher", asked, "`standard` is torch's launcher, which takes no hosts")
    if name not in WAYS:
        raise SettingError(
            explain(
                f"{describe('deepspeed_multinode_launcher')} is not known.",
                accepted=[*WAYS, STANDARD],
                remedy=f"Leave it out for {_DEFAULT_WAY}.",
            )
        )
    way = WAYS[name]
    for other, reason in _REFUSED.items():
        if other in changed:
            _refuse(describe, other, asked, reason)
    for other in ("deepspeed_inclusion_filter", "deepspeed_exclusion_filter"):
        if other in changed and not way.filters:
            reason = f"DeepSpeed's launcher takes no filter with {name}; write the hosts and slots into the file"
            _refuse(describe, other, "deepspeed_multinode_launcher", reason)
    if "deepspeed_inclusion_filter" in changed and "deepspeed_exclusion_filter" in changed:
        _refuse(describe, "deepspeed_inclusion_filter", "deepspeed_exclusion_filter", "only one of them is applied")
    for other in ("module", "no_python"):
        if other in changed and way.only_scripts:
            _refuse(describe, other, "deepspeed_multinode_launcher", "DeepSpeed starts only Python scripts that way")
    if changed.get("machine_rank") and name != "nossh":
        reason = f"with {name} one machine starts the processes of all; only with nossh each starts its own"
        _refuse(describe, "machine_rank", asked, reason)
    if changed.get("main_process_port") == 0:
        _refuse(describe, "main_process_port", asked, "the processes must know the port")


def _refuse(describe: Callable[[str], str], first: str, second: str, reason: str) -> None:
    raise SettingError(
        explain(f"{describe(first)} contradicts {describe(second)}: {reason}.", remedy="Leave one of the two out.")
    )


# --- the machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What this machine has for DeepSpeed's launcher."""

    way: str
    """How hosts are reached: a name of `WAYS`."""
    hostfile: str
    slots: Mapping[str, int]
    """Host -> how many slots the file gives it."""
    own_names: frozenset[str] = frozenset()
    """The names and addresses of this machine."""
    env_lines: tuple[str, ...] = ()
    """What the user's own `.deepspeed_env` says."""


def find(way: str | None, hostfile: str | None, described: str, environ: Mapping[str, str]) -> Found:
    """Look for DeepSpeed and the program that it needs, and read the file of hosts.

    Args:
        way: How hosts are to be reached; `None` for DeepSpeed's default.
        hostfile: The file; `None` for DeepSpeed's default.
        described: The setting that asks for all this, with its origin, for errors.
        environ: The environment of the launcher.

    Raises:
        MissingPackage: (an `ImportError`) if DeepSpeed is not installed.
        LaunchError: If a program that DeepSpeed would call is not.
        SettingError: (a `ValueError`) if the file cannot be used.
    """
    import importlib.metadata  # costs 10 ms that other launches do not need

    from packaging.version import Version

    require("deepspeed", setting=described, install="deepspeed")
    name = way or _DEFAULT_WAY
    program, version = WAYS[name].program, importlib.metadata.version("deepspeed")
    if program is not None and shutil.which(program) is None and not _is_alone(name, hostfile, described):
        raise LaunchError(
            explain(
                f"{described} lets DeepSpeed's launcher start processes by {name}, and {program!r} is not on the PATH.",
                remedy=f"Install it, or pass another --deepspeed_multinode_launcher: {', '.join(WAYS)}.",
            )
        )
    if name == "nossh" and Version(version) < Version(_NOSSH_SINCE):
        raise LaunchError(
            explain(
                f"deepspeed_multinode_launcher=nossh needs DeepSpeed {_NOSSH_SINCE}, and {version} is installed.",
                remedy="Run: pip install -U deepspeed",
            )
        )
    file = hostfile or _DEFAULT_HOSTFILE
    return Found(name, file, _slots_of(file, described), own_names(), user_lines(environ) if name == "pdsh" else ())


def _is_alone(way: str, hostfile: str | None, described: str) -> bool:
    """Tell whether the runner needs no program, since the only host is this one."""
    hosts = list(_slots_of(hostfile or _DEFAULT_HOSTFILE, described))
    return way == "pdsh" and len(hosts) == 1 and hosts[0] in own_names()


def own_names() -> frozenset[str]:
    """Return the names and addresses under which a file of hosts may mean this machine."""
    import psutil

    name = socket.gethostname()
    addresses = {address.address for found in psutil.net_if_addrs().values() for address in found}
    return frozenset({"localhost", "127.0.0.1", "::1", name, name.partition(".")[0], *addresses})


def user_lines(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the variables in the files that DeepSpeed reads by itself, if ours does not take their place."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys(os.path.join(folder, name) for folder in (os.path.expanduser("~"), "."))
    texts = [_read(file) for file in files if os.path.isfile(file)]
    return tuple(line.strip() for text in texts for line in text.splitlines() if "=" in line)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            explain(
                f"{os.path.abspath(file)}, which DeepSpeed's launcher reads for variables, cannot be read: {error}.",
                accepted="lines NAME=VALUE in UTF-8",
                remedy="Correct the file, or name another one in DS_ENV_FILE.",
            )
        ) from None


_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hosts(text: str, described: str) -> dict[str, int]:
    """Read DeepSpeed's file of hosts: a line `HOST slots=N` for each.

    Raises:
        SettingError: (a `ValueError`) for anything else.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None or not int(match[2]) or match[1] in found:
            again = match is not None and match[1] in found
            problem = "names a host for the second time" if again else "cannot be read"
            raise SettingError(
                explain(f"Line {number} of {described} {problem}: {line.strip()!r:.80}.", accepted=_FORM)
            )
        found[match[1]] = int(match[2])
    if not found:
        raise SettingError(explain(f"{described} names no host.", accepted=_FORM))
    return found


_FORM = "lines such as `node1 slots=8`, one for each host"


def _slots_of(file: str, described: str) -> dict[str, int]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not described.startswith("deepspeed_hostfile"):
            remedy = "Pass --deepspeed_hostfile FILE. On this machine alone, `accelerate launch` needs none of this."
            told = f"{described} asks for DeepSpeed's launcher, and no file names the hosts: {error}."
            raise SettingError(explain(told, accepted=_FORM, remedy=remedy)) from None
        raise SettingError(explain(f"{described} cannot be read: {error}.", accepted=_FORM)) from None
    return read_hosts(text, described if described.startswith("deepspeed_hostfile") else file)


# --- the decision ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a request says about hosts and processes. `None` where it says nothing."""

    describe: Callable[[str], str]
    """Says a setting's value and origin."""
    include: str | None = None
    exclude: str | None = None
    processes: int | None = None
    machines: int | None = None
    rank: int = 0
    address: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Start:
    """How the runner is called."""

    python: str
    """The interpreter, of the runner and of the processes."""
    words: tuple[str, ...]
    """Its options, up to the script."""
    hostfile: str
    hosts: Mapping[str, tuple[int, ...]]
    """Host -> the slots that are used there."""
    address: str
    port: int
    is_here: bool
    """Whether all processes run on this machine."""
    by_shell: bool = False
    """Whether command and variables reach the hosts through a shell."""
    by_name: bool = False
    """Whether variables reach the hosts only if they are named to mpirun."""
    env_lines: tuple[str, ...] = ()
    """Variables for the hosts beside those of the run, as lines of a file."""
    notes: tuple[str, ...] = ()
    """What the user should know about it."""


def decide(found: Found, python: str, wanted: Wanted) -> Start:
    """Choose the slots, and write the options of the runner, which `python` runs.

    Raises:
        SettingError: (a `ValueError`) if hosts, filters and counts do not fit together.
    """
    way, name = WAYS[found.way], found.way
    hosts = {host: tuple(range(count)) for host, count in found.slots.items()}
    chosen: tuple[str, ...] = ()
    source = found.hostfile
    if wanted.include or wanted.exclude:
        setting = "deepspeed_inclusion_filter" if wanted.include else "deepspeed_exclusion_filter"
        text = wanted.include or wanted.exclude or ""
        hosts, chosen = select(hosts, text, wanted), ("--include" if wanted.include else "--exclude", text)
        source = f"{found.hostfile} with {wanted.describe(setting)}"
    if wanted.machines is not None and wanted.machines != len(hosts):
        raise _mismatch(wanted, "num_machines", f"{len(hosts)} host(s) are used of {source}")
    total = sum(map(len, hosts.values()))
    if wanted.processes is not None and wanted.processes != total:
        each, rest = divmod(wanted.processes, len(hosts))
        if chosen or not way.limits or rest or not 0 < each <= min(map(len, hosts.values())):
            raise _mismatch(wanted, "num_processes", f"{_told(hosts)} of {source} are {total} slots")
        hosts, chosen = {host: slots[:each] for host, slots in hosts.items()}, ("--num_gpus", str(each))
    if way.even and len({len(slots) for slots in hosts.values()}) > 1:
        raise SettingError(
            explain(
                f"With {name}, DeepSpeed's launcher wants as many slots on each host, and {found.hostfile} gives "
                f"{_told(hosts)}.",
                remedy="Correct the file, or pass another --deepspeed_multinode_launcher.",
            )
        )
    if name == "slurm" and any(slots != tuple(range(len(slots))) for slots in hosts.values()):
        told = f"With slurm, DeepSpeed's launcher cannot choose single slots, and the filter leaves {_told(hosts)}."
        raise SettingError(explain(told, accepted="whole hosts, or the first slots of each"))
    return _start(found, python, wanted, hosts, chosen)


def _start(
    found: Found, python: str, wanted: Wanted, hosts: dict[str, tuple[int, ...]], chosen: tuple[str, ...]
) -> Start:
    name, first = found.way, next(iter(hosts))
    is_here = len(hosts) == 1 and name in ("pdsh", "nossh") and (first in found.own_names or name == "nossh")
    address = wanted.address or ("127.0.0.1" if is_here else first)
    if len(hosts) > 1 and address in _LOOPBACK:
        raise SettingError(
            explain(
                f"{len(hosts)} hosts would meet at {address!r}, which on each of them is itself (the first host of "
                f"{found.hostfile}).",
                accepted="an address or host name that all hosts reach",
                remedy="Write that into the file in its place, or pass --main_process_ip.",
            )
        )
    if name == "nossh":
        if wanted.rank >= len(hosts):
            raise _mismatch(wanted, "machine_rank", f"{found.hostfile} leaves {len(hosts)} host(s), counted from 0")
        how = ("--node_rank", str(wanted.rank), "--no_ssh", "--no_local_rank")
    else:
        # The runner's own check goes by ssh, which nobody but pdsh needs.
        alone = () if name == "pdsh" and not is_here else ("--no_ssh_check",)
        forced = ("--force_multi",) if len(hosts) == 1 and not is_here else ()
        how = ("--no_local_rank", "--launcher", name, *alone, *forced)
    port = wanted.port or DEFAULT_PORT
    words = ("--hostfile", found.hostfile, *how, *chosen, "--master_addr", address, "--master_port", str(port))
    by_shell = name == "pdsh" and not is_here
    return Start(
        python,
        words,
        found.hostfile,
        hosts,
        address,
        port,
        is_here,
        by_shell,
        by_name=name == "openmpi",
        env_lines=found.env_lines if by_shell else (),
        notes=(_LOST,) if name == "mpich" else (),
    )


_LOST = (
    "with mpich, DeepSpeed's launcher ends with status 0 even if a script fails: it does not hand the status on. "
    "--mpirun_hostfile does."
)


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def select(hosts: Mapping[str, tuple[int, ...]], text: str, wanted: Wanted) -> dict[str, tuple[int, ...]]:
    """Apply a filter, `HOST[:SLOT,SLOT]@HOST...`, as DeepSpeed does.

    Raises:
        SettingError: (a `ValueError`) if it cannot be read, names what is not there, or leaves nothing.
    """
    inclusion = bool(wanted.include)
    setting = "deepspeed_inclusion_filter" if inclusion else "deepspeed_exclusion_filter"
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            raise _unfit(wanted, setting, f"{host!r} is no host of the file", f"hosts {', '.join(hosts)}")
        words = numbers.split(",") if colon else [str(slot) for slot in hosts[host]]
        if not all(word.strip().isdecimal() and int(word) in hosts[host] for word in words):
            raise _unfit(wanted, setting, f"{part!r} names no slots of {host}", f"0 to {hosts[host][-1]}, with commas")
        named.setdefault(host, set()).update(map(int, words))
    left = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) == inclusion)
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise _unfit(wanted, setting, "nothing is left", "a filter that leaves a slot")
    return left


def _unfit(wanted: Wanted, setting: str, problem: str, accepted: str) -> SettingError:
    return SettingError(explain(f"{wanted.describe(setting)}: {problem}.", accepted=accepted))


def _mismatch(wanted: Wanted, setting: str, fact: str) -> SettingError:
    remedy = f"Leave --{setting} out, or correct the file or the filter."
    return SettingError(explain(f"{wanted.describe(setting)} contradicts the hosts: {fact}.", remedy=remedy))


def _told(hosts: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.items())


# --- words and lines ---------------------------------------------------------------------------------------


def command(start: Start, argv: Sequence[str], variables: Iterable[str]) -> tuple[str, ...]:
    """Return the command line that lets the runner start `argv` in all processes.

    Args:
        start: How the runner is called.
        argv: What each process runs.
        variables: The names of those that the processes get.
    """
    head = (start.python, "-m", RUNNER, *start.words)
    if start.by_name:
        head = (*head, f"--launcher_args={' '.join(f'-x {name}' for name in sorted(variables))}")
    script = tuple(argv)
    if script[:2] == (start.python, "-u"):  # as the runner calls Python itself
        script = script[2:]
        if script[0] == "-m":
            head, script = (*head, "--module"), script[1:]
    else:
        head = (*head, "--no_python")
    if start.by_shell:
        script = (shlex.quote(script[0]), *map(_for_shell, script[1:]))
    return (*head, *script)


def _for_shell(word: str) -> str:
    # The runner itself puts words with spaces into double quotes, and takes care of double quotes in them alone.
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def env_line(name: str, value: str) -> str:
    """Return a line of the file of variables, from which the shell of another host gets the value as it is."""
    # The runner puts double quotes around values with other characters than these, and takes care of none in them.
    plain = re.fullmatch(r"[\w@%+=:,./-]*", value)
    return f"{name}={value}" if plain else f"{name}={re.sub(_IN_QUOTES, _ESCAPED, value)}"


_IN_QUOTES, _ESCAPED = r'([\\"$`])', r"\\\1"
