"""What is summed over the numbers of two tensors, and the figures that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over places of two tensors x and y; those of two tensors add up.

    Attributes:
        count: places. changed: those where x is not y.
        difference, first, second, product: of (x - y)**2, x**2, y**2 and x y.
        agreeing, signed: places where both have one sign, and where either is not 0.
        common, top: places among the largest of both, and the mean of those of each.
        largest: of |x - y|.
    """

    count: int = 0
    changed: int = 0
    difference: float = 0.0
    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    agreeing: int = 0
    signed: int = 0
    common: int = 0
    top: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in self.__dataclass_fields__
            if name != "largest"
        }
        largest = self.largest
        if math.isnan(other.largest) or other.largest > largest:
            largest = other.largest
        return Sums(**sums, largest=largest)

    @property
    def distance(self) -> float:
        """Of x and y, in lengths of x; infinite where x is 0 everywhere and y is not."""
        if not self.difference:
            return 0.0
        return math.sqrt(self.difference / self.first) if self.first else math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between x and y; of two that are 0 everywhere 1, of one 0."""
        length = math.sqrt(self.first * self.second)
        if not length:
            return float(self.first == self.second)
        cosine = self.product / length
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))

    @property
    def signs(self) -> float:
        """The part of places that agree in sign."""
        return self.agreeing / self.signed if self.signed else 1.0

    @property
    def overlap(self) -> float:
        """The part of the largest that both have."""
        return self.common / self.top if self.top else 1.0

    def figures(self) -> dict[str, float]:
        """By name, for files and tables."""
        return {
            "distance": self.distance,
            "cosine": self.cosine,
            "signs": self.signs,
            "overlap": self.overlap,
            "largest": self.largest,
            "changed": self.changed / self.count if self.count else 0.0,
        }
