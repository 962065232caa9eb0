"""The mean on the sphere, found in the plane that touches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SpanRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Multislerp(SpanRule):
    """The directions of all models are drawn onto the plane that touches the unit sphere at their
    weighted mean's direction, averaged there and drawn back; times the weighted mean of lengths
    (the exponential map; Buss and Fillmore 2001, doi:10.1145/502122.502124, one step).

    Args:
        eps: lengths below it count as none.
    """

    name: ClassVar[str] = "multislerp"
    base_optional: ClassVar[bool] = True
    eps: float = 1e-8

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        lengths = gram.diagonal().sqrt()
        shares = weights.double() / weights.double().sum()
        units = gram / lengths.clamp(min=self.eps).outer(lengths.clamp(min=self.eps))
        place = unit(shares, units, self.eps)
        if place is None:  # opposite directions: no mean of them is a direction
            return shares
        found = exponential(place, touching(place, units, shares), units, self.eps)
        return found * (shares @ lengths) / lengths.clamp(min=self.eps)


def length(vector: Tensor, units: Tensor) -> float:
    """Of sum(v_i u_i), where units[i, j] = <u_i, u_j>."""
    return float((vector @ units @ vector).clamp(min=0).sqrt())


def unit(vector: Tensor, units: Tensor, eps: float) -> Tensor | None:
    """The vector at length one; None where it has none."""
    size = length(vector, units)
    return vector / size if size > eps else None


def touching(place: Tensor, units: Tensor, shares: Tensor) -> Tensor:
    """The weighted mean of the u_i in the plane that touches the sphere at a place, by what stands
    at right angles to it."""
    return shares - (shares @ units @ place) * place


def exponential(place: Tensor, step: Tensor, units: Tensor, eps: float) -> Tensor:
    """Where one comes from a place of the unit sphere along a step that touches it."""
    import math

    size = length(step, units)
    if size <= eps:
        return place
    return math.cos(size) * place + math.sin(size) / size * step
