"""Fuses those changes on which models differ most, each tensor as much as it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.rule.base import JointRule
from allfuse.rule.ranks import Ranks, top
from allfuse.rule.sift import Stretch, check_density

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1.1754943508222875e-38  # above 0, so that numbers on which all agree can be selected, too
LEAST_MEAN = {"mergekit": 1e-6, "paper": 0.0}
"""Of the models' mean squares together: below it all weigh alike."""


@dataclass(frozen=True)
class Sce(JointRule):
    """SCE (Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3), of each tensor's changes tau:

    1. select: the max(1, int(density * count)) numbers whose variance over the models is largest
       are kept, of equal ones those of lower index; the others become those of the base;
    2. calculate: a model weighs as much as the mean of its kept tau^2;
    3. erase: of each number those count whose sign is that of sum(tau), divided by their weights.

    With preset=mergekit all weigh alike where the means of step 2 add up to less than 1e-6.
    Weights that are given are not looked at.
    """

    name: ClassVar[str] = "sce"
    of_changes: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    running: ClassVar[frozenset[int]] = Ranks.running
    density: float = 1.0
    _: KW_ONLY
    preset: str = "mergekit"

    def __post_init__(self) -> None:
        check_density(self, self.density)
        if self.preset not in LEAST_MEAN:
            given, allowed = f"{self.name}(preset={self.preset!r})", ", ".join(LEAST_MEAN)
            raise PlanError(given, "there is no such preset", allowed=allowed)

    def turns(self, count: int) -> int:
        chosen = top(self.density, count)
        return 1 + (chosen.turns if chosen else 0)

    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        chosen = top(self.density, stretch.count)
        if chosen is not None and turn < chosen.turns:
            return chosen.measure(turn, _variances(stretch), found)
        return self._select(stretch, found).double().square().sum(1)

    def fuse(self, stretch: Stretch, weights: Tensor, found: Sequence[Tensor]) -> Tensor:
        import torch

        values, squares = self._select(stretch, found), found[-1]
        total = squares.sum()
        enough = total / stretch.count >= LEAST_MEAN[self.preset] and total > 0
        shares = squares / total if enough else torch.full_like(squares, 1 / len(squares))
        own = shares.to(values).view(-1, 1)
        counts = (values.sign() == values.sum(0).sign()) * own
        divisor = counts.sum(0)
        return (values * counts).sum(0).div_(divisor.masked_fill_(divisor == 0, 1.0))

    def _select(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        """The changes (n, k), 0 where they are not selected."""
        chosen = top(self.density, stretch.count)
        if chosen is None:
            return stretch.values
        kept = chosen.apply(_variances(stretch), found[: chosen.turns])
        return stretch.values * (kept > 0)


def _variances(stretch: Stretch) -> Stretch:
    """Of each number, over the models."""
    spread = stretch.values.var(0, correction=0).clamp_(min=LEAST)
    return Stretch(spread, stretch.begin, stretch.shape)
