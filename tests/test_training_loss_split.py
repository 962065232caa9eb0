"""A rank of a model that several ranks share is lost: its replica leaves as one, and the others do
again what was under way, so that an exact plan still gives the numbers of one process.

Losses are scripted on the thread link, before each of the operations of a run in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_loss import left_of, lose, moments, rich_job, sgd
from torch import nn
from training_cases import Recorded, assert_equal, job, points

from allfuse.job import Job, Stop
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.thread import Killed, Script, ThreadLink
from allfuse.plan import as_plan
from allfuse.plan.loss import group_size
from allfuse.store.run import RunFolder
from allfuse.training.loop import Result, train_job
from allfuse.training.recovery import Among, Recovery
from allfuse.training.survival import Survival


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
    return rich_job(Tied)


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
    pytest.param("data(3) * tensor(2)", adam_job, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("plan", "make"), CASES)
def test_whenever_a_rank_of_a_replica_is_lost_the_numbers_are_those_of_one_process(
    plan: str, make: Callable[[], Job], victim: int
) -> None:
    run = functools.partial(train_job, make())
    for operation in moments(plan, run, victim, 6):
        left = left_of(plan, run, (victim, operation))
        assert len(left) == as_plan(plan).workers - 2
        assert_as_one_process(left, make)


def short_job() -> Job:
    return job(validation=points(6), evaluate_every=1, optimizer=sgd, stop=Stop(steps=1))


class Halfway:
    """What `Survival` waits for, by one message after the other, so that some hear of it sooner;
    and the operations before which the first rank had told all but the last."""

    def __init__(self) -> None:
        self.operations: list[int] = []

    def wait(self, survival: Survival, among: Among) -> None:
        link, token = survival._way_of(among), torch.zeros(1)
        if link is None:
            return
        assert isinstance(link, ThreadLink)
        if link.rank:
            link.send(token, 0, "tell that this one can").wait()
            link.receive(token, 0, "hear that all can").wait()
            return
        for peer in range(1, link.size):
            link.receive(token, peer, "tell that this one can").wait()
        for peer in range(1, link.size):
            if peer + 1 == link.size:
                self.operations.append(link.hub._counts[0])
            link.send(token, peer, "hear that all can").wait()


@pytest.mark.parametrize("plan", ["data(2) * tensor(2)", "data(2) * pipe(2)"])
def test_some_ranks_of_a_replica_may_have_ended_a_step_that_others_have_not(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These end it by themselves, from the gradients that they have; at the end of a run, too."""
    ended: list[str | None] = []
    halfway, run_on = Halfway(), Recovery.run

    def run(self: Recovery, error: Any, among: Any, *more: Any) -> Any:
        handed = run_on(self, error, among, *more)
        if handed is not None and handed.is_own:
            ended.append(among)
        return handed

    monkeypatch.setattr(Recovery, "run", run)
    monkeypatch.setattr(Survival, "_await_all", lambda self, among: halfway.wait(self, among))
    train = functools.partial(train_job, short_job())
    assert first_failure(lose(plan, train, Script())) is None
    *operations, last = list(halfway.operations)
    for operation in operations:
        assert_as_one_process(left_of(plan, train, (0, operation)), short_job)
    assert ended.count("data") == 1
    assert ended.count("all") == len(operations) - 1
    assert_as_one_process(left_of(plan, train, (0, last)), short_job)


SITES = [
    "site(2, every=2) * tensor(2)",
    "site(3, every=2, codec=int8) * tensor(2)",
    "site(2, every=3, outer=nesterov(lr=0.7)) * pipe(2)",
    "site(2, every=2) * data(2) * tensor(2)",
    "site(2, every=2) * shard(2)",
    "site(3, topology=gossip(ring)) * tensor(2)",
    "site(3, topology=gossip(ring)) * data(2)",
]


@pytest.mark.parametrize(
    "plan", [*SITES[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in SITES[2:])]
)
def test_whenever_a_rank_of_a_site_is_lost_the_others_train_to_the_end_and_are_equal(
    plan: str,
) -> None:
    made, victim = as_plan(plan), as_plan(plan).workers - 1
    run = functools.partial(train_job, job(validation=points(10), evaluate_every=2))
    for operation in moments(plan, run, victim, 5):
        results = lose(plan, run, Script(kill={(victim, operation)}))
        left = [each for each in results if not isinstance(each, Killed)]
        failure = first_failure(left)
        assert failure is None, (operation, failure)
        assert len(left) in (made.workers, made.workers - group_size(made))  # some end sooner
        assert {each.steps for each in left} == {8}
        whole = [each.weights for each in left if each.weights]
        for weights in whole[1:]:
            assert_equal(whole[0], weights, exact="gossip" not in plan)


@pytest.mark.parametrize("plan", ["data(2) * tensor(2)", "data(2) * shard(2)"])
def test_a_replica_that_is_lost_is_told_as_one_and_another_plan_goes_on(
    plan: str, tmp_path: Path
) -> None:
    recorded = Recorded()

    def prepare(s: Any) -> None:
        if s.place.world.ids[s.rank] == 2:
            recorded.attach(s)

    def run(steps: int, **options: Any) -> Any:
        made = job(optimizer=sgd, stop=Stop(steps=steps), save_every=2)
        return train_job(made, out=tmp_path / "run", **options)

    middle = moments(plan, lambda: train_job(job(stop=Stop(steps=5))), 1, 2)[1]
    left = left_of(plan, lambda: run(5, prepare=prepare), (1, middle))
    assert len(left) == 2
    (lost,) = recorded.named("lost")
    assert "rank 1 was killed" in lost.data["text"]
    assert "ranks 0 to 1 leave together; 2 of 4 workers go on" in lost.data["text"]
    assert {sum(event.data["shares"]) for event in recorded.named("step")} == {6}
    assert [event.step for event in recorded.named("step")] == [1, 2, 3, 4, 5]
    (entry,) = RunFolder.open(tmp_path / "run").record["losses"]
    assert (entry["worker"], entry["ranks"], entry["left"]) == (1, [0, 1], 2)
    results = launch_threads(lambda: run(8, resume=True), 2, plan="data(2)")
    failure = first_failure(results)
    assert failure is None, failure
    assert_equal(results[0].weights, train_job(job(optimizer=sgd, stop=Stop(steps=8))).weights)


@pytest.mark.parametrize("second", range(24, 54, 6))
def test_another_replica_may_be_lost_before_all_have_met_again(second: int) -> None:
    left = left_of("data(3) * tensor(2)", lambda: train_job(adam_job()), (4, 24), (1, second))
    assert len(left) == 2
    assert_as_one_process(left, adam_job)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize(("plan", "make"), CASES)
def test_at_whichever_operation_a_rank_is_lost_the_others_go_on(
    plan: str, make: Callable[[], Job], victim: int
) -> None:
    run = functools.partial(train_job, make())
    for operation in moments(plan, run, victim):
        left = left_of(plan, run, (victim, operation))
        assert_as_one_process(left, make)
