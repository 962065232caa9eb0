"""Every unit of work is handed out until it is consumed, exactly once."""

from __future__ import annotations

import random

import pytest

from allfuse.roles.clocks import Clocks, Staleness
from allfuse.roles.ledger import Ledger, Unit


def take_all(ledger: Ledger) -> list[Unit]:
    units = []
    while (unit := ledger.take()) is not None:
        units.append(unit)
    return units


def test_units_come_block_by_block_and_part_by_part() -> None:
    ledger = Ledger(parts=2, every=1, limit=2)
    assert take_all(ledger) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("every", [1, 3, 4, 20])
def test_blocks_are_cut_at_the_limit_so_that_their_steps_add_up(every: int) -> None:
    ledger = Ledger(parts=3, every=every, limit=10)
    units = take_all(ledger)
    for part in range(3):
        steps = [
            ledger.first_step(unit) + n
            for unit in units
            if unit.part == part
            for n in range(ledger.steps(unit))
        ]
        assert steps == list(range(10))


def test_what_was_given_back_comes_first_and_in_its_order() -> None:
    ledger = Ledger(parts=2, every=1, limit=5)
    first, second, _ = ledger.take(), ledger.take(), ledger.take()
    assert first is not None
    assert second is not None
    ledger.give_back(second)
    ledger.give_back(first)
    assert [ledger.take() for _ in range(3)] == [first, second, (1, 1)]


def test_done_counts_whole_batches() -> None:
    ledger = Ledger(parts=2, every=3, limit=7)
    done = []
    for unit in take_all(ledger):
        ledger.consume(unit)
        done.append(ledger.done)
    assert done == [1, 3, 4, 6, 6, 7]
    assert ledger.is_complete


def test_a_run_without_limit_never_runs_out() -> None:
    ledger = Ledger(parts=1, every=2)
    units = [ledger.take() for _ in range(100)]
    assert units[-1] == (99, 0)
    assert not ledger.is_complete


def test_a_unit_that_is_not_out_can_neither_be_consumed_nor_given_back() -> None:
    ledger = Ledger(parts=1, every=1, limit=2)
    unit = ledger.take()
    assert unit is not None
    ledger.consume(unit)
    with pytest.raises(KeyError):
        ledger.consume(unit)
    with pytest.raises(KeyError):
        ledger.give_back(unit)


@pytest.mark.parametrize("seed", range(20))
def test_every_unit_is_consumed_once_whatever_is_given_back_and_restored(seed: int) -> None:
    chance = random.Random(seed)
    shape = {"parts": chance.randint(1, 4), "every": chance.randint(1, 3), "limit": 13}
    ledger, out, consumed = Ledger(**shape), [], []
    while not ledger.is_complete:
        match chance.randrange(5):
            case 0 | 1:
                unit = ledger.take()
                out += [unit] if unit is not None else []
            case 2 if out:
                consumed.append(out.pop(chance.randrange(len(out))))
                ledger.consume(consumed[-1])
            case 3 if out:
                ledger.give_back(out.pop(chance.randrange(len(out))))
            case 4:
                ledger = Ledger(**shape)
                ledger.restore(consumed, out)
    assert sorted(consumed) == take_all(Ledger(**shape))
    assert ledger.done == 13


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_begins_a_clock_further_ahead_than_the_bound(bound: int) -> None:
    clocks = Clocks(bound)
    clocks.join("slow")
    clocks.join("fast")
    begun = 0
    while clocks.may_begin("fast"):
        begun += 1
        clocks.advance("fast", begun)
    assert begun == bound + 1
    clocks.advance("slow", 1)
    assert clocks.may_begin("fast")


def test_without_a_bound_nobody_waits() -> None:
    clocks = Clocks(None)
    clocks.join("slow")
    clocks.join("fast")
    clocks.advance("fast", 1000)
    assert clocks.may_begin("fast")


def test_the_slowest_clock_never_goes_back_whoever_comes_and_goes() -> None:
    clocks = Clocks(2)
    clocks.join("a")
    clocks.advance("a", 5)
    assert clocks.join("b") == 5
    clocks.advance("b", 7)
    clocks.leave("a")
    assert clocks.low == 7
    clocks.leave("b")
    assert clocks.join("c") == 7


def test_staleness_is_a_histogram_of_all_updates() -> None:
    staleness = Staleness()
    for missed, lag in [(0, 0), (2, 1), (2, 0)]:
        staleness.count(missed, lag)
    assert staleness.plain() == {"missed": [[0, 1], [2, 2]], "lag": [[0, 2], [1, 1]]}
