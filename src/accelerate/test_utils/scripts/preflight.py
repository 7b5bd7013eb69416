"""What each process of a preflight runs: the pairs of ranks, then the self test, then what the process was to be.

Started by `accelerate test`, and by `accelerate launch --preflight`, which names the script behind `--then`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil

from accelerate import Accelerator
from accelerate.core.available import is_tqdm_available
from accelerate.launch import links, preflight
from accelerate.launch.tidings import server_of
from accelerate.settings import env
from accelerate.settings.preemption import RESUME_VARIABLE, SIGNALS_VARIABLE
from accelerate.test_utils.scripts.test_script import CHECKS
from accelerate.topology import connect

SELF_TEST_FACTOR = 6
"""How many times the limit of a pair the ranks may wait for each other in the self test."""
OF_THE_SCRIPT = (RESUME_VARIABLE, SIGNALS_VARIABLE)
"""Settings about the checkpoints of a run. The self test has none; the script that follows gets them back."""


class Progress:
    """Shows how far the preflight is: a bar in a terminal, lines elsewhere, nothing on other ranks than the first."""

    def __init__(self, shown: bool, total: int, stream: TextIO = sys.stderr) -> None:
        self.bar: Any = None
        self.stream = stream if shown else None
        if shown and stream.isatty() and is_tqdm_available():
            from accelerate.utils import tqdm

            self.bar = tqdm(total=total, desc="preflight", leave=False, file=stream, main_process_only=False)

    def tell(self, line: str) -> None:
        """Note one more step."""
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update()
            self.bar.refresh()  # each step counts, also those that follow one another at once
        elif self.stream is not None:
            print(f"preflight: {line}", file=self.stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Do the preflight; become the script behind `--then`, if there is one. Called on all ranks."""
    options = options_from(sys.argv[1:] if argv is None else argv)
    if options.then and env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _become(options.then)  # the machines that are still there passed once
    place = links.here()
    leads = place.process.rank == 0
    shows = leads and not options.quiet
    progress = Progress(shows, _steps(place.process.world_size))
    out = sys.stderr if options.then or options.json else sys.stdout
    store = None
    try:
        member = preflight.Member(0, 0, socket.gethostname(), os.getpid(), str(place.device))
        report = preflight.Report(1, 1, place.backend, members=(member,))
        if place.process.is_distributed and place.process.world_size > 1:
            store = links.meet(place, options.time_limit)
            report = links.examine(place, store, options.time_limit, progress.tell)
        if not report.ok:
            _write(options.report, leads, report.as_json())
            if shows and report.links:
                print(preflight.table(report), file=out, flush=True)
            _fail(report)
        passed = _self_test(store, place, options.time_limit, progress.tell)
    finally:
        progress.close()
    _write(options.report, leads, {**report.as_json(), "self_test": passed})
    if shows:
        print(f"{preflight.table(report)}\nself test: {len(passed)} checks passed", file=out, flush=True)
    if options.then:
        _leave_together(store, place.process.rank, place.process.world_size)
        _become(options.then)


def options_from(words: Sequence[str]) -> argparse.Namespace:
    """Read the words after this script. Those behind `--then` are somebody else's, a `--` among them too."""
    at = list(words).index("--then") if "--then" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit", type=float, default=preflight.PAIR_SECONDS)
    parser.add_argument("--report", type=Path, help="where the first process writes what was found, as JSON")
    parser.add_argument("--json", action="store_true", help="keep the standard output free")
    parser.add_argument("--quiet", action="store_true", help="say nothing but what is wrong")
    options = parser.parse_args(words[:at])
    options.then = list(words[at + 1 :])
    return options


def _steps(world_size: int) -> int:
    return (1 + len(preflight.rounds(range(world_size))) if world_size > 1 else 0) + len(CHECKS)


def _self_test(store: Any, place: links.Place, limit: float, tell: Callable[[str], object]) -> list[dict[str, Any]]:
    """Run the checks that are shipped; return their names and times."""
    process = place.process
    if store is not None:
        # A group of our own: the script that follows uses the store of the run, and must find no traces in it.
        patience = timedelta(seconds=SELF_TEST_FACTOR * limit)
        connect.make_group(
            store, "self test", rank=process.rank, world_size=process.world_size, backend=place.backend, limit=patience
        )
    with env.applied(dict.fromkeys(OF_THE_SCRIPT)):
        accelerator = Accelerator()
    passed = []
    for check in CHECKS:
        began = time.monotonic()
        check(accelerator)
        accelerator.wait_for_everyone()
        name = check.__name__.removeprefix("check_")
        passed.append({"name": name, "seconds": round(time.monotonic() - began, 3)})
        tell(f"self test: {name} passed")
    accelerator.end_training()
    connect.leave_group()
    return passed


def _write(file: Path | None, leads: bool, found: dict[str, Any]) -> None:
    if file is not None and leads:
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.rename(file)


def _leave_together(store: Any, rank: int, world_size: int) -> None:
    """Let no rank begin the script while the store of the preflight, if rank 0 serves it, could be taken for the script's."""
    if store is None or connect.serves_store():
        return
    if rank == 0:
        store.wait([f"done/{other}" for other in range(1, world_size)])
        return  # the system closes it when this process becomes the script
    # A connection of our own: torch prints pages when it finds one of its closed.
    address = server_of(store)
    assert address is not None, "links.meet returns no store of another kind"
    with suppress(OSError), socket.create_connection(address) as connection:
        store.set(f"done/{rank}", "")
        connection.recv(1)  # nothing is sent: it returns when it is closed


def _become(words: Sequence[str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(words[0], list(words))


def _fail(report: preflight.Report) -> NoReturn:
    """Tell the launcher why the ranks cannot work together, and leave."""
    for member in report.members:
        if member.rank in report.silent:
            _continue_sibling(member.pid)
    # One line: the launcher repeats the last one.
    raise preflight.PreflightFailed(" ".join("\n".join(report.problems).splitlines()))


def _continue_sibling(pid: int) -> None:
    """Let a worker of this machine that somebody stopped go on, so that it can hear that the run has ended."""
    try:
        if psutil.Process(pid).ppid() == os.getppid():
            os.kill(pid, signal.SIGCONT)
    except (psutil.Error, OSError):  # of another machine, or gone
        return


if __name__ == "__main__":
    main()
