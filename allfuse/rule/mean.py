"""The weighted arithmetic mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean(SumRule):
    """sum(w x) / sum(w): exact to rounding in any order.

    With w_i the number of samples behind the gradient x_i this is the gradient of the whole batch
    (McMahan et al. 2017, arXiv:1602.05629, eq. 1, use it for weights).
    """

    name: ClassVar[str] = "mean"
    linear: ClassVar[bool] = True

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value if weight == 1.0 else value.mul_(weight)

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total if weight == 1.0 else total.div_(weight)
