"""Differences as they are found, in any order, made into the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from allfuse.verify.compare import SMALLEST
from allfuse.verify.distance import relative_numbers
from allfuse.verify.report import Difference, Row

END = "end"


class Pair(NamedTuple):
    """A figure as it was told of a step, and as it should be; None is none."""

    rank: int
    own: float | None
    expected: float | None


@dataclass
class Tally:
    """What differs by how much.

    tolerance: allowed differences of "loss", "gradient norm" and "weights". steps: of the run.
    is_equal: whether all weights that were compared are equal bit for bit.
    """

    tolerance: Mapping[str, float]
    steps: int
    is_equal: bool = True
    _figures: dict[tuple[str, str], list[Pair]] = field(default_factory=dict)
    _weights: dict[str, list[Difference]] = field(default_factory=dict)

    def add_figure(
        self, what: str, step: int, rank: int, own: float | None, expected: float | None
    ) -> None:
        """A loss or norm that a rank told after so many steps."""
        self._figures.setdefault((what, str(step)), []).append(Pair(rank, own, expected))

    def add_weights(self, moment: str, rank: int, sizes: Mapping[str, float]) -> None:
        """How far each tensor of a rank is off, before a step or at the end."""
        step = self.steps if moment == END else int(moment)
        found = self._weights.setdefault(moment, [])
        for name, size in sizes.items():
            self.is_equal = self.is_equal and size == 0.0
            allowed = self.tolerance["weights"]
            found.append(Difference(what=name, rank=rank, step=step, size=size, allowed=allowed))

    def rows(self) -> list[Row]:
        """One for each moment of which anything is known."""
        floors = {what: self._floor(what) for what in ("loss", "gradient norm")}
        rows = []
        for moment in [*map(str, range(self.steps + 1)), END]:
            weights = self._weights.get(moment, [])
            row = Row(
                moment=moment,
                loss=self._largest("loss", moment, floors["loss"]),
                norm=self._largest("gradient norm", moment, floors["gradient norm"]),
                weights=max(weights, key=Difference.order, default=None),
                wrong=list(dict.fromkeys(each.what for each in weights if not each.ok)),
                seconds=None,
            )
            if row.differences:
                rows.append(row)
        return rows

    def _floor(self, what: str) -> float:
        told = [found for (which, _), found in self._figures.items() if which == what]
        known = [abs(p.expected) for found in told for p in found if p.expected is not None]
        return SMALLEST * max(known, default=0.0)

    def _largest(self, what: str, moment: str, floor: float) -> Difference | None:
        pairs = self._figures.get((what, moment), [])
        found = [self._difference(what, int(moment), pair, floor) for pair in pairs]
        return max(found, key=Difference.order, default=None)

    def _difference(self, what: str, step: int, pair: Pair, floor: float) -> Difference:
        rank, own, expected = pair
        return Difference(
            what=what,
            rank=rank,
            step=step,
            size=relative_numbers(own, expected, floor),
            allowed=self.tolerance[what],
            own=own,
            expected=expected,
        )
