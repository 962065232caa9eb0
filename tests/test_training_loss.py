"""A worker is lost in the midst of training, and the others go on: what was under way is done again
by those that are left, so that an exact plan still gives the numbers of one process.

Losses are scripted on the thread link, before each of the operations of a run in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import (
    Recorded,
    assert_all_equal,
    assert_equal,
    job,
    mse,
    network,
    normed_network,
    points,
    session,
    weights,
)

from allfuse.base.errors import PeerLost, UserError
from allfuse.fusion.gradients import GradientFusion
from allfuse.fusion.weights import WeightFusion
from allfuse.job import Job, Stop
from allfuse.launcher.generation import LossPolicy
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.thread import Killed, Script
from allfuse.plan import as_plan
from allfuse.plan.loss import group_size, least_replicas, loss_policy
from allfuse.split.data import BatchPlan
from allfuse.store.run import RunFolder
from allfuse.training.loop import Result, train_job
from allfuse.training.rounds import Rounds

SET_UP = 0


def lose(
    plan: str, function: Callable[[], Any], script: Script, timeout_s: float = 10.0
) -> list[Any]:
    """What each rank returned, or ended with."""
    made = as_plan(plan)
    policy = LossPolicy(on_loss="continue", group=group_size(made), least=least_replicas(made))
    return launch_threads(
        function, made.workers, plan=plan, script=script, policy=policy, timeout_s=timeout_s
    )


def moments(
    plan: str, function: Callable[[], Any], victim: int, count: int | None = None
) -> list[int]:
    """Operations of a rank, evenly over a run without losses, after its beginning; or all."""
    seen: list[int] = []

    def note(rank: int, operation: int) -> float:
        if rank == victim:
            seen.append(operation)
        return 0.0

    failure = first_failure(lose(plan, function, Script(delay_s=note)))
    if failure is not None:
        raise failure
    total = max(seen) + 1
    count = count or total - SET_UP
    found = range(SET_UP, total, max(1, (total - SET_UP) // count))
    assert len(found) >= count
    return list(found)


def left_of(plan: str, function: Callable[[], Any], *kills: tuple[int, int]) -> list[Any]:
    """What those returned that were not killed, nor left with one that was."""
    results = lose(plan, function, Script(kill=set(kills)))
    left = [each for each in results if not isinstance(each, Killed)]
    assert left
    assert len(left) < len(results)
    failure = first_failure(left)
    if failure is not None:
        raise failure
    return left


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def rich_job(model: Any = normed_network) -> Job:
    """With all that a step changes halfway: batch statistics, momentum, a schedule, clipping."""
    return job(
        model=model,
        train=points(26),
        validation=points(10),
        evaluate_every=2,
        optimizer=sgd,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.7),
        clip=1.0,
        batch_size=8,
    )


def train_rich() -> Result:
    return train_job(rich_job())


@functools.cache
def alone(make: Callable[[], Job]) -> Result:
    return train_job(make())


def assert_as_one_process(left: list[Result], make: Callable[[], Job]) -> None:
    assert_all_equal([each.weights for each in left])
    assert_equal(left[0].weights, alone(make).weights)
    assert {each.steps for each in left} == {alone(make).steps}
    assert left[0].metrics == pytest.approx(alone(make).metrics, rel=1e-9)


@pytest.mark.parametrize("victim", [0, 2])
def test_whenever_a_worker_is_lost_the_numbers_are_those_of_one_process(victim: int) -> None:
    for operation in moments("data(3)", train_rich, victim, 10):  # also in evaluations
        left = left_of("data(3)", train_rich, (victim, operation))
        assert_as_one_process(left, rich_job)


@pytest.mark.parametrize(
    "plan",
    [
        "data(3, topology=ring)",
        "data(4, topology=halving)",
        "data(3, topology=tree)",
        "data(3, balance=speed)",
        "data(2, topology=central)",
    ],
)
def test_some_may_have_ended_a_step_that_others_have_not(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several buckets, messages from one to one: those that are behind take the step over."""
    small = {"bucket_bytes": 300, "first_bucket_bytes": 60}
    monkeypatch.setattr(
        GradientFusion.__init__, "__kwdefaults__", GradientFusion.__init__.__kwdefaults__ | small
    )
    for operation in moments(plan, train_rich, 1, 12):
        left = left_of(plan, train_rich, (1, operation))
        assert_as_one_process(left, rich_job)


@pytest.mark.parametrize("second", range(20, 34, 2))
def test_another_may_be_lost_before_all_have_met_again(second: int) -> None:
    left = left_of("data(4)", train_rich, (2, 20), (0, second))
    assert len(left) == 2
    assert_as_one_process(left, rich_job)


def test_one_after_the_other_until_one_is_left() -> None:
    left = left_of("data(4)", train_rich, (0, 12), (1, 20), (3, 30))
    assert len(left) == 1
    assert_as_one_process(left, rich_job)


def test_with_fewer_than_min_the_job_ends_and_names_who_was_lost() -> None:
    run = functools.partial(lose, "data(3, min=2)", train_rich)
    assert sum(isinstance(each, Result) for each in run(Script(kill={(1, 12)}))) == 2
    results = run(Script(kill={(1, 12), (2, 22)}))
    assert isinstance(results[0], PeerLost)
    assert results[0].peer == 2


def test_one_that_falls_silent_is_left_behind() -> None:
    results = lose("data(3)", train_rich, Script(stall={(1, 14)}), timeout_s=1.5)
    assert isinstance(results[1], Killed)
    assert_as_one_process([results[0], results[2]], rich_job)


def test_an_error_of_one_worker_still_ends_all() -> None:
    def work() -> Any:
        with session() as s:
            model = s.model(network)
            s.optimizer(sgd(model.parameters()))
            for batch in s.batches(points(24), batch_size=6, epochs=1):
                if s.rank == 1 and s.steps == 2:
                    raise ArithmeticError("of this worker")
                s.step(batch, mse)

    results = lose("data(3)", work, Script())
    assert isinstance(results[1], ArithmeticError)
    assert all(isinstance(results[other], PeerLost) for other in (0, 2))


def test_what_codecs_have_not_sent_goes_on_with_those_that_are_left() -> None:
    plan, run = "data(3, codec=topk(0.3))", lambda: train_job(job(batch_size=7))
    for operation in moments(plan, run, 1, 6):
        left = left_of(plan, run, (1, operation))
        assert_all_equal([each.weights for each in left])
        assert left[0].loss < 0.75 * train_job(job(stop=Stop(steps=1))).loss


# Sites.


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def site_job() -> Job:
    return job(optimizer=plain_sgd, batch_size=6, stop=Stop(epochs=2))


def serially(lost_at: int, lost_site: int) -> dict[str, torch.Tensor]:
    """Three sites whose weights are averaged after each step of SGD make one step with the mean
    gradient; what the lost one has learned in its last step is in no round."""
    torch.manual_seed(0)
    module = network()
    optimizer = plain_sgd(module.parameters())
    x, y = points(24)
    order, step = BatchPlan(24, 6, seed=0), 0
    for epoch in range(2):
        for indices in order.batches(epoch):
            rows = torch.as_tensor(indices)
            if step == lost_at:
                rows = torch.cat([rows[: 2 * lost_site], rows[2 * lost_site + 2 :]])
            optimizer.zero_grad()
            mse(module(x[rows]), (x[rows], y[rows])).backward()
            optimizer.step()
            step += 1
    return weights(module)


def test_a_round_is_done_again_among_the_sites_that_are_left() -> None:
    left = left_of("site(3)", lambda: train_job(site_job()), (1, 10))
    assert_all_equal([each.weights for each in left])
    found = [serially(step, 1) for step in range(8)]
    same = [
        all(torch.allclose(own[n], left[0].weights[n], rtol=1e-9) for n in own) for own in found
    ]
    assert sum(same) == 1


@pytest.mark.parametrize(
    "plan",
    [
        "site(3, every=2)",
        "site(3, every=end)",
        "site(2, every=3, outer=nesterov(lr=0.7))",
        "site(3, every=4, fragments=2, codec=int8)",
        "site(3, topology=gossip(ring))",
        "site(2) * data(2)",
        "site(3, every=2, topology=tree) * data(2)",
    ],
)
def test_whenever_a_site_is_lost_the_others_train_to_the_end_and_are_equal(plan: str) -> None:
    made = as_plan(plan)
    run = functools.partial(train_job, job(validation=points(10), evaluate_every=2))
    for operation in moments(plan, run, made.workers - 1, 6):
        results = lose(plan, run, Script(kill={(made.workers - 1, operation)}))
        left = [each for each in results if not isinstance(each, Killed)]
        failure = first_failure(left)
        assert failure is None, (operation, failure)
        assert len(left) in (made.workers, made.workers - group_size(made))  # some end sooner
        assert {each.steps for each in left} == {8}
        for other in left[1:]:
            assert_equal(left[0].weights, other.weights, exact="gossip" not in plan)


@pytest.mark.parametrize(
    "plan",
    [
        "site(3, every=2, codec=topk(0.3))",
        pytest.param("site(3, every=2, codec=int4, topology=ring)", marks=pytest.mark.slow),
    ],
)
def test_a_site_that_takes_a_round_over_has_sent_what_is_in_it_and_keeps_the_rest(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has missed the end of a round that another one has ended, with all that it sent itself."""
    meet, revive = Rounds.meet_peers, WeightFusion.revive
    kept: dict[int, tuple[Any, Any]] = {}
    taken: list[tuple[Any, Any]] = []

    def residuals_of(fusion: WeightFusion) -> dict[str, torch.Tensor]:
        state = fusion.capture() or {"residuals": {}}  # before the model is there
        return {name: value.clone() for name, value in state["residuals"].items()}

    def meet_peers(rounds: Rounds, quiet_until: int) -> None:
        left = residuals_of(rounds._fusion)
        meet(rounds, quiet_until)
        if rounds.place.site.size > 1:
            kept[id(rounds._fusion)] = left, residuals_of(rounds._fusion)

    def hear(fusion: WeightFusion, *args: Any) -> Any:
        taken.append(kept[id(fusion)])
        return revive(fusion, *args)

    monkeypatch.setattr(Rounds, "meet_peers", meet_peers)
    monkeypatch.setattr(WeightFusion, "revive", hear)
    run = functools.partial(train_job, replace(site_job(), stop=Stop(steps=4)))
    for operation in moments(plan, run, 1):
        left = left_of(plan, run, (1, operation))
        assert_all_equal([each.weights for each in left])
    assert taken
    assert any(value.any() for left, _ in taken for value in left.values())
    for left, after in taken:
        assert all(torch.equal(left[name], after[name]) for name in left)


# Scripts, folders, what is told.


def test_two_optimizers_of_a_script_go_through_a_loss() -> None:
    def work() -> Any:
        with session() as s:
            first, second = s.model(network, "first"), s.model(network, "second")
            one = s.optimizer(sgd(first.parameters()))
            two = s.optimizer(sgd(second.parameters()))
            for batch in s.batches(points(24), batch_size=6, epochs=1):
                s.step(batch, mse, model=first, optimizer=one)
                both = lambda outputs, batch: mse(outputs, batch) + mse(first(batch[0]), batch)  # noqa: E731
                s.step(batch, both, model=second, optimizer=two)
        return weights(first) | {f"second.{name}": w for name, w in weights(second).items()}

    expected = launch_threads(work, 1, plan="data(1)")[0]
    for operation in moments("data(3)", work, 2, 6):
        left = left_of("data(3)", work, (2, operation))
        assert_all_equal(left)
        assert_equal(left[0], expected)


class Endless(torch.utils.data.IterableDataset):
    """Rows that can only be read one after the other."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*points(26), strict=True)


def stream_job() -> Job:
    return job(train=Endless(), optimizer=sgd, batch_size=8)


def test_a_stream_is_read_on_by_those_that_are_left() -> None:
    run = functools.partial(train_job, stream_job())
    for operation in moments("data(3)", run, 1, 8):
        left = left_of("data(3)", run, (1, operation))
        assert_as_one_process(left, stream_job)


def test_sites_of_a_stream_are_refused_to_go_on() -> None:
    results = lose("site(2, every=2)", lambda: train_job(stream_job()), Script())
    assert all("allowed: data with a length" in str(each) for each in results)


def test_a_loop_that_steps_itself_is_told_that_it_cannot_do_a_step_again() -> None:
    def work() -> Any:
        with session() as s:
            model = s.model(network)
            optimizer = s.optimizer(sgd(model.parameters()))
            for batch in s.batches(points(24), batch_size=6, epochs=1):
                s.backward(mse(model(batch[0]), batch))
                optimizer.step()

    def late(rank: int, operation: int) -> float:
        return 0.3 if (rank, operation) == (2, 5) else 0.0  # the others are in the midst of a step

    results = lose("data(3)", work, Script(kill={(2, 5)}, delay_s=late))
    assert all(isinstance(results[other], PeerLost) for other in (0, 1))
    assert any("next: s.step" in str(results[other]) for other in (0, 1))


@pytest.mark.parametrize("victim", [0, 2])
def test_the_run_folder_tells_of_the_loss_and_another_plan_goes_on_from_it(
    victim: int, tmp_path: Path
) -> None:
    recorded = Recorded()

    def prepare(s: Any) -> None:
        if s.place.world.ids[s.rank] == 1:
            recorded.attach(s)

    def run(steps: int, **options: Any) -> Any:
        made = job(optimizer=sgd, stop=Stop(steps=steps), save_every=2)
        return train_job(made, out=tmp_path / "run", **options)

    left_of("data(3)", lambda: run(5, prepare=prepare), (victim, 7))
    (lost,) = recorded.named("lost")
    assert f"rank {victim} was killed" in lost.data["text"]
    (entry,) = RunFolder.open(tmp_path / "run").record["losses"]
    assert (entry["worker"], entry["before"], entry["left"]) == (victim, 3, 2)
    results = launch_threads(lambda: run(8, resume=True), 2, plan="data(2)")
    failure = first_failure(results)
    assert failure is None, failure
    whole = train_job(job(optimizer=sgd, stop=Stop(steps=8)))
    assert_equal(results[0].weights, whole.weights)


def test_sites_that_are_left_save_together_after_a_loss(tmp_path: Path) -> None:
    made = job(save_every=2, stop=Stop(epochs=2))
    run = functools.partial(train_job, made, out=tmp_path / "run")
    left = left_of("site(3, every=2)", run, (0, 9))
    longer = job(save_every=2, stop=Stop(epochs=3))
    again = functools.partial(train_job, longer, out=tmp_path / "run", resume=True)
    results = launch_threads(again, 2, plan="site(2, every=2)")
    assert first_failure(results) is None
    assert {each.steps for each in results} == {12}
    assert len(left) == 2


def test_links_without_a_policy_still_end_all() -> None:
    results = launch_threads(train_rich, 3, plan="data(3)", script=Script(kill={(1, 12)}))
    assert all(isinstance(results[other], PeerLost) for other in (0, 2))


@pytest.mark.parametrize(
    ("plan", "policy", "what"),
    [
        ("data(1)", "continue", "no second replica"),
        ("site(2, every=4, delay=1)", "continue", "on their way in the background"),
        ("data(2)", "panic", "allowed: stop, restart, continue"),
    ],
)
def test_what_cannot_be_done_about_a_loss_is_refused(plan: str, policy: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        loss_policy(as_plan(plan), policy)


def test_policies_follow_the_plan() -> None:
    found = loss_policy(as_plan("site(3, min=2) * data(4)"), "continue")
    assert (found.group, found.least) == (4, 2)
    assert loss_policy(as_plan("data(1)"), "restart").on_loss == "restart"


class Frozen(nn.Module):
    """Buffers only where it counts: a step that is undone leaves them as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1).double()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return self.layer(x)


def test_buffers_count_a_step_that_is_done_again_once() -> None:
    made = functools.partial(job, model=Frozen, optimizer=sgd)
    left = left_of("data(3)", lambda: train_job(made()), (2, 8))
    assert float(left[0].weights["seen"]) == 8
