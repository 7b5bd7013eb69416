"""The handwritten digits that scikit-learn ships: 1,797 images of 8 x 8 pixels in ten classes."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return loaders over 1,437 training and 360 test samples; images are (1, 8, 8) in [0, 1].

    The training loader gives the number of each sample too, and leaves an incomplete last batch out.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    train_set = TensorDataset(train_images, train_labels, torch.arange(len(train_labels)))
    train = DataLoader(train_set, batch_size=batch_size, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=batch_size)
    return train, test


def network() -> nn.Module:
    """Return a small convolutional network: (n, 1, 8, 8) images to (n, 10) scores.

    It is smooth, so that the rounding of sums that are taken in another order, as other numbers of processes do, stays
    small: where it has kinks, training amplifies it until the last digit of the accuracy differs.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.GELU(),
        nn.Linear(128, 10),
    )
