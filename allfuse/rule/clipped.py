"""The mean of values of bounded length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Clipped(SumRule):
    """The weighted mean, after each peer's whole gradient is shortened to an L2 norm of `norm`.

    Shorter ones stay. No peer moves the mean further than its weight times `norm` (Sun et al. 2019,
    arXiv:1911.07963, section 4, norm thresholding). The norm is known only when the backward pass
    has ended, so traffic does not overlap with it.
    """

    name: ClassVar[str] = "clipped"
    linear: ClassVar[bool] = True
    needs_norm: ClassVar[bool] = True
    fuses_weights: ClassVar[bool] = False
    norm: float

    def __post_init__(self) -> None:
        if not isinstance(self.norm, int | float) or not self.norm > 0:
            raise PlanError(f"clipped({self.norm})", "the norm is above 0", "clipped(1.0)")

    def shrink(self, norm: float) -> float:
        return min(1.0, self.norm / norm) if norm > 0 else 1.0

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value.mul_(weight)

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total.div_(weight)
