"""The job of straggler.py: digits, where computing takes time that is slept.

Several processes on a few cores are not several machines, so what a machine would compute is
emulated: each sample that is trained on costs its worker `SAMPLE_S` of sleep, four times as much at
the slow one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import allfuse as af

WORKERS, SLOW, TIMES = 4, 0, 4.0
SAMPLE_S = 0.002
BATCH = 64


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def data() -> tuple[Any, Any]:
    """(pixels in 0..1, classes) for training and for measuring the loss."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return (pixels[:1472], labels[:1472]), (pixels[1472:], labels[1472:])


def compute(rows: int, worker: int) -> None:
    """What it would take to compute so many samples there."""
    time.sleep(rows * SAMPLE_S * (TIMES if worker == SLOW else 1.0))


def cross_entropy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def job(lr: float = 0.1, steps: int = 200) -> af.Job:
    train, held_out = data()

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            compute(len(batch[1]), this_worker())
        return cross_entropy(outputs, batch)

    return af.Job(
        model=network,
        train=train,
        validation=held_out,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        batch_size=BATCH,
        evaluate_every=5,
        save_every=None,
        stop=af.Stop(steps=steps),
    )


def this_worker() -> int:
    from allfuse.launcher import current_world

    world = current_world()
    assert world is not None
    return world.rank if world.crew is None else world.crew.index


def train_ddp(lr: float, steps: int) -> list[tuple[float, int, float]]:
    """DistributedDataParallel over gloo on the same batches; (seconds, steps, held-out loss)."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from allfuse.split.data import BatchPlan

    dist.init_process_group("gloo")
    rank, each = dist.get_rank(), BATCH // WORKERS
    torch.manual_seed(0)
    (x, y), held_out = data()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    curve, done, begin = [], 0, 0.0
    plan = BatchPlan(len(y), BATCH, seed=0)
    while done < steps:
        for batch in plan.batches(epoch=done // plan.steps_per_epoch):
            own = torch.from_numpy(batch)[rank * each : (rank + 1) * each]
            optimizer.zero_grad()
            loss = cross_entropy(model(x[own]), (None, y[own]))
            compute(each, rank)
            loss.backward()
            optimizer.step()
            done += 1
            begin = begin or time.perf_counter()  # as it is told of plans: after the first step
            if done % 5 == 0:
                with torch.no_grad():
                    value = float(cross_entropy(model.module(held_out[0]), held_out))
                curve.append((time.perf_counter() - begin, done, value))
            if done == steps:
                break
    dist.destroy_process_group()
    return curve
