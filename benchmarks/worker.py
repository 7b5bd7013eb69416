"""One process of a benchmark: waits for "go" on its input, times a round, prints the two times.

With several processes rank 0 talks to the parent, and the others follow it.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings

warnings.simplefilter("ignore")

import torch
import torch.distributed as dist

from cases import CASES, ONLY_HERE


def build(name):
    from accelerate import Accelerator

    _, case, _, options, _ = CASES[name]
    if name in ONLY_HERE:
        from accelerate import AutocastKwargs

        options = {**options, "kwargs_handlers": [AutocastKwargs(outputs_to_fp32=False)]}
    accelerator = Accelerator(cpu=True, **options)
    return accelerator, case(accelerator)


def seconds(function):
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    torch.set_num_threads(1)
    accelerator, functions = build(sys.argv[1])
    several = accelerator.num_processes > 1
    rank = accelerator.process_index
    for function in functions:
        function()
    gc.collect()
    gc.disable()  # a collection would fall into one of the two at random
    turn = 0
    while True:
        order = sys.stdin.readline().strip() if rank == 0 else ""
        if several:
            box = [order]
            dist.broadcast_object_list(box, 0)
            order = box[0]
        if order != "go":
            break
        # Who goes first changes every round, so that a drifting machine favours nobody.
        times = {}
        for position in (turn % 2, 1 - turn % 2):
            times[position] = seconds(functions[position])
        turn += 1
        gc.collect()
        if rank == 0:
            print(times[0], times[1], flush=True)
    sys.stdout.flush()
    os._exit(0)


main()
