"""Learn handwritten digits: a plain PyTorch loop, for one process."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from proof import Consumed
from torch import nn
from tqdm.auto import tqdm

from data import loaders, network


def train(epochs: int, stop: int, batch_size: int, folder: Path, resume: bool) -> None:
    torch.manual_seed(0)
    train_loader, test_loader = loaders(batch_size)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(train_loader))
    consumed, start = Consumed(), 0

    if resume:
        state = torch.load(folder / "checkpoint.pt")
        start = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        consumed.load_state_dict(state["consumed"])

    for epoch in range(start, min(epochs, stop)):
        model.train()
        for images, labels, ids in tqdm(train_loader, desc=f"epoch {epoch}", leave=False):
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            consumed.add(ids)
        accuracy, count = evaluate(model, test_loader)
        print(f"epoch {epoch}: accuracy {accuracy:.2%} on {count} samples")
        folder.mkdir(parents=True, exist_ok=True)
        stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "consumed": consumed}
        state = {name: item.state_dict() for name, item in stateful.items()}
        torch.save({"epoch": epoch + 1, **state}, folder / "checkpoint.pt")

    accuracy, count = evaluate(model, test_loader)
    torch.save(model.state_dict(), folder / "model.pt")
    print(consumed)
    print(f"accuracy {accuracy:.2%} on {count} test samples; model saved in {folder / 'model.pt'}")


def evaluate(model: nn.Module, loader) -> tuple[float, int]:
    model.eval()
    right = count = 0
    for images, labels in loader:
        with torch.no_grad():
            predictions = model(images).argmax(dim=1)
        right += (predictions == labels).sum().item()
        count += len(labels)
    return right / count, count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--stop-after", type=int, help="end after this epoch, to be resumed later")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("output/digits"))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the folder",
    )
    options = parser.parse_args()
    train(options.epochs, options.stop_after or options.epochs, options.batch_size, options.folder, options.resume)
