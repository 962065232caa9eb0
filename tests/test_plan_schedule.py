"""Schedules of pipelines: complete, without deadlock, with the bubbles that they declare."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from allfuse.base.errors import PlanError
from allfuse.plan import Plan, pipe
from allfuse.plan.schedule import (
    SCHEDULES,
    Action,
    GPipe,
    Interleaved,
    OneForwardOneBackward,
    Schedule,
    ZeroBubble,
    ZeroBubbleV,
    charge_clock,
    derive_microbatches,
)

ALL: list[Schedule] = [made() for made in SCHEDULES.values()] + [Interleaved(3), ZeroBubble(2)]
SIZES = [(n, m) for n in (2, 3, 4) for m in range(1, 9)]


def orders(schedule: Schedule, n: int, m: int) -> list[list[Action]]:
    if schedule.most(m, n) != m:
        pytest.skip("it has no order for that number of microbatches")
    return schedule.orders(n, m)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_every_microbatch_goes_once_through_every_stage_forth_and_back(
    schedule: Schedule, n: int, m: int
) -> None:
    kinds = {"forward", "input", "weight"} if schedule.in_two else {"forward", "backward"}
    found = Counter(action for order in orders(schedule, n, m) for action in order)
    stages = range(n * schedule.each)
    assert found == Counter(Action(k, s, i) for k in kinds for s in stages for i in range(m))  # type: ignore[arg-type]
    for rank, order in enumerate(orders(schedule, n, m)):
        assert {schedule.owner(action.stage, n) for action in order} == {rank}


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_ranks_that_wait_for_each_other_come_to_an_end(schedule: Schedule, n: int, m: int) -> None:
    """By a check that knows nothing of clocks: whoever can act does, until all is done."""
    left = [list(order) for order in orders(schedule, n, m)]
    last = n * schedule.each - 1
    done: set[tuple[str, int, int]] = set()

    def able(action: Action) -> bool:
        kind, stage, i = action
        if kind == "forward":
            return stage == 0 or ("forward", stage - 1, i) in done
        if kind == "weight":
            return ("input", stage, i) in done
        after = stage == last or {("input", stage + 1, i), ("backward", stage + 1, i)} & done
        return ("forward", stage, i) in done and bool(after)

    while any(left):
        ready = [order for order in left if order and able(order[0])]
        assert ready, [order[:1] for order in left]
        for order in ready:
            done.add(order.pop(0))


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SIZES if m >= n])
def test_bubbles_are_those_of_the_papers(n: int, m: int) -> None:
    plain = (n - 1) / (m + n - 1)
    assert GPipe().bubble(n, m) == pytest.approx(plain)
    assert OneForwardOneBackward().bubble(n, m) == pytest.approx(plain)
    assert ZeroBubble().bubble(n, m) == pytest.approx((n - 1) / (3 * m + n - 1))
    if m % n == 0:
        for each in (2, 3):
            expected = (n - 1) / (each * m + n - 1)
            assert Interleaved(each).bubble(n, m) == pytest.approx(expected)
    if m >= 2 * n - 1:
        assert ZeroBubbleV().bubble(n, m) < ZeroBubble().bubble(n, m)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 4), (3, 3), (3, 7), (4, 4), (4, 8)])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("GPipe", GPipe()),
        ("1F1B", OneForwardOneBackward()),
        ("Interleaved1F1B", Interleaved(2)),
        ("InterleavedZeroBubble", ZeroBubble(2)),
        ("ZBVZeroBubble", ZeroBubbleV()),
    ],
)
def test_orders_are_those_of_torch(theirs: str, ours: Schedule, n: int, m: int) -> None:
    if ours.most(m, n) != m:
        pytest.skip("neither has an order for that number of microbatches")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.pipelining import _schedule_visualizer as visualizer

        listed = visualizer.get_schedule_ops(theirs, n, m)
    kinds = {
        "FORWARD": "forward",
        "FULL_BACKWARD": "backward",
        "BACKWARD_INPUT": "input",
        "BACKWARD_WEIGHT": "weight",
    }
    for rank, found in enumerate(listed):
        actions = [each for each in found if each is not None]
        told = [
            Action(kinds[a.computation_type.name], a.stage_index, a.microbatch_index)  # type: ignore[arg-type]
            for a in actions
            if a.computation_type.name in kinds
        ]
        if theirs == "1F1B" and rank == n - 1:  # torch counts these forwards from 1 there
            told = [a._replace(microbatch=a.microbatch - (a.kind == "forward")) for a in told]
        assert ours.orders(n, m)[rank] == told


def test_a_schedule_that_cannot_end_is_found_out() -> None:
    ends = [[Action("forward", 0, 0), Action("backward", 0, 0)], [Action("forward", 1, 0)]]
    with pytest.raises(ValueError, match="wait for each other"):
        charge_clock(ends, 2)


@pytest.mark.parametrize(
    ("rows", "n", "expected"), [(32, 2, 8), (7, 2, 7), (5, 4, 5), (1, 3, 1), (12, 2, 6)]
)
def test_microbatches_are_derived_as_even_as_can_be(rows: int, n: int, expected: int) -> None:
    assert derive_microbatches(rows, n, OneForwardOneBackward()) == expected


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zbv", "interleaved(stages=3)"])
def test_a_plan_says_its_schedule(schedule: str) -> None:
    made = pipe(2, schedule=schedule, microbatches=4)
    assert Plan.parse(f"pipe(2, schedule={schedule}, microbatches=4)") == made
    assert Plan.parse(str(made)) == made == Plan.from_nest(made.to_nest())


@pytest.mark.parametrize(
    ("text", "why", "nearest"),
    [
        ("pipe(2, microbatches=0)", "whole number", "pipe(2, microbatches=8)"),
        (
            "pipe(2, schedule=interleaved, microbatches=5)",
            "2 rounds of as many",
            "pipe(2, schedule=interleaved, microbatches=4)",
        ),
        ("pipe(2, schedule=interleaved(1))", "from 2 to 64 stages", "interleaved(stages=2)"),
        ("pipe(2, schedule=gpip)", "no such schedule", "1f1b, gpipe"),
    ],
)
def test_what_no_schedule_can_do_is_refused(text: str, why: str, nearest: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert why in caught.value.why
    assert (caught.value.nearest or caught.value.allowed).startswith(nearest)
