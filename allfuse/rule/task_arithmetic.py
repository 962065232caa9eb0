"""The weighted sum of what models learned since their base."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskArithmetic(SumRule):
    """scale * sum(w tau), of changes tau since a base (Ilharco et al. 2023, arXiv:2212.04089).

    With normalize=true divided by the sum of weights.
    """

    name: ClassVar[str] = "task_arithmetic"
    of_changes: ClassVar[bool] = True
    _: KW_ONLY
    scale: float = 1.0
    normalize: bool = False

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value.mul_(weight)

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total.mul_(self.scale / weight if self.normalize else self.scale)
