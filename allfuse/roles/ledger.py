"""Who works on what: every sample of an epoch is handed to one worker and learned exactly once."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from allfuse.split.data import Stretch


class Unit(NamedTuple):
    """One part of the batches of one block of steps."""

    block: int
    part: int


class Ledger:
    """Hands out units block by block and part by part; those given back come first.

    Block b is the steps from b * every up to (b + 1) * every, cut at `limit`; of several fragments
    each such stretch is cut into as many blocks, at even distances. Samples count as used
    when their unit is consumed, not when it is handed out.

    Args:
        parts: into how many each batch is cut.
        every: steps of a block, or of one for each fragment.
        limit: steps of the whole run; None is endless.
        begin: the first step of those blocks, where an earlier leg of the run went on to there.
        rest: blocks that come before, of what that leg left out: what a unit of each is.

    Example:
        ledger = Ledger(parts=2, every=1, limit=10)
        unit = ledger.take()
        ledger.consume(unit)
    """

    def __init__(
        self,
        parts: int,
        every: int = 1,
        limit: int | None = None,
        *,
        fragments: int = 1,
        begin: int = 0,
        rest: Sequence[Sequence[Stretch]] = (),
    ) -> None:
        self.parts, self.every, self.limit, self.begin = parts, every, limit, begin
        self._fragments, self._rest = fragments, rest
        self._next = Unit(0, 0)
        self._returned: list[Unit] = []
        self._out: set[Unit] = set()
        self._unit_steps = 0
        self._before = begin - sum(
            each.steps / each.parts for units in rest for each in units
        )  # batches that were learned by earlier legs
        self._after_rest = 0.0
        self._whole = 0  # blocks before this one are consumed
        self._beyond: set[Unit] = set()  # consumed, of this block or later ones

    @property
    def done(self) -> int:
        """Batches that all parts together have learned."""
        if not self._rest:
            return self.begin + self._unit_steps // self.parts
        learned = self._before + self._after_rest + self._unit_steps / self.parts
        return int(learned + 1e-6)  # parts of batches that were cut otherwise add up to whole ones

    @property
    def whole(self) -> int:
        """The first step of which something is not consumed."""
        return self._cut(self._span(self._whole)[0])

    @property
    def beyond(self) -> list[Stretch]:
        """What is consumed of steps from `whole` on, in order."""
        return [self.stretch(unit) for unit in sorted(self._beyond)]

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

    def stretch(self, unit: Unit) -> Stretch:
        """What a unit is."""
        if unit.block < len(self._rest):
            return self._rest[unit.block][unit.part]
        first, last = self._span(unit.block)
        return Stretch(first, self._cut(last) - first, unit.part, self.parts)

    def first_step(self, unit: Unit) -> int:
        """The first of a unit's steps, counted over the run."""
        return self._span(unit.block)[0]

    def steps(self, unit: Unit) -> int:
        return self.stretch(unit).steps

    def parts_of(self, block: int) -> int:
        """How many units a block has."""
        return len(self._rest[block]) if block < len(self._rest) else self.parts

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
        self._count(unit)

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
        self._unit_steps, self._after_rest, self._whole = 0, 0.0, 0
        self._beyond.clear()
        for unit in used:
            self._count(unit)

    def _span(self, block: int) -> tuple[int, int]:
        """The steps of a block, not cut at the limit."""
        if block < len(self._rest):
            return self._rest[block][0].first, self._rest[block][0].end
        turn, fragment = divmod(block - len(self._rest), self._fragments)
        first, count = self.begin + turn * self.every, self._fragments
        return first + self.every * fragment // count, first + self.every * (fragment + 1) // count

    def _count(self, unit: Unit) -> None:
        """A unit is consumed."""
        stretch = self.stretch(unit)
        if unit.block < len(self._rest):
            self._after_rest += stretch.steps / stretch.parts
        else:
            self._unit_steps += stretch.steps
        self._beyond.add(unit)
        while self._is_consumed(self._whole):
            self._beyond -= {Unit(self._whole, part) for part in range(self.parts_of(self._whole))}
            self._whole += 1

    def _is_consumed(self, block: int) -> bool:
        return all(Unit(block, part) in self._beyond for part in range(self.parts_of(block)))

    def _cut(self, step: int) -> int:
        return step if self.limit is None else min(step, self.limit)

    def _exists(self, unit: Unit) -> bool:
        return self.limit is None or self.first_step(unit) < self.limit

    def _pass(self, unit: Unit) -> None:
        whole = unit.part + 1 == self.parts_of(unit.block)
        self._next = Unit(unit.block + 1, 0) if whole else Unit(unit.block, unit.part + 1)
