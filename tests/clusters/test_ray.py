"""A real group of two workers of Ray Train. `make ray` installs Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.full
LIMIT_SECONDS = 400
DRIVER = """
import json, os, sys
import ray, ray.train
from ray.train.torch import TorchConfig, TorchTrainer


def work(options):
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    made_by_ray = dist.distributed_c10d._get_default_group()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    data = torch.utils.data.TensorDataset(torch.arange(32.0).reshape(8, 4) / 32)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), torch.utils.data.DataLoader(data, batch_size=2)
    )
    seen = 0
    for (batch,) in loader:
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        seen += len(batch)
    weights = accelerator.gather(model.module.weight.detach())
    told = {
        "met": accelerator.gather(torch.tensor([accelerator.process_index])).tolist(),
        "local": accelerator.local_process_index,
        "rank": ray.train.get_context().get_world_rank() == accelerator.process_index,
        "seen": seen,
        "same weights": bool(torch.equal(weights[0], weights[1])),
    }
    told["the group is Ray's"] = dist.distributed_c10d._get_default_group() is made_by_ray
    accelerator.end_training()
    with open(f"{options['out']}/{accelerator.process_index}", "w") as file:
        json.dump(told, file)
    ray.train.report({"seen": seen})


if __name__ == "__main__":
    out = sys.argv[1]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    TorchTrainer(
        work,
        train_loop_config={"out": out},
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False, resources_per_worker={"CPU": 0.5}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(name="test", storage_path=f"{out}/ray"),
    ).fit()
    ray.shutdown()
"""


def test_workers_of_ray_use_the_group_that_ray_made(tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: `make ray` does that")
    (tmp_path / "driver.py").write_text(DRIVER)
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "driver.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    same = {"met": [0, 1], "rank": True, "seen": 4, "same weights": True, "the group is Ray's": True}
    assert found == [{**same, "local": rank} for rank in range(2)]
