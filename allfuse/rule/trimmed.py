"""The mean without the largest and smallest values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.rule.base import GatherRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trimmed(GatherRule):
    """The weighted mean of each element after the `cut` part of the weight is left out at each end.

    A value that lies across the edge counts with what is left of its weight. cut=0 is the mean, and
    just below 0.5 the median (Yin et al. 2018, arXiv:1803.01498, definition 2, with weights).
    """

    name: ClassVar[str] = "trimmed"
    cut: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.cut < 0.5:
            raise PlanError(
                str(self), "the part left out at each end is from 0 to below 0.5", "trimmed(0.25)"
            )

    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        ordered, order = values.sort(dim=0)
        own = weights[order]
        above = own.cumsum(0)
        total = above[-1]
        low, high = self.cut * total, (1 - self.cut) * total
        kept = above.minimum(high) - (above - own).maximum(low)
        kept = kept.clamp(min=0)
        sums = (ordered * kept).masked_fill(kept == 0, 0.0)  # what is left out may be NaN
        return (sums.sum(0) / kept.sum(0)).to(values.dtype)
