"""Fuses only those changes that agree in sign with what was elected."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.rule.base import GatherRule

if TYPE_CHECKING:
    from torch import Tensor

PRESETS = ("mergekit", "peft", "paper")


@dataclass(frozen=True)
class Elected(GatherRule):
    """Of each number the sign is elected, and the mean is taken of the changes tau that have it
    (TIES, Yadav et al. 2023, arXiv:2306.01708, section 3).

    | preset | elected is the sign of (0 counts as +) | the fused change, over those that have it |
    |---|---|---|
    | mergekit | sum(w tau) | sum(w tau) / sum(w) |
    | peft | sum(tau) | sum(w tau) / how many there are |
    | paper | sum(tau) | sum(tau) / how many there are |

    With normalize=false nothing is divided. All is multiplied by `scale`.
    """

    of_changes: ClassVar[bool] = True
    _: KW_ONLY
    scale: float = 1.0
    normalize: bool = True
    preset: str = "mergekit"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise PlanError(
                f"{self.name}(preset={self.preset!r})",
                "there is no such preset",
                allowed=", ".join(PRESETS),
            )

    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        import torch

        parts = weights.to(values.dtype).view(-1, 1)
        if self.preset == "paper":
            parts = torch.ones_like(parts)
        weighs_first = self.preset == "mergekit"
        judged = values * parts if weighs_first else values
        sign = judged.sum(0).sign_().add_(0.5).sign_()  # comparisons take ten times as long
        sizes = (judged * sign).clamp_(min=0.0)  # of those that have the elected sign; others are 0
        total = (sizes if weighs_first else sizes * parts).sum(0).mul_(sign)
        if not self.normalize:
            return total.mul_(self.scale)
        divisor = (sizes.sign_().mul_(parts) if weighs_first else sizes.sign_()).sum(0)
        none = divisor.sign().square_().neg_().add_(1.0)  # 1 where nobody agrees
        return total.div_(divisor.add_(none)).mul_(self.scale)
