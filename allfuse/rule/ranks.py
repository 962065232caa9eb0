"""Keeps the numbers of a tensor whose magnitudes rank between two places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError
from allfuse.rule.sift import Sift, Stretch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

HIGH, LOW = 15, 16
"""Bits of a float32's magnitude: those counted in the first turn, and those in the second."""
BINS = 256  # a step of looking something up in counts
INFINITY = 0x7F800000  # its bits


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

        cuts, bits = self.cuts(stretch.count), stretch.values.view(torch.int32)
        if turn == 0:
            return torch.bincount((bits >> LOW).bitwise_and_((1 << HIGH) - 1), minlength=1 << HIGH)
        if turn == 1:
            counts = [_count_low(bits, _stands_at(found[0], place)[0]) for place in cuts]
        else:
            limits = self._limits(stretch.count, found)
            counts = [torch.tensor(_count_equal(stretch.values, limit)) for limit, _ in limits]
        return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)

    def apply(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        values = stretch.values
        if self.stop <= self.start:
            return values.zero_()
        places = self.cuts(stretch.count)
        limits = self._limits(stretch.count, found) if places else []
        for place, (limit, first), earlier in zip(places, limits, found[-1].tolist(), strict=True):
            first -= earlier  # how many of this block's equals stand before the cut
            if place == self.stop:
                values = _keep_before(values, limit, first)
            else:
                values = values.masked_fill_(_stands_before(values, limit, first), 0.0)
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


def _count_low(bits: Tensor, high: int) -> Tensor:
    """How many numbers with this upper half have each lower half, int64 (2 ** LOW,)."""
    own = bits[_places((bits >> LOW).bitwise_and_((1 << HIGH) - 1), high)]
    return own.bitwise_and_((1 << LOW) - 1).bincount(minlength=1 << LOW)


def _places(bits: Tensor, value: int) -> Tensor:
    """Where a value is, int64. On a CPU NumPy compares ten times as fast."""
    import numpy as np
    import torch

    if bits.is_cpu:
        return torch.from_numpy(np.flatnonzero(bits.numpy() == value))
    return (bits == value).nonzero().view(-1)


def _as_float(limit: int) -> float:
    """The magnitude with these bits."""
    import struct

    found: float = struct.unpack("<f", struct.pack("<I", limit))[0]
    return found


def _count_equal(values: Tensor, limit: int) -> int:
    import numpy as np

    bits = _magnitudes(values)
    return int(np.count_nonzero(bits.numpy() == limit) if bits.is_cpu else (bits == limit).sum())


def _magnitudes(values: Tensor) -> Tensor:
    """The bits of float32 without the sign, int32 (k,): in the order of magnitudes."""
    import torch

    return values.view(torch.int32) & 0x7FFFFFFF


def _stands_at(counts: Tensor, place: int) -> tuple[int, int]:
    """Which bin holds what stands at a place, from the highest bin, and how many are in higher
    ones."""
    import numpy as np

    each = counts.cpu().numpy().reshape(-1, BINS)  # two steps: a sum over all bins takes longest
    high, above = _find(each.sum(1), place)
    low, more = _find(np.asarray(each[high]), place - above)
    return high * BINS + low, above + more


def _find(counts: np.ndarray, place: int) -> tuple[int, int]:
    upward = counts[::-1].cumsum()
    at = int(upward.searchsorted(place, side="right"))
    return len(counts) - 1 - at, int(upward[at - 1]) if at else 0


def _keep_before(values: Tensor, limit: int, first: int) -> Tensor:
    """A block in which those that stand at a cut or behind it are 0."""
    import torch

    if first > 0 and _count_equal(values, limit) <= first:
        first, limit = 0, limit - 1  # all of the equals stand before it
    if limit < 0:
        return values
    if first > 0 or limit >= INFINITY:
        return values.masked_fill_(~_stands_before(values, limit, first), 0.0)
    return torch.hardshrink(values, _as_float(limit), out=values)


def _stands_before(values: Tensor, limit: int, first: int) -> Tensor:
    """Which of a block stand before a cut: larger than the limit, or among its first equals."""
    bits = _magnitudes(values)
    larger = bits > limit
    if first > 0:
        larger[_places(bits, limit)[:first]] = True
    return larger


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
