"""The way along the sphere, as far as the weights say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SpanRule
from allfuse.rule.slerp import along_arc

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Nuslerp(SpanRule):
    """`slerp` at t = w_2 / (w_1 + w_2)."""

    name: ClassVar[str] = "nuslerp"
    base_optional: ClassVar[bool] = True
    models: ClassVar[int | None] = 2

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        return along_arc(gram, float(weights[1] / weights.sum()))
