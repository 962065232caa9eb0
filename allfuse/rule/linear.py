"""The weighted sum of whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear(SumRule):
    """sum(w x) / sum(w): the mean; with normalize=false sum(w x).

    Model soups (Wortsman et al. 2022, arXiv:2203.05482) are the mean.
    """

    name: ClassVar[str] = "linear"
    normalize: bool = True

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value.mul_(weight)

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total.div_(weight) if self.normalize else total
