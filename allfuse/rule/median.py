"""The median of each element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import GatherRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Median(GatherRule):
    """The weighted median: half of the weight lies below it and half above.

    Fewer than half of the peers, by weight, cannot move it beyond the values of the others (Yin et
    al. 2018, arXiv:1803.01498, definition 1, with weights). Between two middle values their mean.
    """

    name: ClassVar[str] = "median"

    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        ordered, order = values.sort(dim=0)
        below = weights[order].cumsum(0)  # of each value and those under it
        half = below[-1] / 2
        low = (below < half - EDGE * below[-1]).sum(0, keepdim=True)
        high = (below <= half + EDGE * below[-1]).sum(0, keepdim=True)
        last = len(values) - 1
        pair = [ordered.gather(0, place.clamp(max=last)) for place in (low, high)]
        return pair[0].lerp(pair[1], 0.5)[0]


EDGE = 1e-6  # of all weight: how close to one half counts as half
