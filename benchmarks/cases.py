"""What is timed: pairs of functions that do the same work, by hand in PyTorch and with the library.

A case gets an `Accelerator` and returns (by hand, with the library). Both run the same number of repetitions; the
worker calls them in turn and reports the ratio of their times. The same file runs on this library and on Accelerate 1.x.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset


def tiny():
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step * 1e-6))
    return model, optimizer, scheduler


def step(accelerator):
    inputs = torch.randn(4, 10)

    def loop(model, optimizer, scheduler, backward):
        for _ in range(300):
            optimizer.zero_grad()
            backward(model(inputs).sum())
            optimizer.step()
            scheduler.step()

    plain, prepared = tiny(), accelerator.prepare(*tiny())
    return lambda: loop(*plain, torch.Tensor.backward), lambda: loop(*prepared, accelerator.backward)


def accumulate(accelerator):
    accelerator.gradient_accumulation_steps = 4
    inputs = torch.randn(4, 10)
    model, optimizer, scheduler = tiny()

    def by_hand():
        for index in range(400):
            (model(inputs).sum() / 4).backward()
            if index % 4 == 3:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    ours, our_optimizer, our_scheduler = accelerator.prepare(*tiny())

    def with_library():
        for _ in range(400):
            with accelerator.accumulate(ours):
                accelerator.backward(ours(inputs).sum())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ours.parameters(), 1.0)
                our_optimizer.step()
                our_scheduler.step()
                our_optimizer.zero_grad()

    return by_hand, with_library


class ManyOutputs(torch.nn.Module):
    """A layer whose 24 outputs come out in half precision, as the hidden states of a language model do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)

    def forward(self, inputs):
        return {f"hidden_{index}": self.layer(inputs) for index in range(24)}


def bf16(accelerator):
    inputs = torch.randn(64, 256)
    plain, prepared = ManyOutputs(), accelerator.prepare(ManyOutputs())

    def backward_of(outputs):
        return outputs["hidden_0"].float().sum()

    def by_hand():
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = plain(inputs)
            backward_of(outputs).backward()

    def with_library():
        for _ in range(20):
            accelerator.backward(backward_of(prepared(inputs)))

    return by_hand, with_library


def loader(accelerator):
    plain = DataLoader(range(20_000), batch_size=1)
    prepared = accelerator.prepare(DataLoader(range(20_000), batch_size=1))

    def consume(batches):
        for _ in batches:
            pass

    return lambda: consume(plain), lambda: consume(prepared)


def index(world_size):
    def case(accelerator):
        from accelerate.data_loader import BatchSamplerShard

        data = range(4_000_000)
        distributed = DistributedSampler(data, num_replicas=world_size, rank=3, shuffle=True)
        by_hand = BatchSampler(distributed, 32, drop_last=False)
        ours = BatchSamplerShard(BatchSampler(RandomSampler(data), 32, drop_last=False), world_size, 3)

        def consume(batches):
            for _ in batches:
                pass

        return lambda: consume(by_hand), lambda: consume(ours)

    return case


def skip(accelerator):
    from accelerate import skip_first_batches

    generator = torch.Generator().manual_seed(1)
    data = range(5_000_000)
    prepared = accelerator.prepare(DataLoader(data, batch_size=32, shuffle=True, generator=generator))

    def by_hand():
        torch.randperm(5_000_000, generator=generator)

    def with_library():
        next(iter(skip_first_batches(prepared, 150_000)))

    return by_hand, with_library


def ddp(accelerator):
    inputs = torch.randn(4, 10)

    def loop(model, optimizer, scheduler, backward):
        for _ in range(100):
            optimizer.zero_grad()
            backward(model(inputs).sum())
            optimizer.step()
            scheduler.step()

    model, optimizer, scheduler = tiny()
    plain = DistributedDataParallel(model), optimizer, scheduler
    prepared = accelerator.prepare(*tiny())
    return lambda: loop(*plain, torch.Tensor.backward), lambda: loop(*prepared, accelerator.backward)


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(accelerator):
    predictions, labels = torch.randn(32, 10), torch.zeros(32, dtype=torch.long)

    def one(tensor):
        joined = tensor.new_empty((2 * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(joined, tensor)
        return joined

    def by_hand():
        for _ in range(100):
            one(predictions), one(labels)

    def with_library():
        for _ in range(100):
            accelerator.gather_for_metrics((predictions, labels))

    return by_hand, with_library


def pad(accelerator):
    ragged = torch.randn(32, 10 + accelerator.process_index)

    def by_hand():
        for _ in range(100):
            sizes = torch.empty(2, dtype=torch.long)
            _all_gather(sizes, torch.tensor([ragged.shape[1]]))
            longest = int(sizes.max())
            padded = ragged
            if longest != ragged.shape[1]:
                padded = ragged.new_zeros(32, longest)
                padded[:, : ragged.shape[1]] = ragged
            joined = padded.new_empty(64, longest)
            _all_gather(joined, padded)

    def with_library():
        for _ in range(100):
            accelerator.gather(accelerator.pad_across_processes(ragged, dim=1))

    return by_hand, with_library


def dispatch(accelerator):
    from accelerate.data_loader import prepare_data_loader

    data = TensorDataset(torch.randn(3200, 64), torch.zeros(3200, dtype=torch.long))
    prepared = prepare_data_loader(
        DataLoader(data, batch_size=16), accelerator.device, put_on_device=True, dispatch_batches=True
    )
    rank = accelerator.process_index

    def by_hand():
        batches = iter(DataLoader(data, batch_size=16))
        inputs, labels = torch.empty(16, 64), torch.empty(16, dtype=torch.long)
        for _ in range(100):
            if rank == 0:
                read = [next(batches), next(batches)]
                both = [torch.cat([one[part] for one in read]) for part in range(2)]
                dist.scatter(inputs, list(both[0].chunk(2)))
                dist.scatter(labels, list(both[1].chunk(2)))
            else:
                dist.scatter(inputs)
                dist.scatter(labels)

    def with_library():
        for _ in prepared:
            pass

    return by_hand, with_library


# name -> (what it is, case, processes, keywords of Accelerator, bound on our ratio, only here)
CASES = {
    "step": ("step of a 10x10 layer, optimizer, scheduler", step, 1, {}, 1.10),
    "accumulate": ("the same, accumulation 4 and clipping", accumulate, 1, {"gradient_accumulation_steps": 4}, 1.10),
    "bf16": ("bf16 step, 24 outputs returned in float32", bf16, 1, {"mixed_precision": "bf16"}, 1.30),
    "bf16-as-is": ("bf16 step, 24 outputs left as they are", bf16, 1, {"mixed_precision": "bf16"}, 1.05),
    "loader": ("loader of 20,000 single-sample batches", loader, 1, {}, 1.05),
    "index-64": ("index work, 4,000,000 samples, rank 3 of 64", index(64), 1, {}, 0.5),
    "index-8": ("index work, 4,000,000 samples, rank 3 of 8", index(8), 1, {}, None),
    "skip": ("batch 150,000 of 156,250, against one permutation", skip, 1, {}, 1.10),
    "ddp": ("2-process DDP step", ddp, 2, {}, 1.03),
    "gather": ("gather_for_metrics, 2 processes", gather, 2, {}, 1.10),
    "pad": ("pad_across_processes and gather, 2 processes", pad, 2, {}, 1.10),
    "dispatch": ("dispatched batches, 2 processes", dispatch, 2, {}, 1.10),
}

ONLY_HERE = {"bf16-as-is"}
