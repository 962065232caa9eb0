"""One model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SumRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Passthrough(SumRule):
    """scale * x of a single model: for layers that are stacked from several models."""

    name: ClassVar[str] = "passthrough"
    models: ClassVar[int | None] = 1
    weighted: ClassVar[bool] = False
    scale: float = 1.0

    def prepare(self, value: Tensor, weight: float) -> Tensor:
        return value

    def finish(self, total: Tensor, weight: float) -> Tensor:
        return total if self.scale == 1 else total.mul_(self.scale)
