"""Runs of several ranks that end in a chosen way; prints how each rank ended. Started by `test_clean_exit.py`.

    python tests/fault/exits.py --runs 10 --world 4 --end forgets --provoke --unprotected

One parent imports torch and the library, then forks the ranks of each run, which makes a run cost tenths of a second.
A rank does not leave through `os._exit` as the children of `multiprocessing` do: it returns from `main` and falls off
the end of this file, so the interpreter finalises exactly as that of a script does. The parent takes the status from
`waitpid`.
"""

from __future__ import annotations

import argparse
import atexit
import contextvars
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import accelerate.runtime.state
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))  # this file is a program
from tests.support.ranks import free_port

torch.optim.SGD(torch.nn.Linear(1, 1).parameters())  # imports a great deal, which is then shared by all ranks

ENDS = ("forgets", "ends", "destroys", "attached", "exception", "exit_3", "exit_text", "os_exit", "in_flight")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--end", choices=ENDS, default="forgets")
    parser.add_argument("--provoke", action="store_true", help="make the race all but certain")
    parser.add_argument("--unprotected", action="store_true", help="without the library's departure at exit")
    return parser.parse_args()


def become_rank(rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )


def work(options: argparse.Namespace, rank: int) -> None:
    """Train three steps, and end in the way asked for; the ways of failing concern rank 0 alone."""
    if options.unprotected:
        accelerate.runtime.state.leave_cleanly_at_exit = lambda process: None
    if options.end == "attached":
        dist.init_process_group("gloo")
    atexit.register(print, f"rank {rank}: handler registered before")
    accelerator = Accelerator()
    atexit.register(print, f"rank {rank}: handler registered after")
    model = torch.nn.Linear(16, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    for _ in range(3):
        accelerator.backward(model(torch.ones(8, 16)).sum())
        optimizer.step()
        optimizer.zero_grad()
    globals()["kept"] = model  # alive until the interpreter is torn down, like everything in a script
    if options.provoke:
        provoke()
    if rank == 0:
        fail(options.end)
    if options.end in ("exit_3", "exit_text", "exception"):
        accelerator.wait_for_everyone()
    if options.end == "in_flight":
        time.sleep(12)
    if options.end == "ends":
        accelerator.end_training()
    if options.end == "destroys":
        dist.destroy_process_group()


def provoke() -> None:
    """Hold the GIL from before a collective ends until finalisation, so that the gloo thread stands waiting for it."""
    tensor = globals()["reduced"] = torch.ones(4)
    sys.modules["tabulate"] = None  # torch looks for it at exit, and a look into a folder releases the GIL
    dist.barrier()
    sys.setswitchinterval(5)
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(0.05)  # so that on the other ranks the collective ends while they hold the GIL
    torch._C._stash_obj_in_tls("context", contextvars.copy_context())  # what backward() does around its collectives
    handle = dist.all_reduce(tensor, async_op=True)
    del handle  # now, since dropping it releases the GIL for a moment
    torch._C._remove_obj_from_tls("context")
    until = time.perf_counter() + 0.15
    while time.perf_counter() < until:
        pass


def fail(end: str) -> None:
    if end == "exception":
        raise RuntimeError("rank 0 failed on purpose")
    if end == "exit_3":
        sys.exit(3)
    if end == "exit_text":
        sys.exit("rank 0 leaves with a text")
    if end == "os_exit":
        os._exit(5)
    if end == "in_flight":
        globals()["handle"] = dist.all_reduce(torch.ones(4), async_op=True)
        raise RuntimeError("rank 0 failed on purpose, and its last collective never ends")


def fork_ranks(world: int) -> tuple[int | None, dict[int, int]]:
    """Return (own rank, {}) in a child, and (None, ranks by process id) in the parent."""
    port, ranks = free_port(), {}
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, world, port)
            return rank, {}
        ranks[pid] = rank
    return None, ranks


def main() -> None:
    options = parse()
    for _ in range(options.runs):
        begin = time.perf_counter()
        own_rank, ranks = fork_ranks(options.world)
        if own_rank is not None:
            work(options, own_rank)
            return
        ended = {}
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            ended[rank] = (os.waitstatus_to_exitcode(status), time.perf_counter() - begin)
        statuses = [ended[rank][0] for rank in range(options.world)]
        print(json.dumps({"statuses": statuses, "seconds": [ended[r][1] for r in range(options.world)]}), flush=True)


main()
