"""What was learned out of turn is left out by who goes on, and all else is learned once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from allfuse.roles.ledger import Ledger, Unit
from allfuse.split.data import BatchPlan, ColumnSource, Learned, Loader, Stretch

SAMPLES, BATCH = 40, 9  # 5 steps an epoch, the last one of 4
LEARNED = Learned([Stretch(1, 2, 1, 3), Stretch(2, 1, 0, 3), Stretch(2, 1, 2, 3)])
"""Beyond step 1: part 1 of step 1, and all of step 2."""


def loader(parts: int = 1, index: int = 0) -> Loader:
    plan = BatchPlan(SAMPLES, BATCH, seed=3)
    return Loader(ColumnSource(torch.arange(SAMPLES)), plan, parts=parts, index=index)


def seen(portions: list[tuple[torch.Tensor, int]]) -> list[int]:
    return [int(sample) for batch, rows in portions for sample in batch[:rows]]


def first_leg(learned: Learned, whole: int) -> list[int]:
    """The samples of all steps before `whole`, and of what is beyond."""
    own = loader()
    found = seen([(p.batch, p.rows) for p in own.epoch(0)][:whole])
    for each in learned:
        for step in range(each.first, each.end):
            found += seen(
                [(p.batch, p.rows) for p in own.leased([(0, step)], each.part, each.parts)]
            )
    return found


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_workers_in_step_learn_the_rest_of_an_epoch_once(parts: int) -> None:
    found = first_leg(LEARNED, whole=1)
    steps = set()
    for index in range(parts):
        own = loader(parts, index)
        own.learned = LEARNED
        portions = list(own.epoch(0, 1))
        assert [p.step for p in portions] == [1, 2, 3, 4], "steps keep their numbers"
        assert portions[1].rows == 0
        assert len(portions[1].batch) == 1, "a stand-in"
        steps |= {tuple(p.shares) for p in portions}
        found += seen([(p.batch, p.rows) for p in portions])
    assert Counter(found) == Counter(range(SAMPLES))


@pytest.mark.parametrize(("parts", "every"), [(3, 1), (2, 1), (2, 3), (1, 1)])
def test_a_scheduler_hands_out_the_rest_of_an_epoch_once(parts: int, every: int) -> None:
    rest = LEARNED.rest(1, parts, every)
    ledger = Ledger(parts, every, limit=5, begin=LEARNED.end, rest=rest)
    own, found = loader(), first_leg(LEARNED, whole=1)
    assert (ledger.done, ledger.whole) == (2, 1), "two thirds of step 1 are left, and none of 2"
    while (unit := ledger.take()) is not None:
        each = ledger.stretch(unit)
        places = [(0, step) for step in range(each.first, each.end)]
        found += seen([(p.batch, p.rows) for p in own.leased(places, each.part, each.parts)])
        ledger.consume(unit)
    assert Counter(found) == Counter(range(SAMPLES))
    assert (ledger.done, ledger.whole, ledger.beyond) == (5, 5, [])


def test_steps_of_which_nothing_was_learned_are_cut_anew() -> None:
    learned = Learned([Stretch(3, 1, 0, 2)])
    assert learned.rest(0, parts=3, every=2) == [
        [Stretch(0, 2, part, 3) for part in range(3)],
        [Stretch(2, 1, part, 3) for part in range(3)],
        [Stretch(3, 1, 1, 2)],
    ]


def test_a_ledger_knows_the_first_step_that_lacks_something_and_what_is_beyond_it() -> None:
    ledger = Ledger(parts=2, every=1, limit=9)
    units = [ledger.take() for _ in range(6)]
    for block, part in [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]:
        ledger.consume(Unit(block, part))
    assert (ledger.whole, ledger.done) == (1, 2)
    assert ledger.beyond == [Stretch(1, 1, 1, 2), Stretch(2, 1, 0, 2), Stretch(2, 1, 1, 2)]
    again = Ledger(parts=2, every=1, limit=9)
    again.restore([Unit(0, 0), Unit(0, 1), Unit(1, 1), Unit(2, 0), Unit(2, 1)], [Unit(1, 0)])
    assert (again.whole, again.beyond, again.done) == (ledger.whole, ledger.beyond, ledger.done)
    again.consume(Unit(1, 0))
    assert (again.whole, again.beyond) == (3, [])
    assert units[2] == (1, 0)
