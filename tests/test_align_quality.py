"""Two seeds that are aligned can be averaged: the barrier between them is nearly gone."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allfuse.merge.align.aligning import WAYS, align
from allfuse.training.calibrate import estimate_statistics

pytest.importorskip("scipy")
datasets = pytest.importorskip("sklearn.datasets")

Data = tuple[Tensor, Tensor]
BATCH, EPOCHS = 60, 15
PAIRS = ((0, 1), (2, 3), (4, 5))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.BatchNorm2d(192), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


@functools.cache
def digits() -> tuple[Data, Data]:
    """Training and test data: pictures (n, 1, 8, 8) and classes."""
    found = datasets.load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.data, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(found.target)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def batches(generator: torch.Generator | None = None) -> Iterator[Data]:
    x, y = digits()[0]
    order = torch.arange(len(y))
    if generator is not None:
        order = torch.randperm(len(y), generator=generator)
    return ((x[part], y[part]) for part in order.split(BATCH))


@functools.cache
def trained(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for x, y in batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        schedule.step()
    return module.eval()


@torch.no_grad()
def barrier(one: nn.Module, two: nn.Module, of: Data) -> float:
    """The most that the loss between two models is above the line between theirs."""
    ends = [module.state_dict() for module in (one, two)]
    between, losses = copy.deepcopy(one), []
    ways = torch.linspace(0, 1, 11).tolist()
    for way in ways:
        between.load_state_dict({
            name: torch.lerp(ends[0][name], ends[1][name], way) if value.is_floating_point()
            else value for name, value in ends[0].items()
        })  # fmt: skip
        estimate_statistics(between, batches())
        losses.append(float(F.cross_entropy(between.eval()(of[0]), of[1])))
    return max(
        loss - (1 - way) * losses[0] - way * losses[-1]
        for way, loss in zip(ways, losses, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", [perceptron, convolutions])
def test_alignment_leaves_a_fifth_of_the_barrier_at_most(build: Callable[[], nn.Module]) -> None:
    for (first, second), how in itertools.product(PAIRS, WAYS):
        one, two = trained(build, first), trained(build, second)
        moved = copy.deepcopy(two)
        align(one, moved, batches, how=how)
        for of in digits():
            before, after = barrier(one, two, of), barrier(one, moved, of)
            assert after <= 0.2 * before, f"{how}, seeds {first} and {second}: {before} to {after}"
