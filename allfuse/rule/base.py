"""How n values become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice
from allfuse.rule.sift import Sift

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor


@dataclass(frozen=True)
class Rule(Choice, ABC):
    """Pure tensor math on one block; the same object serves a stream, a shard and a round.

    fuses_weights: whether it makes weights of weights, or has a meaning for gradients only.
    linear: whether what is missing in one round may be added later, as error feedback does.
    of_changes: whether it fuses what changed since a base that all come from, to which the fused
        change is added; else the values themselves.
    models: how many it fuses, where it is not any number.
    weighted: whether it looks at the weights.
    """

    fuses_weights: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    of_changes: ClassVar[bool] = False
    models: ClassVar[int | None] = None
    weighted: ClassVar[bool] = True

    def sift(self, count: int) -> Sift | None:
        """What is left out of one model's tensor of so many numbers first; None: nothing."""
        return None


@dataclass(frozen=True)
class SumRule(Rule):
    """A rule whose statistic is summed over the peers, in any order, by any topology.

    The fused value is `finish(sum(prepare(value_i, weight_i)), sum(weight_i))`.
    """

    needs_norm: ClassVar[bool] = False

    def shrink(self, norm: float) -> float:
        """What a peer's value is multiplied by first, by the L2 norm of all of it.

        Asked only where `needs_norm`: nothing can be sent then before all of it is known.
        """
        return 1.0

    @abstractmethod
    def prepare(self, value: Tensor, weight: float) -> Tensor:
        """What this peer adds to the sum. Works in place on `value` and returns it."""

    @abstractmethod
    def finish(self, total: Tensor, weight: float) -> Tensor:
        """The fused value from the sum and the sum of weights. Works in place on `total`."""


@dataclass(frozen=True)
class GatherRule(Rule):
    """A rule that needs every peer's value of an element at once.

    It travels only where a topology brings them together (`Topology.gathers`).
    """

    @abstractmethod
    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        """The fused value (k,) of those of n peers: values (n, k), their weights (n,)."""


@dataclass(frozen=True)
class SpanRule(Rule):
    """A rule that gives sum(c_i x_i), where the c follow from the lengths of the x and the angles
    between them.

    Its statistic is the Gram matrix of a whole tensor, which is summed over its blocks.
    """

    @abstractmethod
    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The c, float64 (n,), from gram[i, j] = <x_i, x_j>, float64 (n, n), and weights (n,)."""
