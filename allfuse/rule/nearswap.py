"""Takes over another model's numbers where they are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import GatherRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Nearswap(GatherRule):
    """(1 - s) x_1 + s x_2 with s = t / |x_1 - x_2|, at most 1: the second model's numbers where
    they are nearer than t to the first one's, which is the base.
    """

    name: ClassVar[str] = "nearswap"
    models: ClassVar[int | None] = 2
    weighted: ClassVar[bool] = False
    t: float = 0.001

    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        first, second = values
        share = (self.t / (first - second).abs()).clamp_(0.0, 1.0)  # 0 / 0 meets equal numbers
        fused: Tensor = first.lerp(second, share.nan_to_num_(1.0))
        return fused
