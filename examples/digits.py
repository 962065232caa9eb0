"""Handwritten digits (scikit-learn's 1,797 scans of 8 x 8 pixels) with a small network.

allfuse train examples/digits.py --workers 2 --out runs/digits
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import allfuse as af


def split():
    """Pixels in 0..1 and classes, shuffled once, as train, validation and test tensors."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    parts = (slice(0, 1200), slice(1200, 1500), slice(1500, None))
    return [(pixels[part], labels[part]) for part in parts]


def job(lr=2e-3, hidden=128, epochs=30, batch_size=60, batchnorm=True) -> af.Job:
    def network():
        norm = nn.BatchNorm1d(hidden) if batchnorm else nn.Identity()
        return nn.Sequential(nn.Linear(64, hidden), norm, nn.ReLU(), nn.Linear(hidden, 10))

    train, validation, test = split()
    return af.Job(
        model=network,
        train=train,
        validation=validation,
        test=test,
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        metrics={"accuracy": af.accuracy},
        batch_size=batch_size,
        stop=af.Stop(epochs=epochs),
        inputs=[f"pixel_{i}" for i in range(64)],
        classes=[str(digit) for digit in range(10)],
    )
