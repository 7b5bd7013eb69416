"""Learn handwritten digits: the same loop, on any number of processes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from proof import Consumed
from torch import nn

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, tqdm
from data import loaders, network


def train(epochs: int, stop: int, batch_size: int, folder: Path) -> None:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, save_on_signals=("SIGTERM",))
    data = DataLoaderConfiguration(global_batch_size=batch_size)
    accelerator = Accelerator(project_config=project, dataloader_config=data)
    torch.manual_seed(0)
    train_loader, test_loader = loaders(batch_size)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(train_loader))
    prepared = accelerator.prepare(model, optimizer, scheduler, train_loader, test_loader)
    model, optimizer, scheduler, train_loader, test_loader = prepared
    consumed = Consumed()
    accelerator.register_for_checkpointing(consumed)
    accelerator.resume()  # with `accelerate launch --resume auto`

    for epoch in range(train_loader.position.epoch, min(epochs, stop)):
        model.train()
        for images, labels, ids in tqdm(train_loader, desc=f"epoch {epoch}", leave=False):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            consumed.add(accelerator.gather_for_metrics(ids))
        accuracy, count = evaluate(model, test_loader, accelerator)
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.2%} on {count} samples")
        accelerator.save_state()

    accuracy, count = evaluate(model, test_loader, accelerator)
    accelerator.save_model(model, folder)
    accelerator.print(consumed)
    accelerator.print(f"accuracy {accuracy:.2%} on {count} test samples; model saved in {folder / 'model.safetensors'}")


def evaluate(model: nn.Module, loader, accelerator: Accelerator) -> tuple[float, int]:
    model.eval()
    right = count = 0
    for images, labels in loader:
        with torch.no_grad():
            predictions = model(images).argmax(dim=1)
        predictions, labels = accelerator.gather_for_metrics((predictions, labels))
        right += (predictions == labels).sum().item()
        count += len(labels)
    return right / count, count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--stop-after", type=int, help="end after this epoch, to be resumed later")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("output/digits"))
    options = parser.parse_args()
    train(options.epochs, options.stop_after or options.epochs, options.batch_size, options.folder)
