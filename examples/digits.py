"""A job file: a small network learns scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

allfuse train examples/digits.py --workers 2 --out runs/digits
allfuse train examples/digits.py --plan "site(2, every=10)" --set lr=3e-3 --set hidden=64
allfuse verify examples/digits.py --plan "data(2)"
allfuse evaluate runs/digits --workers 2
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import allfuse as af


def job(lr=2e-3, hidden=128, epochs=30, batch_size=60, batchnorm=True) -> af.Job:
    """What is trained. Its arguments are what --set sets."""
    train, validation, test = split()
    return af.Job(
        model=lambda: network(hidden, batchnorm),
        train=train,
        validation=validation,
        test=test,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        metrics={"accuracy": af.accuracy},
        batch_size=batch_size,
        stop=af.Stop(epochs=epochs),
        inputs=[f"pixel_{i}" for i in range(64)],
        classes=[str(digit) for digit in range(10)],
    )


def network(hidden, batchnorm):
    norm = nn.BatchNorm1d(hidden) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Linear(64, hidden), norm, nn.ReLU(), nn.Linear(hidden, 10))


def split():
    """(pixels in 0..1, classes) for training, validation and test, shuffled once."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    parts = (slice(0, 1200), slice(1200, 1500), slice(1500, None))
    return [(pixels[part], labels[part]) for part in parts]
