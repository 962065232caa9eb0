"""The weighted sum of whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.mean import Mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear(Mean):
    """The `mean`; with normalize=false sum(w x), which is not divided by sum(w).

    Model soups (Wortsman et al. 2022, arXiv:2203.05482) are the mean.
    """

    name: ClassVar[str] = "linear"
    normalize: bool = True

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return super().finish(total, weight) if self.normalize else total
