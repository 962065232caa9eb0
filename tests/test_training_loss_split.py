"""A rank of a model that several ranks share is lost: its replica leaves as one, and the others do
again what was under way, so that an exact plan still gives the numbers of one process.

Losses are scripted on the thread link, before each of the operations of a run in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_training_loss import left_of, moments, rich_job, sgd
from torch import nn
from training_cases import assert_equal, job, points

from allfuse.job import Job, Stop
from allfuse.plan import as_plan
from allfuse.training.loop import Result, train_job


class Tied(nn.Module):
    """The first stage and the last use one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.middle, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.first(x))))
        found: torch.Tensor = self.head(torch.tanh(self.last(x)))
        return found


def tied_job() -> Job:
    return job(
        model=Tied,
        train=points(26),
        validation=points(10),
        evaluate_every=2,
        optimizer=sgd,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.7),
        clip=1.0,
        batch_size=8,
    )


def adam_job() -> Job:
    return job(validation=points(10), evaluate_every=3, clip=0.5, stop=Stop(steps=6))


@functools.cache
def alone(make: Callable[[], Job]) -> Result:
    return train_job(make())


def assert_as_one_process(left: list[Any], make: Callable[[], Job]) -> None:
    expected = alone(make)
    whole = [each.weights for each in left if each.weights]
    assert whole
    for weights in whole:
        assert_equal(weights, expected.weights)
    assert {each.steps for each in left} == {expected.steps}
    for each in left:
        assert each.metrics == pytest.approx(expected.metrics, rel=1e-9)


CASES = [
    ("data(2) * tensor(2)", rich_job),
    ("data(2) * pipe(2)", tied_job),
    ("data(2) * shard(2)", rich_job),
    ("data(3) * tensor(2)", adam_job),
]


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize(("plan", "make"), CASES)
def test_whenever_a_rank_of_a_replica_is_lost_the_numbers_are_those_of_one_process(
    plan: str, make: Callable[[], Job], victim: int
) -> None:
    run = functools.partial(train_job, make())
    for operation in moments(plan, run, victim, 6):
        left = left_of(plan, run, (victim, operation))
        assert len(left) == as_plan(plan).workers - 2
        assert_as_one_process(left, make)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize(("plan", "make"), CASES)
def test_at_whichever_operation_a_rank_is_lost_the_others_go_on(
    plan: str, make: Callable[[], Job], victim: int
) -> None:
    run = functools.partial(train_job, make())
    for operation in moments(plan, run, victim, 1000):
        left = left_of(plan, run, (victim, operation))
        assert_as_one_process(left, make)
