"""The sign that most peers have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Vote(SumRule):
    """Majority vote: sign(sum(w sign(x))), which is -1, 0 or 1 whatever the size of the gradients.

    signSGD with majority vote (Bernstein et al. 2018, arXiv:1802.04434, algorithm 3), with weights.
    So the learning rate is the size of a step. Ties and peers without a gradient count as 0.
    """

    name: ClassVar[str] = "vote"
    fuses_weights: ClassVar[bool] = False

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value.sign_().mul_(weight)

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total.sign_()
