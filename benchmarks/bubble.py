"""How long the ranks of a pipeline wait: for real on two cores, and with emulated compute on more.

Of the time that the slowest rank takes for the microbatches of a step, the part in which ranks did
not work, as the mean of all and of some steps; beside the formula of its schedule. Emulated layers
sleep forward, and twice as long backward, so that ranks need no cores of their own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import harness
import models
import torch
from torch import Tensor, nn

import allfuse as af
from allfuse.plan import Pipe, as_plan

REAL = ("pipe(2, microbatches=4)", "pipe(2, microbatches=8)")
EMULATED = (
    "pipe(2, microbatches=4)",
    "pipe(2, microbatches=8)",
    "pipe(4, microbatches=8)",
    "pipe(4, schedule=gpipe, microbatches=8)",
    "pipe(4, schedule=interleaved(2), microbatches=8)",
)
BATCH, STEPS = 32, 10
FORWARD_S = 0.006  # of an emulated layer
LAYERS = 8


class Emulated(nn.Linear):
    """A layer that takes time and no processor."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if type(x) is Tensor:
            time.sleep(FORWARD_S)
        if y.requires_grad:
            y.register_hook(lambda _: time.sleep(2 * FORWARD_S))
        return y


def emulated() -> nn.Module:
    return nn.Sequential(*(Emulated(8, 8) for _ in range(LAYERS)))


def few_classes() -> models.Columns:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 8, generator=generator), torch.zeros(256, dtype=torch.long)


EMULATED_CASE = models.Case(
    name="emulated", model=emulated, data=few_classes, optimizer=models.momentum, share=BATCH
)


def idle_shares(case: models.Case, steps: int) -> list[float]:
    """Runs in each worker: of each step the part in which ranks did not work."""
    with af.session(quiet=True) as session:
        loop = models.SessionLoop(session, case, case.data(), BATCH)
        loop.run(2)
        pipeline = session.split.pipeline
        assert pipeline is not None
        link, learn = session.place.mates, pipeline.learn
        told = torch.zeros(link.size, 2, steps, dtype=torch.float64)  # seconds at work, and in all

        def timed(*args: Any) -> None:
            waited_s, begin = pipeline.waited_s, time.perf_counter()
            learn(*args)
            span_s = time.perf_counter() - begin
            seconds.append((span_s - (pipeline.waited_s - waited_s), span_s))

        seconds: list[tuple[float, float]] = []
        vars(pipeline)["learn"] = timed
        loop.run(steps)
        loop.close()
        told[link.rank] = torch.tensor(seconds, dtype=torch.float64).T
        link.all_reduce(told, "tell who waited").wait()
    shares: list[float] = (1 - told[:, 0].mean(0) / told[:, 1].amax(0)).tolist()
    return shares


def figures(real: Callable[[], nn.Module], quick: bool) -> list[harness.Figure]:
    """Args: real: the model that is computed by two processes, of one thread each."""
    case = models.Case(
        name="decoder", model=real, data=models.texts, optimizer=models.adamw, share=BATCH
    )
    runs = [("", case, plan) for plan in REAL]
    runs += [(", emulated compute", EMULATED_CASE, plan) for plan in EMULATED]
    found = []
    for label, made, plan in runs[:1] if quick else runs:
        work = functools.partial(idle_shares, made, 2 if quick else STEPS)
        shares = af.launch(work, workers=as_plan(plan).workers, plan=plan, threads=1)
        (axis,) = as_plan(plan).axes
        assert isinstance(axis, Pipe)
        formula = axis.schedule.bubble(axis.n, axis.microbatches or 1)
        text = f"by the schedule {formula:.3f}"
        found.append(harness.figure(f"{plan}: idle share of its ranks{label}", shares, floor=text))
    return found
