"""Runs with servers equal their own order of events executed serially; planted faults are found.

Faults are planted in servers and workers; the process that executes the events never calls what is
changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from crews import small_job
from torch import Tensor, nn

from allfuse.base.errors import AllfuseError, PlanError
from allfuse.launcher import current_world
from allfuse.plan import as_plan
from allfuse.roles import shard as shards
from allfuse.roles.messages import Weights
from allfuse.roles.replica import Replica
from allfuse.roles.rotation import ALL
from allfuse.roles.shard import Shard
from allfuse.roles.terms import terms_of
from allfuse.roles.updates import Updates
from allfuse.split.data import Loader, Portion
from allfuse.verify import Report, verify_job
from allfuse.verify.history import Event, History, Update

ASP = "data(2, topology=central(servers=2), sync=asp)"
BSP = "data(3, topology=central(servers=2))"
STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread_each() -> Iterator[None]:
    """Ranks are threads already; torch's own would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(plan: str, steps: int = STEPS, **changes: Any) -> Report:
    """Verify on threads."""
    return verify_job(functools.partial(small_job, **changes), plan, steps=steps, threads=True)


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def weighted(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum and what the mean is over, which is not the number of samples."""
    weights = 1.0 + batch[1]
    losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
    return (losses * weights).sum(), weights.sum()


def is_equal_bit_for_bit(report: Report) -> bool:
    return report.ok and report.notes[-1].endswith("agree bit for bit")


@pytest.mark.parametrize(
    "plan",
    [
        ASP,
        "data(3, topology=central(servers=2), sync=ssp(1))",
        "data(3, topology=central(servers=1), sync=asp(scaled=true))",
        "data(2, topology=central(servers=3), sync=asp, codec=int8)",
        "data(3, topology=central(servers=2), codec=topk(0.2, warm=2))",
        "site(2, every=2, sync=asp)",
        "site(2, every=3, sync=asp, outer=momentum, codec=int8)",
        "site(3, every=2, topology=central(servers=2))",
        "site(2, every=3, delay=2, topology=central(servers=2))",
        "site(2, every=3, delay=1, sync=asp, codec=topk(0.2))",
    ],
)
def test_a_run_equals_its_events_executed_serially_bit_for_bit(plan: str) -> None:
    report = check(plan, scheduler=halve, loss=weighted)
    assert is_equal_bit_for_bit(report), report.lines()
    assert report.promise == "replayed"
    assert all(row.differences for row in report.rows)


def test_what_is_in_step_equals_one_process_too() -> None:
    report = check(BSP, scheduler=halve)
    assert report.ok, report.lines()
    assert report.promise == "exact"
    assert report.also is not None
    assert is_equal_bit_for_bit(report.also)
    ssp = check(f"{BSP[:-1]}, sync=ssp(0))")
    assert ssp.ok
    assert ssp.promise == "exact"


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    ],
)
def test_optimizers_that_round_by_where_they_are_cut_differ_by_rounding(optimizer: Any) -> None:
    """Torch's fused steps round the last elements of a tensor otherwise."""
    report = check(ASP, optimizer=optimizer)
    assert report.worst.size <= 1e-12
    assert report.loss.size <= 1e-12


class Normed(nn.Module):
    """BatchNorm, whose buffers meet at the servers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


@pytest.mark.parametrize("plan", [ASP, "site(2, every=2, sync=asp) * data(2)"])
def test_buffers_and_groups_are_replayed(plan: str) -> None:
    report = check(plan, model=Normed, batch_size=16, clip=0.5, accumulate=2)
    assert report.ok, report.lines()


def test_a_gradient_that_servers_clip_is_replayed() -> None:
    report = check(BSP, clip=0.1)
    assert report.ok, report.lines()
    assert report.also is not None
    assert is_equal_bit_for_bit(report.also)


def test_a_server_that_does_not_clip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Shard.update

    def careless(self: Shard, piece: int, pushes: Any, options: Any, factor: float = 1.0) -> None:
        update(self, piece, pushes, options)

    monkeypatch.setattr(Shard, "update", careless)
    assert_found(check(BSP, clip=0.1))


def test_a_part_without_samples_is_replayed() -> None:
    report = check("data(8, topology=central(servers=1), sync=asp)", steps=7)  # 7 samples at last
    assert is_equal_bit_for_bit(report), report.lines()


def over_few(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum and what the mean is over: for many shares nothing."""
    counts = (batch[0][:, 0] > 1.2).double()
    losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
    return (losses * counts).sum(), counts.sum()


@pytest.mark.parametrize("plan", ["data(4, sync=asp(scaled=true))", "site(4, every=2, sync=asp)"])
def test_a_share_whose_loss_is_over_nothing_is_replayed(plan: str) -> None:
    report = check(plan, loss=over_few)
    assert is_equal_bit_for_bit(report), report.lines()


def test_what_was_found_is_told_in_words_and_as_json() -> None:
    report = check(BSP, steps=3)
    text = "\n".join(report.lines())
    assert "promise     exact" in text
    assert "promise     replayed" in text
    assert "scheduler's book" in text
    assert "speed" not in text
    found = json.loads(json.dumps(report.as_dict()))
    assert found["ok"]
    assert found["norm"] is None
    assert found["also"]["ok"]
    assert found["also"]["norm"]["size"] == 0.0


# Planted faults.


def once(function: Callable[..., Any], at: int, fault: Callable[..., Any]) -> Callable[..., Any]:
    """The function; at its so-manieth call the fault, which is given the function first."""
    calls = iter(range(10**9))

    def planted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            return fault(function, *args, **kwargs)
        return function(*args, **kwargs)

    return planted


def assert_found(report: Report) -> None:
    assert not report.ok
    assert report.first is not None
    assert report.first.size > 1e-4


@pytest.mark.parametrize("plan", [ASP, "site(2, every=2, sync=asp)"])
def test_an_order_that_a_server_applies_twice_is_found(
    monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    def twice(update: Any, *args: Any) -> None:
        update(*args)
        update(*args)

    monkeypatch.setattr(Shard, "update", once(Shard.update, 3, twice))
    assert_found(check(plan))


def test_an_order_that_a_server_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "update", once(Shard.update, 5, lambda *args: None))
    assert_found(check(ASP))


def test_a_learning_rate_that_a_server_keeps_too_long_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update = Shard.update

    def stale(self: Shard, piece: int, pushes: Any, options: Any, factor: float = 1.0) -> None:
        update(self, piece, pushes, [])

    monkeypatch.setattr(Shard, "update", stale)
    assert_found(check(ASP, scheduler=halve))
    assert check(ASP).ok  # it is no fault where the learning rate stays


def test_a_worker_whose_learning_rate_is_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from allfuse.training.leased import LeasedCourse

    advance = LeasedCourse._advance_schedulers

    def late(self: LeasedCourse, step: int, epoch: int) -> None:
        advance(self, max(step - 2, 0), epoch)

    monkeypatch.setattr(LeasedCourse, "_advance_schedulers", late)
    assert_found(check(ASP, scheduler=halve))


def test_a_worker_on_the_wrong_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(leased: Any, self: Loader, steps: Any, part: int, parts: int) -> Iterator[Portion]:
        return leased(self, steps, (part + 1) % parts, parts)

    monkeypatch.setattr(Loader, "leased", once(Loader.leased, 4, other))
    assert_found(check(ASP))


def test_a_worker_that_keeps_older_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Replica.take

    def keep(self: Replica, server: int, message: Weights) -> bool:
        kept = [flat.clone() for flat in self.read]
        took = take(self, server, message)
        world = current_world()
        late = message.sequence >= 4 and world is not None and world.crew is not None
        if late and world.crew.index == 1:  # type: ignore[union-attr]
            for flat, old in zip(self.read, kept, strict=True):
                flat.copy_(old)
        return took

    monkeypatch.setattr(Replica, "take", keep)
    assert_found(check(ASP, steps=10))


def test_a_server_that_weighs_parts_alike_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weighted_sum = shards.weighted_sum

    def alike(parts: Any) -> Tensor:
        return weighted_sum([(1 / len(parts), values) for _, values in parts])

    monkeypatch.setattr(shards, "weighted_sum", alike)
    report = check(BSP, loss=weighted)
    assert_found(report)
    assert report.also is not None
    assert_found(report.also)


def test_an_error_of_a_codec_that_is_not_fed_back_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Updates, "keep", lambda self: None)
    assert_found(check("data(2, topology=central(servers=1), sync=asp, codec=topk(0.2))"))


def test_a_worker_that_tells_another_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from allfuse.roles.agent import Agent

    finish = Agent.finish

    def lie(self: Agent, options: Any, **told: Any) -> None:
        finish(self, options, **{**told, "loss": told["loss"] * 1.01})

    monkeypatch.setattr(Agent, "finish", lie)
    assert_found(check(ASP))


# Records that cannot be right.

SSP = "data(2, topology=central(servers=1), sync=ssp(1))"


def record(plan: str = ASP, limit: int = 3) -> tuple[History, Any]:
    """Two workers in turns, each from the weights after its last update."""
    events = [Event(0, [], ["a", "b"])]
    for number in range(2 * limit):
        step, part = divmod(number, 2)
        worker, read = "ab"[part], max(0, number - 1)
        update = Update(
            number, worker, part, step, step, 1, part, read, weight=1.0, loss=1.0, count=5.0,
            options=[], fragment=ALL, behind=5.0,
        )  # fmt: skip
        events.append(Event(number + 1, [update], [worker]))
    return History(events, limit, 0), terms_of(as_plan(plan), 30.0)


def change(history: History, number: int, **fields: Any) -> History:
    event = history.events[number]
    event = replace(event, updates=[replace(event.updates[0], **fields)])
    return replace(history, events=[*history.events[:number], event, *history.events[number + 1 :]])


@pytest.mark.parametrize("plan", [ASP, SSP])
def test_a_record_that_can_be_is_not_refused(plan: str) -> None:
    history, terms = record(plan)
    history.check(terms)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_step": 1, "part": 0}, "part 0 of step 1 was learned twice"),
        ({"first_step": 7}, "1 of 6 shares of work were never learned from, part 1 of step 1"),
        ({"read": 3}, "was made of version 3, which it was not sent"),
        ({"weight": 0.5}, "counted 0.5, and should have 1.0"),
    ],
)
def test_a_record_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    history, terms = record()
    with pytest.raises(AllfuseError, match=message):
        change(history, 4, **fields).check(terms)


def test_a_worker_too_far_ahead_in_the_record_is_refused() -> None:
    history, terms = record(SSP)
    with pytest.raises(AllfuseError, match="was 2 clocks ahead; the plan allows 1"):
        change(change(history, 1, clock=0), 3, clock=2).check(terms)


# What verify cannot replay, and processes.


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=2, sync=asp) * data(2, codec=int8)",
        "site(2, every=2, sync=asp) * data(3, rule=median)",
    ],
)
def test_what_groups_fuse_otherwise_than_by_a_plain_mean_is_refused(plan: str) -> None:
    with pytest.raises(PlanError, match="cannot replay data"):
        check(plan)


@pytest.mark.slow
def test_a_run_of_processes_equals_its_events_executed_serially() -> None:
    for plan in (ASP, "site(2, every=2, sync=asp, codec=int8)"):
        report = verify_job(small_job, plan, steps=4)
        assert report.ok, report.lines()
        assert report.worst.size <= 1e-12
