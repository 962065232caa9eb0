"""The way along the sphere from one model to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.rule.base import SpanRule

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995
"""From this cosine on the straight line is taken: the arc's formula divides by nearly nothing."""


@dataclass(frozen=True)
class Slerp(SpanRule):
    """sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, a being the angle between two tensors
    (Shoemake 1985, doi:10.1145/325165.325242); from a cosine of 0.9995 on (1 - t) x_1 + t x_2.

    Weights are not looked at. A tensor of zeros is at right angles to all.
    """

    name: ClassVar[str] = "slerp"
    models: ClassVar[int | None] = 2
    weighted: ClassVar[bool] = False
    t: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise PlanError(str(self), "t goes from 0, the first model, to 1", "slerp(t=0.5)")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        return along_arc(gram, self.t)


def along_arc(gram: Tensor, t: float) -> Tensor:
    """The coefficients (2,) of the point at the part t of the arc between two."""
    import math

    import torch

    first, second, both = float(gram[0, 0]), float(gram[1, 1]), float(gram[0, 1])
    lengths = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, both / lengths)) if lengths > 0 else 0.0
    pair = [1 - t, t]
    if abs(cosine) <= PARALLEL:
        angle = math.acos(cosine)
        pair = [math.sin(part * angle) / math.sin(angle) for part in pair]
    return torch.tensor(pair, dtype=torch.float64)
