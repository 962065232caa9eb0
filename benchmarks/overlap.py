"""A worker's step over servers, 20 MB of weights: gradients that leave while backward runs, and
those that leave after it.

Steps take turns within one run: in every second one the worker keeps its gradients until the
optimizer's step. One worker and two servers, out of step, so that nobody waits for another worker.
Each process has one thread. On few cores the worker computes where servers and the sending thread
would, and so there are two kinds of steps: of arithmetic, and of less of it with 20 ms of sleep in
each layer's backward: another processor's work, emulated.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import harness
import torch
from torch import nn

import allfuse as af
from allfuse.hosting import launch_with_roles
from allfuse.plan import as_plan

WIDTH, LAYERS = 1000, 5  # 20 MB
WARM, SLEEP_S = 10, 0.02


class Slow(torch.autograd.Function):
    """Sleeps in backward: emulated work of another processor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(SLEEP_S)
        return gradient


class Layer(nn.Linear):
    def __init__(self, sleeps: bool) -> None:
        super().__init__(WIDTH, WIDTH)
        self.sleeps = sleeps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return Slow.apply(y) if self.sleeps else y  # type: ignore[no-untyped-call,no-any-return]


def work(steps: int, sleeps: bool) -> dict[bool, list[float]]:
    """Seconds of each step, by whether gradients left early."""
    torch.set_num_threads(1)
    rows = 16 if sleeps else 128
    data = torch.utils.data.TensorDataset(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH))
    times: dict[bool, list[float]] = {True: [], False: []}
    with af.session() as s:
        model = s.model(lambda: nn.Sequential(*(Layer(sleeps) for _ in range(LAYERS))))
        optimizer = s.optimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        outflow = s.stepper.outflow
        for number, batch in enumerate(s.batches(data, batch_size=rows, steps=steps, epochs=steps)):
            early = number % 2 == 0
            s.stepper.outflow = outflow if early else None
            begin = time.perf_counter()
            s.step(batch, _loss, forward=_forward, optimizer=optimizer)
            if number >= WARM:
                times[early].append(time.perf_counter() - begin)
    return times


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def _loss(outputs: Any, batch: Any) -> Any:
    return nn.functional.mse_loss(outputs, batch[1])


def measure(codec: str, steps: int, sleeps: bool) -> tuple[float, float]:
    """Median seconds of steps whose gradients leave early, and late."""
    plan = as_plan(f"data(1, topology=central(servers=2), sync=asp, codec={codec})")
    times: Any = launch_with_roles(functools.partial(work, steps, sleeps), plan, threads=1)
    return harness.quartiles(times[True])[1], harness.quartiles(times[False])[1]


def main() -> None:
    options = harness.parse_options(__doc__)
    rounds, steps = (1, 40) if options.quick else (3, 110)
    told = []
    for codec, sleeps in itertools.product(("identity", "int8"), (False, True)):
        pairs = [measure(codec, steps, sleeps) for _ in range(rounds)]
        kind = "sleeping" if sleeps else "computing"
        told.append(
            harness.figure(
                f"a {kind} step over 2 servers, codec {codec}: gradients leave early over late",
                [early / late for early, late in pairs],
                target=1.0,
                better="lower",
                floor=f"{harness.milliseconds([early for early, _ in pairs])} and "
                f"{harness.milliseconds([late for _, late in pairs])}",
            )
        )
    harness.report("overlap", told, options)


if __name__ == "__main__":
    main()
