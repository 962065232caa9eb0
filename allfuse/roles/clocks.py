"""How far workers are apart, and what their updates had not seen."""

from __future__ import annotations

from collections import Counter


class Clocks:
    """Each worker's own count of what it finished, none further than `bound` ahead of the slowest.

    A worker that may begin its clock c has seen every update of the clocks up to c - bound - 1 once
    it reads the weights (Ho et al. 2013, SSP), since nobody is at an earlier one.

    Args:
        bound: in clocks; None is unbounded.
        low: where the first ones begin.
    """

    def __init__(self, bound: int | None, low: int = 0) -> None:
        self.bound = bound
        self._at: dict[str, int] = {}
        self._low = low

    @property
    def low(self) -> int:
        """The clock of the slowest; where nobody is, that of the slowest of the last ones."""
        return self._low

    def join(self, worker: str, clock: int | None = None) -> int:
        """A worker comes, at the clock of the slowest where none is said."""
        self._at[worker] = self._low if clock is None else clock
        self._update()
        return self._at[worker]

    def leave(self, worker: str) -> None:
        del self._at[worker]
        self._update()

    def advance(self, worker: str, clock: int) -> None:
        """A worker finished its clocks below this one."""
        self._at[worker] = clock
        self._update()

    def of(self, worker: str) -> int:
        return self._at[worker]

    def may_begin(self, worker: str) -> bool:
        return self.bound is None or self._at[worker] - self._low <= self.bound

    def _update(self) -> None:
        if self._at:
            self._low = min(self._at.values())


class Staleness:
    """Histograms over all updates that were ordered.

    missed: updates ordered between the weights an update was made from and itself.
    lag: clocks that its worker was ahead of the slowest when it read them.
    """

    def __init__(self) -> None:
        self.missed: Counter[int] = Counter()
        self.lag: Counter[int] = Counter()

    def count(self, missed: int, lag: int) -> None:
        self.missed[missed] += 1
        self.lag[lag] += 1

    def plain(self) -> dict[str, list[list[int]]]:
        """Each histogram as [value, how many], by value."""
        both = {"missed": self.missed, "lag": self.lag}
        return {
            name: [[at, n] for at, n in sorted(counts.items())] for name, counts in both.items()
        }
