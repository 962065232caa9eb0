"""The point of the sphere that is nearest to all models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SpanRule
from allfuse.rule.multislerp import exponential, unit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Karcher(SpanRule):
    """The mean of directions along the sphere: that of least squared arcs to all models, times the
    mean of lengths (Karcher 1977, doi:10.1002/cpa.3160300502; found by walking along the mean of
    the arcs, `steps` times at most, until that is shorter than `tol`). Weighted by the weights.
    """

    name: ClassVar[str] = "karcher"
    steps: int = 10
    tol: float = 1e-5

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        shares = weights.double() / weights.double().sum()
        lengths = gram.diagonal().sqrt()
        some = lengths > 0
        sizes = lengths.masked_fill(~some, 1.0)
        units = gram / sizes.outer(sizes)
        place = unit(shares * some, units, 1e-12)
        if place is None:
            return shares
        for _ in range(self.steps):
            cosines = (units @ place).clamp(-1.0, 1.0)
            arcs = cosines.acos()
            stretched = arcs / arcs.sin().masked_fill(arcs.sin() < 1e-12, 1.0)
            pulls = shares * some * stretched.masked_fill(arcs < 1e-12, 1.0)
            step = pulls - (pulls @ cosines) * place
            if float((step @ units @ step).clamp(min=0).sqrt()) < self.tol:
                break
            place = exponential(place, step, units, 1e-12)
        return place * (shares @ lengths) / sizes
