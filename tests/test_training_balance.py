"""Shares by measured speed: what is slow gets less, and the numbers stay those of one process.

How fast a worker is is scripted: its loss sleeps for each of its samples.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import (
    Recorded,
    assert_all_equal,
    assert_equal,
    job,
    mse,
    normed_network,
    points,
    under,
)

from allfuse.base.errors import DataError, PlanError
from allfuse.job import Stop
from allfuse.launcher import current_world
from allfuse.plan import Plan
from allfuse.split.data import BatchPlan, ColumnSource, Loader, Portion
from allfuse.training.balance import EVERY, RECORD, Balance, apportion, parse
from allfuse.training.exchange import Figures
from allfuse.training.loop import Result, train_job
from allfuse.training.session import Session
from allfuse.verify import verify_job

SECONDS = 0.0005  # what a worker of speed 1 takes for a sample


def slept(speed: Callable[[int], float]) -> Callable[[Any, Any], Tensor]:
    """A loss that takes its time for each sample; `speed` of a rank."""

    def loss(outputs: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            world = current_world()
            time.sleep(len(batch[1]) * SECONDS / (speed(world.rank) if world else 1.0))
        return mse(outputs, batch)

    return loss


def slow(which: int) -> Callable[[int], float]:
    return lambda rank: 0.25 if rank == which else 1.0


def balanced(**changes: Any) -> Any:
    return job(
        train=points(96),
        batch_size=32,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        **{"loss": slept(slow(0)), "stop": Stop(steps=40), **changes},
    )


def go(made: Any, plan: str, **options: Any) -> tuple[list[Result], list[list[tuple[int, ...]]]]:
    """The results of all ranks, and the shares of every step as each of them saw it."""
    seen: dict[int, Recorded] = {}

    def prepare(s: Session) -> None:
        seen[s.rank] = Recorded()
        seen[s.rank].attach(s)

    results = under(plan, lambda: train_job(made, prepare=prepare, **options))
    steps = [seen[rank].named("step") for rank in sorted(seen)]
    return results, [[tuple(event.data["shares"]) for event in own] for own in steps]


class FakeLink:
    """Stands for the link to n replicas: a Balance asks it for numbers only."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0


def make_balance(size: int, least: int = 1, ahead: int = 0) -> Balance:
    made = Balance(FakeLink(size), least, lambda text: None)  # type: ignore[arg-type]
    made.ahead = ahead
    return made


class Course:
    """Drives a Balance through epochs of batches without training: workers of known speeds.

    The loader asks for the shares of a batch `ahead` steps before it is worked on.
    """

    def __init__(self, balance: Balance, batches: list[int], ahead: int = 0) -> None:
        self.balance, self.batches, self.ahead = balance, batches, ahead
        self.asked: list[tuple[int, ...]] = []
        self.done = 0
        self.busy = [0.0] * balance.link.size

    def step(self, seconds: Callable[[int, int], float]) -> tuple[int, ...]:
        """One step, in which rank i works seconds(i, rows)."""
        epoch, place = divmod(self.done, len(self.batches))
        while len(self.asked) <= min(place + self.ahead, len(self.batches) - 1):
            here = len(self.asked)
            self.asked.append(self.balance.cut(self.batches[here], epoch, here))
        rows = self.asked[place]
        portion = Portion(None, rows[0], rows, epoch, place, place == len(self.batches) - 1)
        self.balance.hear(portion, Figures([0.0], [1.0], self.busy, [0]))
        self.busy = [seconds(rank, n) for rank, n in enumerate(rows)]
        self.done += 1
        if portion.last:
            self.asked = []
        return rows


@pytest.mark.parametrize("speeds", [(1, 1), (1, 4, 4, 4), (0.3, 1, 7), (1e-6, 1, 1), (5,)])
@pytest.mark.parametrize("least", [1, 3])
def test_rows_are_as_proportional_as_whole_rows_can_be(
    speeds: tuple[float, ...], least: int
) -> None:
    for total in (*range(20), 64, 1001):
        rows = apportion(total, speeds, least)
        assert sum(rows) == total
        floor = min(least, total // len(speeds))
        assert min(rows) >= floor
        slowest = max(n / speed for n, speed in zip(rows, speeds, strict=True))
        for giver in range(len(rows)):  # nobody gains by handing a row to another
            for taker in range(len(rows)):
                if rows[giver] > floor and giver != taker:
                    moved = list(rows)
                    moved[giver], moved[taker] = rows[giver] - 1, rows[taker] + 1
                    spent = max(n / speed for n, speed in zip(moved, speeds, strict=True))
                    assert spent >= slowest * (1 - 1e-12)


@pytest.mark.parametrize("overhead", [0.0, 5.0])
@pytest.mark.parametrize("ahead", [0, 4])
def test_shares_come_to_where_all_are_done_at_once(overhead: float, ahead: int) -> None:
    speeds = (1, 4, 2, 4)

    def seconds(rank: int, rows: int) -> float:
        return overhead + rows / speeds[rank]

    course = Course(make_balance(4, ahead=ahead), [256] * 10, ahead)
    steps = [course.step(seconds) for _ in range(60)]
    assert all(sum(rows) == 256 for rows in steps)
    spent = [seconds(rank, rows) for rank, rows in enumerate(steps[-1])]
    assert max(spent) < 1.1 * (
        sum(n / v for n, v in zip(steps[-1], speeds, strict=True)) / 4 + overhead
    )


def test_a_worker_that_becomes_slow_later_is_noticed_and_recovers() -> None:
    course = Course(make_balance(2), [40] * 7)
    for _ in range(30):
        assert course.step(lambda rank, rows: rows) == (20, 20)
    for _ in range(2 * EVERY):
        course.step(lambda rank, rows: rows * (3 if rank == 1 else 1))
    assert course.step(lambda rank, rows: rows) == (30, 10)
    for _ in range(2 * EVERY):
        course.step(lambda rank, rows: rows)
    assert course.step(lambda rank, rows: rows) == (20, 20)


def test_small_differences_and_single_slow_steps_change_nothing() -> None:
    course = Course(make_balance(2), [40] * 100)
    for number in range(60):
        hiccup = 50 if number % 5 == 0 else 1
        rows = course.step(lambda rank, n, h=hiccup: n * (1.03 if rank else 1) * (h if rank else 1))
        assert rows == (20, 20)


@pytest.mark.parametrize("batches", [[3] * 9, [5] * 5 + [2], [7], [4, 1, 6]])
def test_small_and_odd_batches_are_whole_and_leave_nobody_out_who_could_have_a_row(
    batches: list[int],
) -> None:
    course = Course(make_balance(4), batches)
    for number in range(50):
        rows = course.step(lambda rank, n: 1e-3 + n * (rank + 1))
        total = batches[number % len(batches)]
        assert sum(rows) == total
        assert min(rows) >= min(1, total // 4)


def test_ranks_that_read_ahead_differently_use_the_same_shares() -> None:
    """Each hears the same; one asks 4 steps before, one 2, one when the step begins."""
    batches = [24] * 11
    courses = [Course(make_balance(3, ahead=4), batches, ahead) for ahead in (0, 2, 4)]
    changes = set()
    for number in range(70):
        turn = number // 20
        rows = {
            course.step(lambda rank, n, t=turn: n * (1 + 3 * ((rank + t) % 3 == 0)))
            for course in courses
        }
        assert len(rows) == 1
        changes |= rows
    assert len(changes) >= 4


def test_loader_processes_ask_no_sooner_than_they_say() -> None:
    asked: list[int] = []

    def cut(total: int, epoch: int, step: int) -> tuple[int, ...]:
        asked.append(step)
        return (total - 1, 1)

    source, plan = ColumnSource(torch.arange(40)), BatchPlan(40, 4, seed=0)
    loader = Loader(source, plan, parts=2, index=0, processes=1, cut=cut)
    with contextlib.closing(loader):
        for portion in loader.epoch(0):
            assert (portion.rows, portion.shares) == (3, (3, 1))
            assert max(asked) == min(portion.step + loader.ahead, 9)


def test_shares_follow_speeds_and_the_numbers_stay_those_of_one_worker() -> None:
    results, shares = go(balanced(), "data(4, balance=speed)")
    assert all(own == shares[0] for own in shares)
    assert all(sum(rows) == 32 for rows in shares[0])
    assert shares[0][0] == (8, 8, 8, 8)
    assert shares[0][-1][0] <= 5
    assert min(shares[0][-1][1:]) >= 7
    alone = under("data(1)", lambda: train_job(balanced(loss=mse)))[0]
    assert_all_equal([result.weights for result in results])
    assert_equal(results[0].weights, alone.weights)
    assert math.isclose(results[0].loss, alone.loss, rel_tol=1e-9)


def test_busy_seconds_are_of_own_work_alone() -> None:
    """Also where batch statistics meet in the midst of it: the fast one waits there."""
    told: list[list[float]] = []

    def prepare(s: Session) -> None:
        if s.is_main:
            s.on("step", lambda s, event: told.append(s.stepper.current.figures.busy_s))

    made = balanced(model=normed_network, stop=Stop(steps=8))
    under("data(2)", lambda: train_job(made, prepare=prepare))
    assert told[0] == [0.0, 0.0]
    assert sum(fast < slow / 2 for slow, fast in told[1:]) >= 5


def record_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORD).read_text().splitlines()]


def set_back(out: Path, step: int) -> None:
    """Make a run look as if it had been killed some time after a checkpoint."""
    for folder in (out / "checkpoints").glob("step-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)


def test_a_run_that_is_resumed_uses_the_shares_that_it_had_and_measures_on(tmp_path: Path) -> None:
    out, plan = tmp_path / "run", "data(3, balance=speed)"
    whole = Stop(steps=43)  # no decision is open at its end
    made = balanced(save_every=20, stop=whole)
    results, shares = go(made, plan, out=out)
    assert len(set(shares[0])) > 1
    checkpoint = 20
    set_back(out, checkpoint)
    before = (out / RECORD).read_bytes()
    other = balanced(save_every=20, stop=whole, loss=slept(slow(2)))  # what it would measure now
    again, replayed = go(other, plan, out=out, resume=True)
    assert replayed[0] == shares[0][checkpoint:]
    assert_equal(again[0].weights, results[0].weights, exact=True)
    assert (out / RECORD).read_bytes() == before
    longer = balanced(loss=slept(slow(2)), stop=Stop(steps=80))
    _, rest = go(longer, plan, out=out, resume=True)
    assert rest[0][0] == shares[0][-1]
    assert rest[0][-1][2] < rest[0][-1][0]


SITES = "site(2, every=4) * data(2, balance=speed)"


def test_each_site_shares_out_its_own_part_by_the_speed_of_its_own_workers() -> None:
    _, shares = go(balanced(), SITES)
    assert all(sum(rows) == 32 and sum(rows[:2]) == 16 for own in shares for rows in own)
    ends = [own[-1] for own in shares]
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]
    assert ends[0][0] <= 5  # rank 0 is slow
    assert abs(ends[2][2] - ends[2][3]) <= 4
    assert ends[0][2:] == ends[2][:2] == (8, 8)  # of another site it is known what it is in sum


def test_sites_that_are_resumed_use_the_shares_that_each_had(tmp_path: Path) -> None:
    out, whole = tmp_path / "run", Stop(steps=43)
    results, shares = go(balanced(save_every=20, stop=whole), SITES, out=out)
    assert len(set(shares[0])) > 1
    set_back(out, 20)
    other = balanced(save_every=20, stop=whole, loss=slept(slow(2)))  # what it would measure now
    again, replayed = go(other, SITES, out=out, resume=True)
    for rank in range(4):
        assert replayed[rank] == shares[rank][20:]
    assert_equal(again[0].weights, results[0].weights, exact=True)
    assert (out / "shares-1.jsonl").exists()


def test_other_workers_begin_evenly_and_a_spoilt_end_of_the_record_is_cut_off(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    go(balanced(), "data(3, balance=speed)", out=out)
    with open(out / RECORD, "a") as file:
        file.write('{"at": [13, 2], "sta')
    kept = [json.loads(line) for line in (out / RECORD).read_text().splitlines()[:-1]]
    _, shares = go(balanced(stop=Stop(steps=44)), "data(3, balance=speed)", out=out, resume=True)
    assert record_of(out)[: len(kept)] == kept
    _, shares = go(balanced(stop=Stop(steps=48)), "data(2, balance=speed)", out=out, resume=True)
    assert shares[0][0] == (16, 16)
    assert {"at": [14, 2], "workers": 2} in record_of(out)


@pytest.mark.parametrize(
    "line",
    [
        '{"at": [0, 8], "start": [0, 9], "speeds": [0.5, -1.0]}',
        '{"at": [0, 8], "start": [0, 9], "speeds": []}',
        '{"at": [0, 8], "start": [0, 9], "speeds": [0.5, "x"]}',
        '{"at": [0, -8]}',
        '{"at": [0, 8], "workers": 0}',
        '{"at": [0, 8], "eval": "1"}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_record_counts_up_to_its_first_line_that_says_nothing(line: str) -> None:
    good = '{"at": [0, 0], "workers": 2}\n{"at": [0, 7]}\n'
    after = '{"at": [0, 15]}\n'
    assert [each.at for each in parse(f"{good}{line}\n{after}".encode())] == [(0, 0), (0, 7)]


@pytest.mark.parametrize(
    "plan",
    [
        "data(3, balance=speed)",
        "data(2, balance=speed, codec=int8)",
        "data(3, balance=speed, rule=median)",
        "site(2, every=2) * data(2, balance=speed)",
    ],
)
@pytest.mark.parametrize("made", ["plain", "pieces"])
def test_verify_proves_a_plan_at_changing_shares(plan: str, made: str) -> None:
    changes = {"accumulate": 2, "model": normed_network} if made == "pieces" else {}
    report = verify_job(
        job(train=points(56), batch_size=16, **changes), plan, threads=True, steps=6
    )
    assert report.ok, report.lines()


def test_a_stream_cannot_be_balanced() -> None:
    stream = ((x, y) for x, y in zip(*points(8), strict=True))
    with pytest.raises(DataError, match=r"stream.*balance=speed.*next"):
        under("data(2, balance=speed)", lambda: train_job(job(train=stream)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data(4, balance=fast)", "allowed: even, speed"),
        ("data(4, balance=5)", "allowed: even, speed"),
        ("site(4, balance=speed)", "data has one"),
        ("data(4, sync=asp, balance=speed)", r"scheduler .*nearest.* data\(4, balance=speed\)"),
        (
            "site(2, sync=asp) * data(2, balance=speed)",
            r"scheduler .*nearest.* site\(2, sync=asp\) \* data\(2\)",
        ),
    ],
)
def test_plans_in_which_balance_means_nothing_are_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan.parse(text)


@pytest.mark.parametrize("text", ["data(4, balance=speed)", "data(1, balance=speed)"])
def test_balance_is_part_of_every_form_of_a_plan(text: str) -> None:
    plan = Plan.parse(text)
    assert str(plan) == text
    assert Plan.from_nest(plan.to_nest()) == plan
    assert plan.promise == "exact"
