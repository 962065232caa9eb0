"""Who works on what: every sample of an epoch is handed to one worker and learned exactly once."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple


class Unit(NamedTuple):
    """One part of the batches of one block of steps."""

    block: int
    part: int


class Ledger:
    """Hands out units block by block and part by part; those given back come first.

    Block b is the steps from b * every up to (b + 1) * every, cut at `limit`. Samples count as used
    when their unit is consumed, not when it is handed out.

    Args:
        parts: into how many each batch is cut.
        every: steps of a block.
        limit: steps of the whole run; None is endless.

    Example:
        ledger = Ledger(parts=2, every=1, limit=10)
        unit = ledger.take()
        ledger.consume(unit)
    """

    def __init__(self, parts: int, every: int = 1, limit: int | None = None) -> None:
        self.parts, self.every, self.limit = parts, every, limit
        self._next = Unit(0, 0)
        self._returned: list[Unit] = []
        self._out: set[Unit] = set()
        self._unit_steps = 0

    @property
    def done(self) -> int:
        """Batches that all parts together have learned."""
        return self._unit_steps // self.parts

    @property
    def is_complete(self) -> bool:
        """Everything there is was consumed."""
        return self.upcoming is None and not self._out

    @property
    def upcoming(self) -> Unit | None:
        """What `take` would hand out."""
        if self._returned:
            return self._returned[0]
        return self._next if self._exists(self._next) else None

    def first_step(self, unit: Unit) -> int:
        """The first of a unit's steps, counted over the run."""
        return unit.block * self.every

    def steps(self, unit: Unit) -> int:
        first = self.first_step(unit)
        last = first + self.every
        return (last if self.limit is None else min(last, self.limit)) - first

    def take(self) -> Unit | None:
        """The next unit, or None while there is none."""
        unit = self.upcoming
        if unit is None:
            return None
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._pass(unit)
        self._out.add(unit)
        return unit

    def give_back(self, unit: Unit) -> None:
        """A unit that was handed out will not be learned by whom it was handed to."""
        self._out.remove(unit)
        heapq.heappush(self._returned, unit)

    def consume(self, unit: Unit) -> None:
        """The update made of a unit is ordered."""
        self._out.remove(unit)
        self._unit_steps += self.steps(unit)

    def restore(self, consumed: Iterable[Unit], out: Iterable[Unit]) -> None:
        """Continue where another ledger was: what lies below the highest unit that it handed out
        and is neither consumed nor out is to be handed out again.
        """
        used = set(consumed)
        self._out = set(out)
        highest = max(used | self._out, default=None)
        self._next, self._returned = Unit(0, 0), []
        while highest is not None and self._next <= highest:
            if self._next not in used and self._next not in self._out:
                self._returned.append(self._next)  # in order, which is a heap
            self._pass(self._next)
        self._unit_steps = sum(self.steps(unit) for unit in used)

    def _exists(self, unit: Unit) -> bool:
        return self.limit is None or self.first_step(unit) < self.limit

    def _pass(self, unit: Unit) -> None:
        whole = unit.part + 1 == self.parts
        self._next = Unit(unit.block + 1, 0) if whole else Unit(unit.block, unit.part + 1)
