"""What becomes of the weights that replicas fused after steps of their own.

Lives beside the sync policies because it has a meaning only where replicas run apart for some
steps and meet again: the policy says when they meet, the outer step what they leave with. (It is
no rule: a rule makes one of n values at once, an outer optimizer keeps state from round to round.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor


@dataclass(frozen=True)
class Outer(Choice):
    """The step that a round of fused weights takes, from those of the round before.

    All are torch's SGD over the outer gradient: the weights of the round before less the fused ones
    (Reddi et al. 2021, arXiv:2003.00295).
    """

    @abstractmethod
    def options(self, share: float = 1.0) -> dict[str, Any]:
        """Arguments of torch.optim.SGD.

        Args:
            share: of one replica's change in a step: 1 where those of all are averaged first, and
                1 / replicas where each steps by itself.
        """

    def step(
        self, fused: Tensor, anchor: Tensor, momentum: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Where replicas go on from, and the momentum that they keep.

        Torch's SGD from `anchor` along anchor - fused, written as what is added to the fused
        weights: under lr=1 without momentum that is nothing, to the bit. Changes no argument.

        Args:
            fused: what the replicas fused (k,).
            anchor: the weights of the round before (k,).
            momentum: the decaying sum of changes of all rounds before (k,), None at the first.
        """
        options = self.options()
        decay, change = options.get("momentum", 0.0), fused - anchor
        momentum = change if momentum is None else momentum * decay + change
        way = change + momentum * decay if options.get("nesterov") else momentum
        return fused + (way * options["lr"] - change), momentum


@dataclass(frozen=True)
class Average(Outer):
    """Goes on from the fused weights as they are: local SGD (Stich 2019, arXiv:1805.09767)."""

    name: ClassVar[str] = "average"

    def options(self, share: float = 1.0) -> dict[str, Any]:
        return {"lr": share}

    def step(
        self, fused: Tensor, anchor: Tensor, momentum: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return fused, None


@dataclass(frozen=True)
class Momentum(Outer):
    """Heavy-ball momentum over rounds: SlowMo (Wang et al. 2020, arXiv:1910.00643, algorithm 1,
    with the slow learning rate `lr` and the slow momentum `momentum`)."""

    name: ClassVar[str] = "momentum"
    lr: float = 1.0
    momentum: float = 0.5

    def __post_init__(self) -> None:
        _refuse_rates(self, self.lr, self.momentum)

    def options(self, share: float = 1.0) -> dict[str, Any]:
        return {"lr": self.lr * share, "momentum": self.momentum}


@dataclass(frozen=True)
class Nesterov(Outer):
    """Nesterov momentum over rounds: DiLoCo (Douillard et al. 2023, arXiv:2311.08105)."""

    name: ClassVar[str] = "nesterov"
    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _refuse_rates(self, self.lr, self.momentum)
        if self.momentum == 0:
            raise PlanError(str(self), "Nesterov's step needs a momentum", "average")

    def options(self, share: float = 1.0) -> dict[str, Any]:
        return {"lr": self.lr * share, "momentum": self.momentum, "nesterov": True}


def _refuse_rates(outer: Outer, lr: object, momentum: object) -> None:
    if isinstance(lr, int | float) and not 0 < lr < math.inf:
        raise PlanError(str(outer), "lr is a number above 0", outer.name)
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise PlanError(str(outer), "momentum is a number from 0 to below 1", outer.name)


OUTERS: dict[str, type[Outer]] = {
    "average": Average,
    "momentum": Momentum,
    "nesterov": Nesterov,
}
