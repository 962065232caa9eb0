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

        parts, one = weights.to(values.dtype), torch.ones_like(weights, dtype=values.dtype)
        if self.preset == "paper":
            parts = one
        weighs_first = self.preset == "mergekit"
        signs = parts.sign() if weighs_first else one
        judged = values * signs.view(-1, 1) if bool((signs < 0).any()) else values
        sign = _add_up(parts.abs() if weighs_first else one, judged).sign_().add_(0.5).sign_()
        sizes = (judged * sign).clamp_(min=0.0)  # of those that have the elected sign; others are 0
        total = _add_up(parts * signs, sizes).mul_(sign)
        if not self.normalize:
            return total.mul_(self.scale)
        divisor = _add_up(parts if weighs_first else one, sizes.sign_())
        none = divisor.sign().square_().neg_().add_(1.0)  # 1 where nobody agrees
        return total.div_(divisor.add_(none)).mul_(self.scale)


def _add_up(weights: Tensor, values: Tensor) -> Tensor:
    """sum(w x) of each number, (k,): weights (n,), values (n, k)."""
    return (weights.view(1, -1) @ values).view(-1)
