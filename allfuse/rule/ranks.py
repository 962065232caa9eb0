"""Keeps the numbers of a tensor whose magnitudes rank between two places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError
from allfuse.rule.sift import Sift, Stretch

if TYPE_CHECKING:
    from torch import Tensor

HIGH, LOW = 15, 16
"""Bits of a float32's magnitude: those counted in the first turn, and those in the second."""


@dataclass(frozen=True)
class Ranks(Sift):
    """Keeps those from place `start` to before place `stop` when the numbers of a tensor stand by
    magnitude, the largest first; of equal ones those of lower index stand first.

    Exact: the bits of a float32 without its sign have the order of magnitudes, so counting their
    upper half and then, where a place is, their lower half finds the number that stands there.
    A third turn counts how many are equal to it in the blocks before.
    """

    start: int
    stop: int

    running: ClassVar[frozenset[int]] = frozenset({2})

    @property
    def turns(self) -> int:
        return 3

    def cuts(self, count: int) -> list[int]:
        """The places at which it is cut: where there is something on both sides."""
        return [place for place in (self.start, self.stop) if 0 < place < count]

    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        import torch

        bits, cuts = _magnitudes(stretch.values), self.cuts(stretch.count)
        if turn == 0:
            return torch.bincount(bits >> LOW, minlength=1 << HIGH)
        if turn == 1:
            counts = torch.zeros(len(cuts), 1 << LOW, dtype=torch.int64)
            for number, place in enumerate(cuts):
                high, _ = _stands_at(found[0], place)
                own = bits[bits >> LOW == high] & ((1 << LOW) - 1)
                counts[number] = torch.bincount(own, minlength=1 << LOW)
            return counts
        limits = [limit for limit, _ in self._limits(stretch.count, found)]
        return torch.tensor([int((bits == limit).sum()) for limit in limits], dtype=torch.int64)

    def apply(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        values = stretch.values
        if self.stop <= self.start:
            return values.zero_()
        cuts = self.cuts(stretch.count)
        if not cuts:
            return values
        bits = _magnitudes(values)
        for number, (limit, first) in enumerate(self._limits(stretch.count, found)):
            before = _stands_before(bits, limit, first - int(found[2][number]))
            values = values.masked_fill_(before if cuts[number] == self.start else ~before, 0.0)
        return values

    def _limits(self, count: int, found: Sequence[Tensor]) -> list[tuple[int, int]]:
        """For each cut the magnitude that stands there, as bits, and how many of those that are
        equal to it stand before the cut."""
        limits = []
        for number, place in enumerate(self.cuts(count)):
            high, above = _stands_at(found[0], place)
            low, higher = _stands_at(found[1][number], place - above)
            limits.append(((high << LOW) | low, place - above - higher))
        return limits


def _magnitudes(values: Tensor) -> Tensor:
    """The bits of float32 without the sign, int32 (k,): in the order of magnitudes."""
    import torch

    return values.view(torch.int32) & 0x7FFFFFFF


def _stands_at(counts: Tensor, place: int) -> tuple[int, int]:
    """Which bin holds what stands at a place, from the highest bin, and how many are in higher
    ones."""
    upward = counts.flip(0).cumsum(0)
    at = int((upward <= place).sum())
    return len(counts) - 1 - at, int(upward[at - 1]) if at else 0


def _stands_before(bits: Tensor, limit: int, first: int) -> Tensor:
    """Which of a block stand before a cut: larger than the limit, or among its first equals."""
    larger, equal = bits > limit, bits == limit
    return larger | (equal & (equal.cumsum(0) <= first)) if first > 0 else larger


def top(density: float, count: int) -> Ranks | None:
    """Keeps the largest magnitudes: max(1, int(density * count)) of them; None: all."""
    return None if density == 1 else Ranks(0, max(1, int(density * count)))


def band(density: float, gamma: float, count: int) -> Ranks:
    """Drops the int(gamma * count) largest magnitudes, and as many of the smallest that
    int(density * count) are left; where too few are left for that, fewer of the largest."""
    kept = int(density * count)
    start = min(int(gamma * count), count - kept)
    return Ranks(start, start + kept)


def check_band(rule: Choice, gamma: float) -> None:
    """Refuse a part that is none. Raises PlanError."""
    if not 0 <= gamma < 1:
        raise PlanError(
            str(rule), "gamma is a part of all changes, from 0 to below 1", "gamma=0.01"
        )
