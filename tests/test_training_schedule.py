"""Schedulers that are told how often they will step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_cases import job, points, train

from allfuse.base.errors import JobError
from allfuse.job import Stop
from allfuse.training.schedule import count_steps
from allfuse.verify.verify import verify_job


def cosine(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@pytest.mark.parametrize(
    ("stop", "every", "steps"),
    [
        (Stop(epochs=3), "step", 12),  # 24 samples in batches of 6
        (Stop(epochs=3, steps=10), "step", 10),
        (Stop(steps=10), "step", 10),
        (Stop(epochs=3), "epoch", 3),
        (Stop(steps=10), "epoch", 3),
    ],
)
def test_the_steps_of_a_run_are_counted(stop: Stop, every: str, steps: int) -> None:
    made = job(stop=stop, scheduler=cosine, scheduler_every=every)
    assert count_steps(made) == steps


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_a_cosine_ends_at_nothing(plan: str) -> None:
    rates: list[float] = []
    made = job(scheduler=cosine, stop=Stop(epochs=2))
    train(
        made,
        plan,
        prepare=lambda s: s.on("step", lambda s, event: rates.append(event.data["lr"])),
    )
    assert min(rates) == pytest.approx(0, abs=1e-9)
    assert max(rates) > 5e-3


def test_verify_keeps_the_length_of_the_schedule() -> None:
    seen: list[int] = []

    def scheduler(optimizer: Any, steps: int) -> Any:
        seen.append(steps)
        return cosine(optimizer, steps)

    made = lambda: job(scheduler=scheduler, stop=Stop(epochs=5))  # noqa: E731
    assert verify_job(made, "data(2)", steps=3, threads=True).ok
    assert set(seen) == {20}


def test_an_unknown_length_is_refused() -> None:
    for stop, data in ((Stop(seconds=1), points(24)), (Stop(epochs=1), iter([]))):
        with pytest.raises(JobError, match="how often it steps is not known"):
            count_steps(job(stop=stop, scheduler=cosine, train=data, batch_size=6))


def test_functions_of_one_argument_and_defaults_are_left_alone() -> None:
    def steady(optimizer: Any, gamma: float = 0.5) -> Any:
        assert gamma == 0.5
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    train(job(scheduler=steady))
